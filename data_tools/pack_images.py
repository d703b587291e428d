"""Images -> a data set whose documents are images: the token of its class, its pixels row by row, the end.

An image is height x width x channels bytes, a token each, 0 to 255; after these ids come the end of the document
(256) and the classes. A decoder that is trained on them draws images of a class. The manifest holds their shape and
the classes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tqdm import tqdm  # type: ignore[import-untyped]

from megatrain.console import run_tool
from megatrain.data.corpus.console import lineage_of, print_left_out
from megatrain.data.corpus.images import PICTURES, find_pictures, idx_classes, left_out_of, read_idx, read_pictures
from megatrain.data.corpus.inputs import Source, digest_of_all, digest_sources
from megatrain.data.errors import DataError
from megatrain.data.shards.manifest import MANIFEST
from megatrain.data.shards.writer import DatasetWriter
from megatrain.disk.target import require_free

_EOD = "<|endoftext|>"
_EOD_ID = 256
_FIRST_CLASS_ID = 257


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a folder of one folder a class, or an IDX file")
    parser.add_argument("--labels", type=Path, help="the IDX file of labels")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="bring pictures to this size")
    parser.add_argument("--gray", action="store_true", help="one channel instead of three")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens that fill a shard")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--overwrite", action="store_true", help="replace an older data set")
    return run_tool(parser, pack, argv)


def pack(arguments: argparse.Namespace) -> None:
    """Writes the data set.

    Raises:
        DataError: bad input, images of several sizes, or another data set in the way.
    """
    source, output = arguments.input, arguments.output
    if not arguments.overwrite:
        require_free(output / MANIFEST, "choose another --output, or replace it by --overwrite")
    if not source.exists() or (arguments.labels and not arguments.labels.exists()):
        raise DataError(f"no such input: {arguments.labels if source.exists() else source}")
    size = tuple(arguments.size) if arguments.size else None
    if source.is_dir():
        pictures = find_pictures(source)
        print_left_out(left_out_of(source, pictures), f"no pictures in a class's folder ({', '.join(PICTURES)})")
        classes, files = list(pictures), [path for paths in pictures.values() for path in paths]
        images = read_pictures(pictures, size, arguments.gray)
    else:
        classes, files = idx_classes(source, arguments.labels), [source, arguments.labels]
        images = read_idx(source, arguments.labels, size)
    digests = digest_sources([Source(path, "table") for path in files])
    shape: tuple[int, ...] = ()
    with DatasetWriter(
        output,
        tokenizer=pixel_tokenizer(classes),
        tokenizer_name="pixels",
        vocab_size=_FIRST_CLASS_ID + len(classes),
        eod_id=_EOD_ID,
        shard_tokens=arguments.shard_tokens,
        made_from={"inputs_sha256": digest_of_all(digests), "size": size, "gray": arguments.gray},
    ) as writer:
        for image in tqdm(images, desc="images", disable=None):
            shape = shape or image.pixels.shape
            if image.pixels.shape != shape:
                raise DataError(f"{image.origin} is {image.pixels.shape}, the first image {shape}: choose a --size")
            label = _FIRST_CLASS_ID + classes.index(image.label)
            writer.add(np.concatenate([[label], image.pixels.ravel(), [_EOD_ID]]).astype(np.int32))
        facts = {"height": shape[0], "width": shape[1], "channels": shape[2], "classes": classes} if shape else {}
        made = writer.finish({**lineage_of("pack_images", arguments, digests), "images": facts})
    print(f"{output}: {made.num_documents} images of {' x '.join(map(str, shape))}, {len(classes)} classes")


def pixel_tokenizer(classes: Sequence[str]) -> bytes:
    """A tokenizer.json that writes pixels as numbers and classes as <class:NAME>."""
    vocab = {str(value): value for value in range(256)} | {_EOD: _EOD_ID}
    names = [f"<class:{name}>" for name in classes]
    tokenizer = Tokenizer(models.WordLevel({**vocab, **{n: _FIRST_CLASS_ID + i for i, n in enumerate(names)}}, _EOD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (_EOD, *names)])
    return tokenizer.to_str().encode()


if __name__ == "__main__":
    sys.exit(main())
