"""Zip archives as torch.save writes them: a run of a file's bytes in, the byte range of each stored record out."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator

from ckpt_ema.byte_ranges import InputFile, SourceFile, read_exactly
from ckpt_ema.errors import UnreadableCheckpointError

ZIP_MAGIC = b"PK\x03\x04"
# Real pickles take a few MB; the largest seen hold histories of metrics. What is larger is no table of tensors.
MAX_SMALL_BYTES = 256 << 20
# A directory takes 80 bytes per tensor, and ten times as much once it is read.
MAX_DIRECTORY_BYTES = 64 << 20
TAIL_BYTES = 1024
CHECKSUM_OFFSET = 14
"""In a local header, of the record's CRC-32."""

# Local header of a record: magic, the lengths of its name and of its extra field, both of which follow.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# Entry of the central directory: magic, flags, method, the two sizes, three lengths, offset of the local header.
_ENTRY = struct.Struct("<4s4xHH8xIIHHH8xI")


_Record = tuple[int, int, int, int]
"""Offset of the local header in the zip, stored size, size, method; a bare tuple, since there is one per tensor."""


class ZipArchive:
    """The central directory of a zip that is a file, or a part of one; read with pread alone."""

    def __init__(self, file: InputFile, source: SourceFile, begin: int = 0, end: int | None = None) -> None:
        """Raises UnreadableCheckpointError where `[begin, end)` of the file is no whole zip."""
        self._source = source
        self._begin, self._end = begin, source.size if end is None else end
        self.records: dict[str, _Record] = {}
        self._read_directory(file)

    def _refuse(self, what: str) -> UnreadableCheckpointError:
        return UnreadableCheckpointError(f"`{self._source.path}` {what}")

    def find_root(self) -> str:
        """`archive/` or whatever folder torch.save put its records in."""
        roots = [name.removesuffix("data.pkl") for name in self.records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise self._refuse("is a zip file, but not one written by torch.save")
        if f"{roots[0]}constants.pkl" in self.records:
            raise UnreadableCheckpointError(
                f"`{self._source.path}` is a TorchScript program, not a checkpoint",
                hint="save `model.state_dict()` with torch.save instead",
            )
        return roots[0]

    def read_small(self, file: InputFile, name: str) -> bytes:
        """The content of a record that is no storage."""
        ((begin, end),) = self.locate(file, [name])
        if end - begin > MAX_SMALL_BYTES:
            raise self._refuse(f"has a `{name}` of {end - begin} bytes, above the limit of {MAX_SMALL_BYTES}")
        return read_exactly(file, end - begin, begin)

    def locate(self, file: InputFile, names: Collection[str]) -> Iterator[tuple[int, int]]:
        """The byte range of each record's content."""
        pread, records, limits = file.pread, self.records, self._limits
        unpack, header_size = _LOCAL_HEADER.unpack, _LOCAL_HEADER.size
        file.expect(
            (self._begin + begin, self._begin + begin + header_size)
            for begin, _, _, _ in map(records.__getitem__, names)
        )
        for name in names:
            header_offset, stored_size, size, method = records[name]
            if method != 0 or stored_size != size:
                raise UnreadableCheckpointError(
                    f"`{self._source.path}`: record `{name}` is compressed; torch.save never does that",
                    hint="unpack it and save the state dict again with torch.save",
                )
            # Asked of the record itself: its directory does not say where the content begins.
            try:
                header = pread(header_size, self._begin + header_offset)
            except OSError as error:
                raise self._refuse(f"cannot be read at byte {header_offset}: {error.strerror or error}") from error
            if len(header) < header_size:
                raise self._refuse(f"is truncated: record `{name}` begins beyond the end of the file")
            magic, name_length, extra_length = unpack(header)
            if magic != ZIP_MAGIC:
                raise self._refuse(f"has no record where its directory says `{name}` is")
            begin = header_offset + header_size + name_length + extra_length
            end = begin + size
            if end > limits[header_offset]:
                raise self._refuse(f"has a record `{name}` that overlaps the next one")
            yield self._begin + begin, self._begin + end

    def _read_directory(self, file: InputFile) -> None:
        def read(size: int, offset: int) -> bytes:
            return read_exactly(file, size, self._begin + offset)

        size = self._end - self._begin
        # torch.save writes no comment after the end record. The second try is for the longest one there can be; the
        # first mostly has the whole directory of a single tensor, of which a sharded checkpoint has thousands.
        for wanted in (TAIL_BYTES, 65557):
            tail_size = min(size, wanted)
            tail = read(tail_size, size - tail_size)
            at = tail.rfind(b"PK\x05\x06")
            if len(tail) - at >= 22 and at >= 0:
                break
        if at < 0 or len(tail) - at < 22:
            raise self._refuse("is truncated: the directory of its records is missing")
        count, directory_size, directory_offset = struct.unpack("<HII", tail[at + 10 : at + 20])
        end_offset = size - tail_size + at
        if count == 0xFFFF or directory_size == 0xFFFFFFFF or directory_offset == 0xFFFFFFFF:
            locator = read(20, end_offset - 20) if end_offset >= 20 else b""
            if locator[:4] == b"PK\x06\x07":
                (zip64_offset,) = struct.unpack("<Q", locator[8:16])
                zip64 = read(56, zip64_offset) if zip64_offset + 56 <= end_offset else b""
                if zip64[:4] != b"PK\x06\x06":
                    raise self._refuse("lies about where its directory is")
                count, directory_size, directory_offset = struct.unpack("<QQQ", zip64[32:56])
        if directory_offset + directory_size > end_offset:
            raise self._refuse("lies about where its directory is")
        if directory_size > MAX_DIRECTORY_BYTES:
            raise self._refuse(f"has {count} records, too many for a table of tensors")
        known = directory_offset - (size - tail_size)
        directory = tail[known : known + directory_size] if known >= 0 else read(directory_size, directory_offset)
        self._read_entries(directory, count)
        if not self.records:
            raise self._refuse("is a zip file without a record")
        offsets = sorted(record[0] for record in self.records.values())
        if len(set(offsets)) < len(offsets) or offsets[-1] >= directory_offset:
            raise self._refuse("has records that overlap")
        self._limits = dict(zip(offsets, [*offsets[1:], directory_offset], strict=True))

    def _read_entries(self, directory: bytes, count: int) -> None:
        records, unpack, entry_size, limit = self.records, _ENTRY.unpack_from, _ENTRY.size, len(directory)
        position = 0
        for _ in range(count):
            if limit - position < entry_size:
                raise self._refuse("has a damaged directory")
            magic, flags, method, stored_size, size, name_length, extra_length, comment_length, header_offset = unpack(
                directory, position
            )
            extra_begin = position + entry_size + name_length
            end = extra_begin + extra_length + comment_length
            if magic != b"PK\x01\x02" or end > limit:
                raise self._refuse("has a damaged directory")
            name = directory[position + entry_size : extra_begin].decode("utf-8", "replace")
            if stored_size == 0xFFFFFFFF or size == 0xFFFFFFFF or header_offset == 0xFFFFFFFF:
                size, stored_size, header_offset = self._read_zip64_extra(
                    directory[extra_begin : extra_begin + extra_length], size, stored_size, header_offset
                )
            if flags & 1:
                raise self._refuse(f"has an encrypted record `{name}`")
            if name in records:
                raise self._refuse(f"names the record `{name}` twice")
            records[name] = (header_offset, stored_size, size, method)
            position = end

    def _read_zip64_extra(self, extra: bytes, size: int, stored_size: int, header_offset: int) -> tuple[int, int, int]:
        position = 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, position)
            field = extra[position + 4 : position + 4 + length]
            position += 4 + length
            if kind != 1:
                continue
            # The fields that overflowed, in this order, and only those.
            values = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            try:
                size = next(values) if size == 0xFFFFFFFF else size
                stored_size = next(values) if stored_size == 0xFFFFFFFF else stored_size
                header_offset = next(values) if header_offset == 0xFFFFFFFF else header_offset
            except StopIteration:
                break
            return size, stored_size, header_offset
        raise self._refuse("has a damaged directory")
