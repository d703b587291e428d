"""Images on disk -> arrays: folders of picture files, one folder a class, and the IDX files of the MNIST family."""

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
_IDX_UINT8 = 0x08


class Image(NamedTuple):
    """``pixels`` [height, width, channels], 0 to 255; ``label``: name of its class."""

    pixels: NDArray[np.uint8]
    label: str
    origin: str


def class_names(path: Path, labels: Path | None) -> list[str]:
    """The classes, sorted: folders' names, or the numbers that a file of labels holds.

    Raises:
        DataError: there are none.
    """
    if path.is_dir():
        names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        if not names:
            raise DataError(f"{path} holds no folders: one for each class is expected")
        return names
    if labels is None:
        raise DataError(f"{path} is a file of images: name that of their labels by --labels")
    return [str(number) for number in np.unique(_read_idx_labels(labels)).tolist()]


def read_images(path: Path, labels: Path | None, size: tuple[int, int] | None, gray: bool) -> Iterator[Image]:
    """All images, in the order of their files.

    Args:
        size: height and width to bring pictures to; None: as they are.
        gray: one channel instead of three.
    Raises:
        DataError: a file that is no image, or labels that don't fit.
    """
    if path.is_dir():
        yield from _read_pictures(path, size, gray)
    else:
        assert labels is not None
        yield from _read_idx(path, labels, size)


def _read_pictures(folder: Path, size: tuple[int, int] | None, gray: bool) -> Iterator[Image]:
    try:
        from PIL import Image as Pictures
    except ImportError as error:
        raise DataError("reading pictures needs the package pillow (pip install pillow)") from error
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(path for path in kind.rglob("*") if path.suffix.lower() in _PICTURES):
            try:
                with Pictures.open(path) as opened:
                    picture = opened.convert("L" if gray else "RGB")
            except OSError as error:
                raise DataError(f"{path} is no image that can be read: {error}") from error
            if size is not None:
                picture = picture.resize((size[1], size[0]), Pictures.Resampling.BICUBIC)
            pixels = np.asarray(picture, np.uint8)
            yield Image(pixels.reshape(*pixels.shape[:2], -1), kind.name, str(path))


def _read_idx(path: Path, labels: Path, size: tuple[int, int] | None) -> Iterator[Image]:
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
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]
