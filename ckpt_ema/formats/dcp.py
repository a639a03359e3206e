"""torch.distributed.checkpoint folders: `.metadata` in, a tree of tensors and the byte ranges of their pieces out.

`.metadata` is a pickle that says which boxes of which tensor lie where; every box is a whole torch.save zip inside a
`.distcp` file. Both are read by the unpickler that runs nothing, and no process group is needed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.assembly import AssemblyError, StoredTensor, assemble_boxes
from ckpt_ema.byte_ranges import InputFile, SourceFile, TensorRange, open_input, read_exactly
from ckpt_ema.dtypes import BY_NAME, DType
from ckpt_ema.errors import UnreadableCheckpointError
from ckpt_ema.formats.contents import PROVENANCE_FILE, Contents, is_plain_name, read_file, read_json
from ckpt_ema.formats.pickle_scan import MalformedPickleError
from ckpt_ema.formats.pickles import Inert, PickledTensor, is_unknown_dtype, sizes_of
from ckpt_ema.formats.torch_save import load_pickle, read_zip_within
from ckpt_ema.formats.zip_archive import CHECKSUM_OFFSET, MAX_SMALL_BYTES, ZIP_MAGIC
from ckpt_ema.locations import children_of

METADATA_NAME = ".metadata"
PIECE_SUFFIX = ".distcp"
PIECES_NAME = "__0_0.distcp"
"""The file with the tensors of a teacher that this tool writes."""

TABLE_KEY = "metadata_sha256"
"""In its provenance; a trainer that saves into its folder leaves the provenance, and makes another table."""

FRAMING_KEY = "framing_sha256"
"""As well: of all bytes of its pieces that are no tensor's."""

LIGHTNING_NAME = "meta.pt"
"""What Lightning saves beside a sharded model: everything but its tensors."""

# Values that are no tensors are pickles of their own. Counters take a few hundred bytes, dataloaders megabytes.
MAX_VALUE_BYTES = 64 << 10
MAX_VALUES = 1000
MAX_HEAD_BYTES = 16 << 10

# The pickle of one tensor, and the directory of the records of its zip.
PIECE_HEAD_BYTES = 4096
PIECE_TAIL_BYTES = 2048


class Piece(NamedTuple):
    """Where one box of a tensor was saved."""

    file_name: str
    begin: int
    length: int
    """Bytes of its torch.save zip."""


class ShardedTensor(NamedTuple):
    """A tensor as `.metadata` describes it; its pieces are not yet looked at."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], Piece], ...]
    """First index per dimension, and where the piece is."""


def is_dcp_folder(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote into `folder`, finished or not."""
    return (folder / METADATA_NAME).is_file() or any(path.suffix == PIECE_SUFFIX for path in children_of(folder))


def read_dcp(folder: Path) -> Contents:
    """Read the table of a folder; the pieces of its tensors are looked at when they are located.

    Raises UnreadableCheckpointError for an unfinished folder and for one whose table lies.
    """
    path = folder / METADATA_NAME
    content = read_metadata(folder)
    try:
        tensors, values, paths = _read_table(load_pickle(content, path), len(content))
    except _NoTableError as error:
        raise UnreadableCheckpointError(f"`{path}` {error}") from None
    pieces = _PieceFiles(folder)
    tree: dict[str, Any] = {}
    beside = folder / LIGHTNING_NAME
    if beside.is_file():
        found = read_file(beside).tree
        if isinstance(found, dict):
            tree.update(_without_tensors(found))
    entries: list[tuple[str, Any]] = [(tensor.name, tensor) for tensor in tensors]
    # Only what may be a counter: a name of one part or two (`global_step`, `train_state.step`). Of the others it is
    # known that they are there.
    small = [name for name, piece in values if piece.length <= MAX_VALUE_BYTES]
    read = {name for name in small[:MAX_VALUES] if name.count(".") < 2}
    entries += [(name, pieces.read_value(piece) if name in read else None) for name, piece in values]
    for name, leaf in entries:
        _put(tree, paths.get(name, (name,)), leaf)
    count = len({piece.file_name for tensor in tensors for _, piece in tensor.pieces})
    kind = f"distributed checkpoint in {count} file{'' if count == 1 else 's'}"
    return Contents(folder, kind, pieces.files(), tree, own_provenance(folder, content), locator=pieces)


