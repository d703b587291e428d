"""Images on disk -> arrays: folders of picture files, one folder a class, and the IDX files of the MNIST family."""

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.config.extras import missing
from megatrain.data.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
_IDX_UINT8 = 0x08
_WHITE_16_BITS = 0xFFFF


class Image(NamedTuple):
    """``pixels`` [height, width, channels], 0 to 255; ``label``: name of its class."""

    pixels: NDArray[np.uint8]
    label: str
    origin: str


def find_pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, all sorted. A class is a folder with pictures; hidden files and folders are some
    program's own (.git, .ipynb_checkpoints) and are left out.

    Raises:
        DataError: there are none.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_picture = path.suffix.lower() in PICTURES and path.is_file()
        if is_picture and len(parts) > 1 and not any(part.startswith(".") for part in parts):
            found.setdefault(parts[0], []).append(path)
    if not found:
        raise DataError(
            f"{folder} holds no folders with pictures ({', '.join(PICTURES)}): one for each class is expected"
        )
    return found


def left_out_of(folder: Path, pictures: dict[str, list[Path]]) -> list[Path]:
    """The other files: loose ones, hidden ones, and those that do not end as pictures do; and links to folders."""
    taken = {path for paths in pictures.values() for path in paths}
    return [path for path in folder.rglob("*") if path not in taken and (path.is_symlink() or not path.is_dir())]


def idx_classes(path: Path, labels: Path | None) -> list[str]:
    """The classes of an IDX file: the numbers that its file of labels holds.

    Raises:
        DataError: no file of labels.
    """
    if labels is None:
        raise DataError(f"{path} is a file of images: name that of their labels by --labels")
    return [str(number) for number in np.unique(_read_idx_labels(labels)).tolist()]


def read_pictures(pictures: dict[str, list[Path]], size: tuple[int, int] | None, gray: bool) -> Iterator[Image]:
    """All pictures, in the order of their files.

    Args:
        size: height and width to bring them to; None: as they are.
        gray: one channel instead of three.
    Raises:
        DataError: a file that is no image, or pillow is not installed.
    """
    try:
        from PIL import Image as Pictures
    except ImportError as error:
        raise DataError(missing("pillow", "reading pictures", error)) from error
    for label, path in ((label, path) for label, paths in pictures.items() for path in paths):
        try:
            with Pictures.open(path) as opened:
                picture = _in_8_bits(opened, path).convert("L" if gray else "RGB")
        except OSError as error:
            raise DataError(f"{path} is no image that can be read: {error}") from error
        if size is not None:
            picture = picture.resize((size[1], size[0]), Pictures.Resampling.BICUBIC)
        pixels = np.asarray(picture, np.uint8)
        yield Image(pixels.reshape(*pixels.shape[:2], -1), label, str(path))


def _in_8_bits(picture: Any, path: Path) -> Any:
    """The picture with 8 bits a sample, upright: a mark may say how the camera was held.

    Of 16 bits the upper half stays; the library's own way cuts all above 255 off.
    """
    from PIL import Image as Pictures
    from PIL import ImageOps

    if picture.mode == "F":
        raise DataError(f"{path} has samples that are fractions: only those of 8 and 16 bits can be read")
    upright = ImageOps.exif_transpose(picture)
    if upright.mode != "I" and not upright.mode.startswith("I;16"):
        return upright
    samples = np.asarray(upright).astype(np.int64)
    if samples.min() < 0 or samples.max() > _WHITE_16_BITS:
        raise DataError(f"{path} has samples of {samples.min()} to {samples.max()}: only 8 and 16 bits can be read")
    return Pictures.fromarray((samples >> 8).astype(np.uint8))


def read_idx(path: Path, labels: Path, size: tuple[int, int] | None) -> Iterator[Image]:
    """All images of an IDX file.

    Raises:
        DataError: no such file, one that is cut short, labels that don't fit, or images of another ``size``.
    """
    classes = _read_idx_labels(labels)
    with _open(path) as file:
        count, *shape = _idx_shape(file, path, (3, 4))
        if count != len(classes):
            raise DataError(f"{path} holds {count} images, {labels} {len(classes)} labels")
        if size is not None and tuple(shape[:2]) != size:
            raise DataError(f"{path} holds images of {shape[0]} x {shape[1]}: such files are taken as they are")
        for number in range(count):
            content = file.read(int(np.prod(shape)))
            if len(content) < np.prod(shape):
                raise DataError(f"{path} is cut short in image {number}")
            pixels = np.frombuffer(content, np.uint8).reshape(shape[0], shape[1], -1)
            yield Image(pixels, str(classes[number]), f"{path}:{number}")


def _read_idx_labels(path: Path) -> NDArray[np.uint8]:
    with _open(path) as file:
        (count,) = _idx_shape(file, path, (1,))
        labels = np.frombuffer(file.read(count), np.uint8)
    if len(labels) < count:
        raise DataError(f"{path} is cut short: {len(labels)} labels of {count}")
    return labels


def _idx_shape(file: IO[bytes], path: Path, num_dims: tuple[int, ...]) -> tuple[int, ...]:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _IDX_UINT8 or head[3] not in num_dims:
        raise DataError(f"{path} is no IDX file of bytes with {' or '.join(map(str, num_dims))} dimensions")
    return struct.unpack(f">{head[3]}I", file.read(4 * head[3]))


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]
