"""Damaged copies of data sets, by seed."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path


def mutated_copies(original: Path, folder: Path, count: int, seed: int) -> Iterator[tuple[Path, str]]:
    """Copies of a data set in ``folder``, each with one file changed somehow, and how; removed after their use."""
    generator = random.Random(seed)
    for number in range(count):
        copy = folder / str(number)
        shutil.copytree(original, copy)
        yield copy, _mutate(copy, generator)
        shutil.rmtree(copy)


def _mutate(folder: Path, generator: random.Random) -> str:
    """Changes one file somehow; says how."""
    path = generator.choice(sorted(path for path in folder.iterdir()))
    content = bytearray(path.read_bytes())
    kind = generator.choice(["flip", "byte", "cut", "append", "insert", "remove", "swap", "zero", "delete"])
    at = generator.randrange(len(content))
    match kind:
        case "flip":
            content[at] ^= 1 << generator.randrange(8)
        case "byte":
            content[at] = (content[at] + generator.randrange(1, 256)) % 256
        case "cut":
            del content[at:]
        case "append":
            content += generator.randbytes(generator.randrange(1, 9))
        case "insert":
            content[at:at] = generator.randbytes(1)
        case "remove":
            del content[at]
        case "swap":
            other = next((i for i in range(len(content)) if content[i] != content[at]), at)
            content[at], content[other] = content[other], content[at]
        case "zero":
            content[at : at + 64] = bytes(b ^ 0xFF for b in content[at : at + 64])
        case "delete":
            path.unlink()
            return f"{path.name} deleted"
    path.write_bytes(content)
    return f"{path.name}: {kind} at {at}"