def read_metadata(folder: Path) -> bytes:
    """The bytes of a folder's table; raises UnreadableCheckpointError where there is none, or one too large."""
    path = folder / METADATA_NAME
    if not path.is_file():
        raise UnreadableCheckpointError(
            f"`{folder}` is an unfinished checkpoint: it has no `{METADATA_NAME}`, which is written last"
        )
    file = open_input(path)
    try:
        size = file.source().size
        if size > MAX_SMALL_BYTES:
            raise UnreadableCheckpointError(f"`{path}` has {size} bytes, too many for a table")
        content = read_exactly(file, size, 0)
    finally:
        file.close()
    if not content:
        raise UnreadableCheckpointError(f"`{path}` is empty")
    return content


def own_provenance(folder: Path, metadata: bytes) -> dict[str, str]:
    """What this tool wrote beside a teacher of its own; nothing where the folder's table is another one since."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return {}
    try:
        table = read_json(path)
    except UnreadableCheckpointError:
        return {}
    if table.pop(TABLE_KEY, None) != hashlib.sha256(metadata).hexdigest():
        return {}
    return {key: value for key, value in table.items() if isinstance(value, str)}


class _NoTableError(Exception):
    """`.metadata` is not what torch writes."""


def _read_table(
    metadata: Any, num_bytes: int
) -> tuple[list[ShardedTensor], list[tuple[str, Piece]], dict[str, tuple[str, ...]]]:
    """The tensors, the other values, and the path of each in the state dict that was saved, in a pickle so long."""
    state = _state_of(metadata, "Metadata")
    entries, places = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise _NoTableError("holds no table of tensors")
    stored: dict[str, dict[tuple[int, ...] | None, Piece]] = {}
    for index, place in places.items():
        key = _state_of(index, "MetadataIndex")
        name, offset = key.get("fqn"), key.get("offset")
        if not isinstance(name, str):
            raise _NoTableError("names a tensor with something that is no text")
        stored.setdefault(name, {})[None if offset is None else _sizes(offset)] = _piece(place)
    tensors: list[ShardedTensor] = []
    values: list[tuple[str, Piece]] = []
    num_pieces = 0
    for name, entry in entries.items():
        found = stored.get(name, {}) if isinstance(name, str) else {}
        if not isinstance(entry, Inert):
            raise _NoTableError("describes a tensor by something else")
        if entry.qualified_name.endswith(".BytesStorageMetadata"):
            values += [(name, piece) for piece in list(found.values())[:1]]
        else:
            described = _state_of(entry, "TensorStorageMetadata")
            # A list that many tensors share is short in a pickle, and looked at for each.
            num_pieces += _length(described.get("chunks"))
            if num_pieces > num_bytes:
                raise _NoTableError(f"has {num_bytes} bytes, and describes {num_pieces} pieces and more")
            tensors.append(_tensor(name, described, found))
    return tensors, values, dict(_paths(state.get("planner_data")))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _tensor(name: Any, state: Mapping[str, Any], found: Mapping[tuple[int, ...] | None, Piece]) -> ShardedTensor:
    properties = state.get("properties")
    described = properties.state if isinstance(properties, Inert) else None
    dtype = described[0] if isinstance(described, tuple) and described else None
    if is_unknown_dtype(dtype):
        dtype = BY_NAME["uint8"]  # its pieces say their dtype as well, and are refused where they are wanted
    chunks = state.get("chunks")
    if not isinstance(name, str) or type(dtype) is not DType or not isinstance(chunks, list):
        raise _NoTableError("describes a tensor without a name, a dtype or pieces")
    shape = _sizes(state.get("size"))
    pieces = []
    for chunk in chunks:
        box = _state_of(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(box.get("offsets")), _sizes(box.get("sizes"))
        piece = found.get(offsets)
        # Ranks that have nothing of a small tensor save a piece without elements, or none.
        if 0 in sizes and 0 not in shape:
            continue
        if piece is None:
            raise _NoTableError(f"does not say where the piece of `{name}` at {list(offsets)} lies")
        pieces.append((offsets, piece))
    return ShardedTensor(name, dtype, shape, tuple(pieces))


def _state_of(value: Any, class_name: str) -> Mapping[str, Any]:
    if (
        isinstance(value, Inert)
        and value.qualified_name.endswith(f".{class_name}")
        and (isinstance(value.state, dict) or value.state is None)
    ):
        return value.state or {}
    raise _NoTableError(f"has something else where a {class_name} should be")


def _sizes(value: Any) -> tuple[int, ...]:
    try:
        return sizes_of(value)
    except MalformedPickleError as error:
        raise _NoTableError(f"has {error}") from None


_is_plain_name = functools.lru_cache(maxsize=4096)(is_plain_name)  # a file has many pieces


def _piece(value: Any) -> Piece:
    state = _state_of(value, "_StorageInfo")
    name, begin, length = state.get("relative_path"), state.get("offset"), state.get("length")
    if state.get("transform_descriptors"):
        raise _NoTableError("says that its pieces were transformed (compressed or encrypted), which is not read")
    if not isinstance(name, str) or not _is_plain_name(name):
        raise _NoTableError(f"names a file that is none: {ascii(name)[:80]}")
    if type(begin) is not int or type(length) is not int or not (0 <= begin < 1 << 62 and 0 <= length < 1 << 62):
        raise _NoTableError("places a piece at something that is no byte range")
    return Piece(name, begin, length)


def _paths(planned: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """How names were made of the keys of nested tables; a name of which nothing is said is a key itself."""
    for name, path in planned.items() if isinstance(planned, dict) else ():
        is_path = isinstance(path, tuple) and 0 < len(path) <= 32 and all(isinstance(key, (str, int)) for key in path)
        if isinstance(name, str) and is_path:
            yield name, tuple(map(str, path))


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for depth, key in enumerate(path[:-1]):
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):  # a lying table may have a tensor and a table of one name
            tree[".".join(path[depth:])] = leaf
            return
        tree = inner
    tree[path[-1]] = leaf


def _without_tensors(tree: dict[Any, Any]) -> dict[str, Any]:
    """Counters and settings: what is small and plain."""
    return {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, (int, float, str))}


def _tables_of(piece: Piece) -> Iterator[tuple[int, int]]:
    """The byte ranges of a piece's zip that its directory and its pickle take, with nearly every torch."""
    end = piece.begin + piece.length
    yield piece.begin, min(end, piece.begin + PIECE_HEAD_BYTES)
    yield max(piece.begin, end - PIECE_TAIL_BYTES), end


