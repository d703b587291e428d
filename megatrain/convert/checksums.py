"""The checksums that ``torch.save`` puts into its files, which ``torch.load`` doesn't look at."""

import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from megatrain.convert.errors import ConversionError

_BLOCK = 2**24


def require_checksums(file: Path | BinaryIO, label: str = "") -> None:
    """Reads every record of a file of ``torch.save`` and compares its CRC-32 with the one that was stored.

    Files of before PyTorch 1.6 have none, nor have those that were saved with ``set_crc32_options(False)``.

    Args:
        label: what to call the file in messages.
    Raises:
        ConversionError: a record is damaged.
    """
    label = label or str(file)
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.CRC for record in records):
                for record in records:
                    _require_record(archive, record, label)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, zlib.error) as error:
        raise ConversionError(f"{label} is damaged: {error}") from error


def archive_name(path: Path) -> str:
    """The name under which ``torch.save`` wrote a file: its records stand in a folder of that name; "" for none."""
    if not zipfile.is_zipfile(path):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[0].partition("/")[0]
    except (zipfile.BadZipFile, IndexError) as error:
        raise ConversionError(f"{path} is damaged: {error}") from error


def _require_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo, label: str) -> None:
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise ConversionError(f"{label}: {record.filename} is compressed or encrypted, which torch.save never does")
    with archive.open(record) as content:  # compares the CRC when it comes to the end
        while content.read(_BLOCK):
            pass
