"""The checksums of a zip file of torch.save, after bytes of its records were changed."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import BinaryIO

from torch_sap.files.checkpoint_reading import PIECE

ENTRY = struct.Struct("<4s24x3H12x")
"""An entry of the directory: its signature, and the lengths of name, extra field and comment that follow it."""

HAS_DESCRIPTOR = 0x08
"""Flag of a record whose checksum is written behind its data."""


def renew_checksums(file: BinaryIO, changed: Sequence[tuple[int, int]]) -> None:
    """Write the checksums of the records with changed bytes, in the directory and beside their data.

    Args:
        file: Opened for reading and writing; records are stored without compression.
        changed: Offset and length of the bytes that were changed.

    Raises:
        ValueError: if it is no zip file as torch.save writes them.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records, place = archive.infolist(), archive.start_dir
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file.name} must be a zip file of torch.save: {error}") from error
    for record in records:
        signature, *lengths = ENTRY.unpack(_read(file, place, ENTRY.size))
        if signature != b"PK\x01\x02":
            raise ValueError(f"{file.name} must be a zip file of torch.save, but its directory is damaged")
        name, extra = struct.unpack("<HH", _read(file, record.header_offset + 26, 4))
        start = record.header_offset + 30 + name + extra
        end = start + record.file_size
        if any(offset < end and start < offset + length for offset, length in changed):
            checksum = struct.pack("<I", _checksum(file, start, end))
            _write(file, place + 16, checksum)
            if record.flag_bits & HAS_DESCRIPTOR:
                signed = _read(file, end, 4) == b"PK\x07\x08"
                _write(file, end + 4 * signed, checksum)
            else:
                _write(file, record.header_offset + 14, checksum)
        place += ENTRY.size + sum(lengths)


def _checksum(file: BinaryIO, start: int, end: int) -> int:
    value = 0
    file.seek(start)
    while start < end:
        data = file.read(min(PIECE, end - start))
        if not data:
            raise ValueError(f"{file.name} ends at byte {start}, before the record that it should hold")
        value, start = zlib.crc32(data, value), start + len(data)
    return value


def _read(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)


def _write(file: BinaryIO, place: int, data: bytes) -> None:
    file.seek(place)
    file.write(data)