class _PieceFiles:
    """The `.distcp` files of a folder; finds the bytes of its tensors in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[str, SourceFile] = {}

    def files(self) -> tuple[SourceFile, ...]:
        """All of them, as they are now."""
        for path in sorted(self._folder.iterdir()):
            if path.suffix == PIECE_SUFFIX and path.is_file():
                self._open(path.name)[0].close()
        return tuple(self._sources.values())

    def read_value(self, piece: Piece) -> Any:
        """A value that is no tensor; None for what cannot be read, since none is needed."""
        try:
            file, source = self._open(piece.file_name)
        except UnreadableCheckpointError:
            return None
        try:
            return read_zip_within(file, source, piece.begin, piece.begin + piece.length).tree
        except UnreadableCheckpointError:
            return None
        finally:
            file.close()

    def locate(self, tensors: Mapping[str, ShardedTensor]) -> dict[str, StoredTensor]:
        """The byte ranges of the pieces of each tensor, checked against the zips that hold them."""
        wanted: dict[str, list[tuple[str, Piece]]] = {}
        for name, tensor in tensors.items():
            for _, piece in tensor.pieces:
                wanted.setdefault(piece.file_name, []).append((name, piece))
        known = _KnownPieces()
        ranges: dict[Piece, TensorRange] = {}
        for file_name, pieces in wanted.items():
            file, source = self._open(file_name)
            try:
                file.expect(itertools.chain.from_iterable(_tables_of(piece) for _, piece in pieces))
                for name, piece in pieces:
                    ranges[piece] = self._locate_piece(file, source, name, piece, known)
            finally:
                file.close()
        located = {}
        for name, tensor in tensors.items():
            parts = [(offsets, ranges[piece]) for offsets, piece in tensor.pieces]
            try:
                located[name] = assemble_boxes(tensor.dtype, tensor.shape, parts)
            except AssemblyError as error:
                raise UnreadableCheckpointError(f"`{self._folder}`: tensor `{name}` {error}") from None
        return located

    def _open(self, file_name: str) -> tuple[InputFile, SourceFile]:
        path = self._folder / file_name
        if not path.exists():
            raise UnreadableCheckpointError(f"`{self._folder}` lacks `{file_name}`")
        file = open_input(path)
        return file, self._sources.setdefault(file_name, file.source())

    def _locate_piece(
        self, file: InputFile, source: SourceFile, name: str, piece: Piece, known: _KnownPieces
    ) -> TensorRange:
        end = piece.begin + piece.length
        if end > source.size:
            raise UnreadableCheckpointError(
                f"`{source.path}` is truncated: a piece ends at byte {end}, the file at {source.size}"
            )
        found = known.find(file, source, piece)
        if found is not None:
            return found
        saved = read_zip_within(file, source, piece.begin, end, known.pickles)
        if not isinstance(saved.tree, PickledTensor):
            raise UnreadableCheckpointError(f"`{source.path}` has no tensor at byte {piece.begin}")
        found = saved.locate_within(file, {name: saved.tree})[name]
        known.add(file, piece, found)
        return found


class _KnownPieces:
    """Zips like one that was read: equal up to the tensor's first byte, but for the checksum of its numbers.

    There is one for every tensor and rank; comparing a kilobyte is ten times as fast as reading a directory.
    """

    def __init__(self) -> None:
        self.pickles: dict[bytes, Any] = {}
        """What was found in pickles by their bytes."""
        self._head_bytes: dict[int, int] = {}
        """By the length of a zip how far its tensor's first byte is from its own."""
        self._found: dict[tuple[int, bytes, bytes], TensorRange] = {}
        """Ranges relative to the zip's first byte."""

    def find(self, file: InputFile, source: SourceFile, piece: Piece) -> TensorRange | None:
        """The bytes of a piece whose zip is like an earlier one; None where that is not certain."""
        head_bytes = self._head_bytes.get(piece.length)
        if head_bytes is None:
            return None
        found = self._found.get(_key(read_exactly(file, head_bytes, piece.begin), piece.length))
        if found is None:
            return None
        return found._replace(file=source, begin=piece.begin + found.begin, end=piece.begin + found.end)

    def add(self, file: InputFile, piece: Piece, found: TensorRange) -> None:
        """Remember where the tensor of a zip was found."""
        head_bytes = found.begin - piece.begin
        if head_bytes <= MAX_HEAD_BYTES:
            self._head_bytes[piece.length] = head_bytes
            head = read_exactly(file, head_bytes, piece.begin)
            relative = found._replace(begin=head_bytes, end=found.end - piece.begin)
            self._found[_key(head, piece.length)] = relative


def _key(head: bytes, length: int) -> tuple[int, bytes, bytes]:
    """What must be equal: all but the checksum in the last local header, that of the tensor's own numbers."""
    checksum = head.rfind(ZIP_MAGIC) + CHECKSUM_OFFSET
    return length, head[:checksum], head[checksum + 4 :]
