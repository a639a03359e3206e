"""One pass over a pickle before it is loaded: bytes in, the pickle's end out, or a refusal.

The unpickler is C code that believes the stream: a memo index of four billion makes it touch 32 GiB, a string may claim
2**62 bytes, and hashing a tuple nested a million deep overflows the stack. All of that can be seen beforehand.
"""

from __future__ import annotations

import bisect
import re
import struct
from array import array


class MalformedPickleError(Exception):
    """The stream is no pickle, or one that builds its tensors in a way no torch does."""


class IncompletePickleError(Exception):
    """The bytes end before the pickle does."""


# 20000 tensors take 80000; each may be nested in the one before it, and needs stack then (see torch_save.py).
MAX_TUPLES = 1_000_000

# A pickle above this is scanned anew each time.
MAX_KEPT_BYTES = 16 << 20

_PREFIXED = -1
_LINES = -2
_MEMO = -3
_TUPLE = -4
_STOP = -5
_UNKNOWN = -6
_LINE_MEMO = -7

_FIXED_SIZES = {
    0: b"(0210NQR]})ab\x81\x88\x89\x91\x90\x92\x93\x94deluos" + b"\x8f",
    1: b"hKq\x80",
    2: b"M",
    4: b"jJ",
    8: b"G\x95",
}
_LENGTH_FORMATS = {
    "<B": b"UC\x8a\x8c",
    "<I": b"XTB\x8b",
    "<Q": b"\x8d\x8e\x96",
}
_LINE_COUNTS = {1: b"gIFLSVP", 2: b"ci"}

_ACTIONS = [_UNKNOWN] * 256
for _size, _opcodes in _FIXED_SIZES.items():
    for _opcode in _opcodes:
        _ACTIONS[_opcode] = _size
_LENGTHS: dict[int, struct.Struct] = {}
for _format, _opcodes in _LENGTH_FORMATS.items():
    for _opcode in _opcodes:
        _ACTIONS[_opcode] = _PREFIXED
        _LENGTHS[_opcode] = struct.Struct(_format)
_NUM_LINES: dict[int, int] = {}
for _count, _opcodes in _LINE_COUNTS.items():
    for _opcode in _opcodes:
        _ACTIONS[_opcode] = _LINES
        _NUM_LINES[_opcode] = _count
_ACTIONS[ord("r")] = _MEMO
_ACTIONS[ord("p")] = _LINE_MEMO
for _opcode in b"t\x85\x86\x87":
    _ACTIONS[_opcode] = _TUPLE
_ACTIONS[ord(".")] = _STOP


def _one_of(opcodes: bytes, operand: bytes = b"") -> bytes:
    return b"[" + re.escape(opcodes) + b"]" + operand


# Most of a table of tensors is runs of opcodes of fixed length, which a pattern passes over ten times as fast as a
# loop. Of the memo's indices it takes those below a million, which cost little whatever the pickle says; the bound on
# the number of repetitions bounds the memory of the match.
_TUPLES = b"t\x85\x86\x87"
_RUN = re.compile(
    b"(?:"
    + b"|".join(
        (
            _one_of(_FIXED_SIZES[0] + _TUPLES),
            _one_of(_FIXED_SIZES[1], b"."),
            _one_of(_FIXED_SIZES[2], b".."),
            b"r..[\x00-\x0f]\x00",
            _one_of(_FIXED_SIZES[4], b"...."),
            _one_of(_FIXED_SIZES[8], b"." * 8),
            # Storage keys: every tensor has one, and a call for each would cost as much as all the rest.
            *(b"X" + re.escape(bytes([length])) + b"\x00\x00\x00" + b"[0-9]" * length for length in range(1, 7)),
        )
    )
    + b"){1,1000}",
    re.DOTALL,
)


