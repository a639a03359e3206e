"""One pass over a pickle before it is loaded: bytes in, the pickle's end out, or a refusal.

The unpickler is C code that believes the stream: a memo index of four billion makes it touch 32 GiB, a string may claim
2**62 bytes, and hashing a tuple nested a million deep overflows the stack. All of that can be seen beforehand.
"""

from __future__ import annotations

import struct


class MalformedPickleError(Exception):
    """The stream is no pickle, or one that builds its tensors in a way no torch does."""


class IncompletePickleError(Exception):
    """The bytes end before the pickle does."""


# 20000 tensors take 80000; each may be nested in the one before it, and needs stack then (see torch_save.py).
MAX_TUPLES = 1_000_000

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


def find_pickle_end(content: bytes, begin: int = 0) -> tuple[int, int]:
    """Offset behind the STOP of the pickle that starts at `begin`, and how many tuples it builds.

    Raises IncompletePickleError where `content` ends first, and MalformedPickleError for an opcode that no torch
    writes (extension registry, out-of-band buffers), an absurd memo index, or too many tuples.
    """
    actions = _ACTIONS
    size = len(content)
    position = begin
    num_tuples = 0
    while position < size:
        opcode = content[position]
        action = actions[opcode]
        position += 1
        if action >= 0:
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
            if num_tuples > MAX_TUPLES:
                raise MalformedPickleError(f"{num_tuples} tuples are more than any table of tensors has")
            return position, num_tuples
        elif action == _LINE_MEMO:
            position = _check_memo_line(content, position)
        else:
            raise MalformedPickleError(f"opcode 0x{opcode:02x} is none that torch writes")
    raise IncompletePickleError


def _check_memo_line(content: bytes, position: int) -> int:
    end = content.find(b"\n", position) + 1
    if end == 0:
        raise IncompletePickleError
    digits = content[position : end - 1]
    if not digits.isdigit() or len(digits) > 10 or int(digits) > end:
        raise MalformedPickleError("a memo index is no number, or larger than the pickle")
    return end