class _Scan:
    """A scan that came to its end, and the way it took."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.positions = array("I")
        self.tuples = array("I")
        """Counted up to each position."""
        self.end = 0
        self.num_tuples = 0


# The checkpoints of a run differ in a few bytes of their pickles, a step or a loss: the scan of the last one is kept.
_last_scan: _Scan | None = None


def forget_last_scan() -> None:
    """Free what is kept of the last pickle for the next one."""
    global _last_scan  # noqa: PLW0603
    _last_scan = None


def find_pickle_end(content: bytes, begin: int = 0) -> tuple[int, int]:
    """Offset behind the STOP of the pickle that starts at `begin`, and how many tuples it builds at most.

    Raises IncompletePickleError where `content` ends first, and MalformedPickleError for an opcode that no torch
    writes (extension registry, out-of-band buffers), an absurd memo index, or too many tuples.
    """
    global _last_scan  # noqa: PLW0603
    actions = _ACTIONS
    match_run = _RUN.match
    size = len(content)
    last = _last_scan  # once: another thread may forget it meanwhile
    if last is not None and (begin or len(last.content) != size):
        last = None
    trail = _Scan(content)
    position, num_tuples, rejoins_from = begin, 0, size
    if last is not None:
        first_change, rejoins_from = _changed_range(last.content, content)
        # The scan remembers nothing but where it stands: up to the first change it would go the same way again.
        kept = max(0, bisect.bisect_right(last.positions, first_change) - 1)
        trail.positions, trail.tuples = last.positions[:kept], last.tuples[:kept]
        position, num_tuples = last.positions[kept], last.tuples[kept]
    while position < size:
        if last is not None and position >= rejoins_from:
            at = bisect.bisect_left(last.positions, position)
            if at < len(last.positions) and last.positions[at] == position:
                more = num_tuples - last.tuples[at]
                _check_tuples(last.num_tuples + more)
                return last.end, last.num_tuples + more
        trail.positions.append(position)
        trail.tuples.append(num_tuples)
        if run := match_run(content, position):
            position = run.end()
            # Operands are counted along: a little too many, never too few.
            opcodes = run.group()
            num_tuples += len(opcodes) - len(opcodes.translate(None, _TUPLES))
            if position == size:
                break
        opcode = content[position]
        action = actions[opcode]
        position += 1
        if action >= 0:  # an opcode whose operand is cut off, or the one behind a run of a thousand
            position += action
        elif action == _MEMO:
            if position + 4 > size:
                raise IncompletePickleError
            # A pickle cannot have remembered more things than it has bytes; its upper half is enough to tell.
            if content[position + 2] | content[position + 3] << 8 > size >> 16:
                raise MalformedPickleError("a memo index is larger than the pickle")
            position += 4
        elif action == _TUPLE:
            num_tuples += 1
        elif action == _PREFIXED:
            prefix = _LENGTHS[opcode]
            if position + prefix.size > size:
                raise IncompletePickleError
            position += prefix.size + prefix.unpack_from(content, position)[0]
        elif action == _LINES:
            for _ in range(_NUM_LINES[opcode]):
                position = content.find(b"\n", position) + 1
                if position == 0:
                    raise IncompletePickleError
        elif action == _STOP:
            _check_tuples(num_tuples)
            trail.end, trail.num_tuples = position, num_tuples
            if begin == 0 and size <= MAX_KEPT_BYTES:
                _last_scan = trail
            return position, num_tuples
        elif action == _LINE_MEMO:
            position = _check_memo_line(content, position)
        else:
            raise MalformedPickleError(f"opcode 0x{opcode:02x} is none that torch writes")
    raise IncompletePickleError


def _changed_range(one: bytes, other: bytes) -> tuple[int, int]:
    """The first byte in which two texts of one length differ, and the byte behind the last one."""
    changed = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    if not changed:
        return len(one), 0
    return ((changed & -changed).bit_length() - 1) // 8, (changed.bit_length() + 7) // 8


def _check_tuples(num_tuples: int) -> None:
    if num_tuples > MAX_TUPLES:
        raise MalformedPickleError(f"{num_tuples} tuples are more than any table of tensors has")


def _check_memo_line(content: bytes, position: int) -> int:
    end = content.find(b"\n", position) + 1
    if end == 0:
        raise IncompletePickleError
    digits = content[position : end - 1]
    if not digits.isdigit() or len(digits) > 10 or int(digits) > end:
        raise MalformedPickleError("a memo index is no number, or larger than the pickle")
    return end
