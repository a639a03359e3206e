"""One pass over a pickle before it is loaded: bytes in; where it ends and what loading may cost out, or a refusal.

The unpickler is C code that believes the stream: a memo index of four billion makes it touch 32 GiB, a string may claim
2**62 bytes, and hashing a tuple nested a million deep overflows the stack. All of that can be seen beforehand.

So can what a load may cost at most, and where that is too much, it is tried first in a process of its own
(`pickle_trial`). Time explodes in three ways, all by hashing keys, which is one call into C that nothing interrupts:
tuples that hold one another twice, through the memo, unfold to 2**depth parts; tuples and large integers can be made to
have equal hashes, so that n of them take n**2 / 2 comparisons, and numbers to be looked for in the same n places of a
table; and whatever is fetched from the memo, long texts as well, can be copied or compared at every fetch. Real pickles
fetch names and classes, and their tuples become the arguments of a constructor at once. Memory explodes because one
byte makes an object of up to two hundred.
"""

from __future__ import annotations

import bisect
import math
import re
import struct
from array import array
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple


class MalformedPickleError(Exception):
    """The stream is no pickle, or one that builds its tensors in a way no torch does."""


class IncompletePickleError(Exception):
    """The bytes end before the pickle does."""


class PickleScan(NamedTuple):
    """What is known of a pickle before it is loaded."""

    end: int
    """Offset after its STOP."""

    num_tuples: int
    """How many tuples it builds, at most: each may be nested in the one before it, and needs stack then."""

    is_costly: bool
    """Whether loading it might take more than some seconds or hundreds of megabytes."""


# 20000 tensors take 80000; each may be nested in the one before it, and needs stack then (see pickle_trial.py).
MAX_TUPLES = 1_000_000
# Strings, names of classes and loose numbers are passed over one by one: half a microsecond each.
MAX_SLOW_OPERATIONS = 1_500_000
# Of what tensors fetch: one for each dtype, device and key of an optimizer's state.
MAX_WAYS = 100_000
# Of a number written as text, which takes the square of its length to read.
MAX_LINE_DIGITS = 4000

# A pickle above this is scanned anew each time.
MAX_KEPT_BYTES = 16 << 20
# Of a change between two pickles that is compared opcode by opcode.
MAX_CHANGED_BYTES = 64 << 10

# What may be loaded at once. Bytes per byte of the pickle: `}` makes 80 and a place on the stack, a text of which one
# letter is rare takes four per letter, and a tensor of 60 bytes takes 700 with its places in the memo.
MAX_MEMORY_BYTES = 600 << 20
MAX_LOOSE_BYTES = 128 << 20
BYTES_PER_LOOSE_BYTE = 100
BYTES_PER_TEXT_BYTE = 5
BYTES_PER_TENSOR_BYTE = 28
BYTES_PER_SET = 220
# Comparisons and hashes of single values, at a few nanoseconds each.
MAX_HASH_STEPS = 1_000_000_000
# A number's hash is the number, so that n of them can be made to be looked for in n places each: n**2 / 6 steps.
MAX_NUMBERS = 100_000
# Comparing a longer text at each fetch takes more than passing over the fetch.
MAX_NAME_BYTES = 1000

_PREFIXED = -1
_LINES = -2
_PUT = -3
_TUPLE = -4
_STOP = -5
_UNKNOWN = -6
_LINE_PUT = -7
_GET = -8
_LINE_GET = -9
_MEMOIZE = -10
_LONG = -11
_CLASS = -12

_FIXED_SIZES = {
    0: b"(010NQR]})ab\x81\x88\x89\x90\x92deluos" + b"\x8f",
    1: b"K\x80",
    2: b"M",
    4: b"J",
    8: b"G\x95",
}
_LENGTH_FORMATS = {
    "<B": b"UC\x8c",
    "<I": b"XTB",
    "<Q": b"\x8d\x8e\x96",
}
_LINE_COUNTS = {1: b"IFLSVP", 2: b"ci"}
# What these leave on the stack is a text, bytes or a class: fetched from the memo, it costs nothing more.
_NAMES = b"UCXTB\x8c\x8d\x8eSVc"

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
# What makes a number, or calls something that may (a numpy scalar).
_NUMBERS = b"KMJGRo"
_SETS = b"\x8f\x91"
_INDEX_SIZES = {ord("q"): 1, ord("r"): 4, ord("h"): 1, ord("j"): 4}
_TUPLES = b"t\x85\x86\x87\x91"
for _opcodes, _action in (
    (b"qr", _PUT),
    (b"p", _LINE_PUT),
    (b"hj", _GET),
    (b"g", _LINE_GET),
    (b"\x94", _MEMOIZE),
    (_TUPLES, _TUPLE),
    (b"\x8a", _LONG),
    (b"\x93", _CLASS),
    (b".", _STOP),
):
    for _opcode in _opcodes:
        _ACTIONS[_opcode] = _action


def _one_of(opcodes: bytes, operand: bytes = b"") -> bytes:
    return b"[" + re.escape(opcodes) + b"]" + operand


# Most of a table of tensors is opcodes of fixed length, which patterns pass over ten times as fast as a loop. They stop
# at whatever tells what is fetched from the memo: a PUT of the first 256, every GET outside of a tensor, every text. Of
# the memo's indices they take those below four million, which cost little whatever the pickle says. No operand that
# they take is a MEMOIZE, so that these can be counted.
_PUT_PATTERNS = {False: b"r(?!.\x00\x00)..[\x00-\x3f]\x00", True: b"\x94"}
_ANY = b"[^\x94]"
_KEY = b"(?:" + b"|".join(b"X%c\x00\x00\x00[0-9]{%d}" % (n, n) for n in range(1, 7)) + b")"
_SHORT_KEY = b"(?:" + b"|".join(b"\x8c%c[0-9]{%d}" % (n, n) for n in range(1, 7)) + b")"
_NUMBER = b"(?:K" + _ANY + b"|M" + _ANY * 2 + b"|J" + _ANY * 4 + b")"
_SIZES = b"(?:" + _NUMBER + b"(?:\x85|" + _NUMBER + b"(?:\x86|" + _NUMBER + b"\x87))|\\)|\\(" + _NUMBER + b"{4,64}t)"
_FETCH = b"((?:h" + _ANY + b"|j" + _ANY * 4 + b"))"


def _run_pattern(put: bytes) -> re.Pattern[bytes]:
    return re.compile(
        b"(?:"
        + b"|".join(
            (
                _one_of(_FIXED_SIZES[0]),
                put,
                _NUMBER,
                # Neither ends like a REDUCE: what one made is told by the byte before its MEMOIZE.
                b"\x80[^R\x94]",
                b"\x95" + _ANY * 7 + b"[^R\x94]",
                b"G" + _ANY * 8,
                # A tuple that is an argument or a state at once, or a part of one, is never hashed.
                b"(?:[t\x85\x86\x87](?:" + put + b")?){1,3}[RQb\x81]",
                _KEY,
            )
        )
        + b"){1,1000}",  # the bound on the number of repetitions bounds the memory of the match
        re.DOTALL,
    )


def _tensor_pattern(put: bytes) -> re.Pattern[bytes]:
    """What torch writes for a tensor once its classes and words are in the memo; the groups are what is fetched.

    Whatever these are, it leaves one object on the stack, and the tuples in it are arguments.
    """
    sizes = _SIZES + b"(?:" + put + b")?"
    reference = b"\\(" + _FETCH + _FETCH + b"(?:" + _KEY + b"|" + _SHORT_KEY + b")" + put + _FETCH + _NUMBER
    return re.compile(
        _FETCH + b"?" + _FETCH + b"\\(" + reference + b"t" + put + b"Q" + _NUMBER + sizes + sizes
        # Whether it requires gradients, and its hooks: an empty OrderedDict.
        + b"[\x88\x89]" + _FETCH + b"\\)R" + put + b"t" + put + b"R" + put,
        re.DOTALL,
    )  # fmt: skip


_RUNS = {memoizes: _run_pattern(put) for memoizes, put in _PUT_PATTERNS.items()}
_TENSORS = {memoizes: _tensor_pattern(put) for memoizes, put in _PUT_PATTERNS.items()}


class _Kept(NamedTuple):
    """A scan that came to its end, and where it stood on the way."""

    content: bytes
    positions: array[int]
    found: PickleScan


# The checkpoints of a run differ in a few bytes of their pickles, a step or a loss: the scan of the last one is kept.
_last_scan: _Kept | None = None


def forget_last_scan() -> None:
    """Free what is kept of the last pickle for the next one."""
    global _last_scan  # noqa: PLW0603
    _last_scan = None


def scan_pickle(content: bytes, begin: int = 0) -> PickleScan:
    """What is known of the pickle that starts at `begin`.

    Raises IncompletePickleError where `content` ends first, and MalformedPickleError for an opcode that no torch
    writes (extension registry, out-of-band buffers, DUP), an absurd memo index, or too many tuples.
    """
    global _last_scan  # noqa: PLW0603
    last = _last_scan  # once: another thread may forget it meanwhile
    if last is not None and begin == 0 and _differs_in_numbers_alone(last, content):
        return last.found
    scan = _Scan(content, begin)
    found = scan.run()
    if begin == 0 and len(content) <= MAX_KEPT_BYTES:
        _last_scan = _Kept(content, scan.positions, found)
    return found


class _Scan:
    """A scan under way: what it counts."""

    def __init__(self, content: bytes, begin: int) -> None:
        self.content = content
        self.begin = begin
        self.positions = array("I")
        self.memoizes = content[begin : begin + 1] == b"\x80" and content[begin + 1 : begin + 2] >= b"\x04"
        """Whether things are remembered by MEMOIZE (protocol 4), which numbers them itself, or by PUT."""
        self.is_odd = False
        """Whether it does what no pickler does."""
        self.num_tuples = 0
        self.num_loose = 0
        """Tuples that may become keys, and large integers."""
        self.num_numbers = 0
        """Numbers outside of tensors, at most."""
        self.num_sets = 0
        self.loose_bytes = 0
        self.text_bytes = 0
        self.tensor_bytes = 0
        self.num_memoized = 0
        self.names: set[int] = set()
        """Memo indices of texts and classes."""
        self.made: set[int] = set()
        """Memo indices of what constructors made: no tuples, though it may be a number."""
        self.first_puts: set[int] = set()
        """Memo indices below 256 that were filled."""
        self.fetched: Counter[int] = Counter()
        """How often each memo index was fetched outside of tensors."""
        self.tensor_fetches: dict[tuple[bytes | None, ...], int] = {}
        """What tensors fetched, as it is written, and how often."""

    def run(self) -> PickleScan:
        """Scan to the STOP."""
        content, size, actions = self.content, len(self.content), _ACTIONS
        match_run, match_tensor = _RUNS[self.memoizes].match, _TENSORS[self.memoizes].match
        fetches, memoizes = self.tensor_fetches, self.memoizes
        short_fetches = [0] * 256
        runs: list[bytes] = []
        remember = self.positions.append
        position, text_bytes, tensor_bytes, num_tensors = self.begin, 0, 0, 0
        while position < size:
            remember(position)
            opcode = content[position]
            if opcode == 0x68 or opcode == 0x6A:  # noqa: PLR1714  GET: twice as fast as a set
                if tensor := match_tensor(content, position):
                    groups = tensor.groups()
                    count = fetches.get(groups, 0)
                    fetches[groups] = count + 1
                    if not count and len(fetches) > MAX_WAYS:
                        raise MalformedPickleError("no two of its tensors are written alike")
                    end = tensor.end()
                    tensor_bytes += end - position
                    num_tensors += 1
                    if self.memoizes:
                        self.num_memoized += content.count(b"\x94", position, end)
                    position = end
                    continue
                if opcode == 0x68 and position + 1 < size:
                    short_fetches[content[position + 1]] += 1
                    position += 2
                    continue
            elif run := match_run(content, position):
                position = run.end()
                opcodes = run.group()
                runs.append(opcodes)
                if len(runs) == 1000:
                    self._count_operations(b"".join(runs))
                    runs.clear()
                if memoizes:
                    if b"R\x94" in opcodes:
                        self._note_made(opcodes)
                    self.num_memoized += opcodes.count(b"\x94")
                if position == size:
                    break
                continue
            action = actions[opcode]
            position += 1
            if action >= 0:  # an opcode whose operand is cut off, or has a MEMOIZE in it
                position += action
                self.num_numbers += 1
            elif action == _PREFIXED:
                prefix = _LENGTHS[opcode]
                begin = position + prefix.size
                if begin > size:
                    raise IncompletePickleError
                length = prefix.unpack_from(content, position)[0]
                text_bytes += length
                position = begin + length
                if length <= MAX_NAME_BYTES and opcode in _NAMES:
                    position = self._remember_name(position)
            elif action == _STOP:
                self._count_operations(b"".join(runs))
                self.fetched.update({index: count for index, count in enumerate(short_fetches) if count})
                self.tensor_bytes, self.text_bytes = tensor_bytes, text_bytes
                self.num_tuples += 4 * num_tensors
                self.loose_bytes = position - self.begin - tensor_bytes - text_bytes
                if self.loose_bytes > MAX_LOOSE_BYTES:
                    raise MalformedPickleError(f"{self.loose_bytes} bytes beside tensors and texts")
                if self.num_tuples > MAX_TUPLES:
                    raise MalformedPickleError(f"{self.num_tuples} tuples are more than any table of tensors has")
                return PickleScan(position, self.num_tuples, self._is_costly())
            elif action == _UNKNOWN:
                raise MalformedPickleError(f"opcode 0x{opcode:02x} is none that torch writes")
            else:
                position = self._pass_rare(opcode, action, position)
            if len(self.positions) > MAX_SLOW_OPERATIONS:
                raise MalformedPickleError(f"more than {MAX_SLOW_OPERATIONS} texts and names are no table of tensors")
        raise IncompletePickleError

    def _count_operations(self, opcodes: bytes) -> None:
        # Operands are counted along: a little too many, never too few.
        self.num_tuples += len(opcodes) - len(opcodes.translate(None, _TUPLES))
        self.num_numbers += len(opcodes) - len(opcodes.translate(None, _NUMBERS))
        self.num_sets += len(opcodes) - len(opcodes.translate(None, _SETS))

    def _note_made(self, opcodes: bytes) -> None:
        """Remember which memo indices hold what a constructor made: never a tuple, and hashed by its address."""
        index, behind = self.num_memoized, 0
        at = opcodes.find(b"R\x94")
        while at >= 0:
            index += opcodes.count(b"\x94", behind, at + 1)
            behind = at + 1
            self.made.add(index)
            at = opcodes.find(b"R\x94", behind)

    def _pass_rare(self, opcode: int, action: int, position: int) -> int:
        """After the operand of one opcode."""
        content = self.content
        if action in (_PUT, _GET):
            end = position + _INDEX_SIZES[opcode]
            if end > len(content):
                raise IncompletePickleError
            index = int.from_bytes(content[position:end], "little")
            # A pickle cannot have remembered more things than it has bytes.
            if index > len(content):
                raise MalformedPickleError("a memo index is larger than the pickle")
            if action == _GET:
                self.fetched[index] += 1
            else:
                self._note_put(index)
            return end
        if action in (_LINE_PUT, _LINE_GET):
            index, end = _memo_line(content, position)
            if action == _LINE_GET:
                self.fetched[index] += 1
            else:
                self._note_put(index)
                self.is_odd |= index > 0xFF  # protocol 0: what it remembers cannot be told apart quickly
            return end
        if action == _TUPLE:
            self.num_tuples += 1
            self.num_loose += 1
            self.num_sets += opcode in _SETS
            return position
        if action == _MEMOIZE:
            self.is_odd |= not self.memoizes
            self.num_memoized += 1
            return position
        if action == _CLASS:
            return self._remember_name(position)
        if action == _LONG:
            if position >= len(content):
                raise IncompletePickleError
            self.num_loose += content[position] > 8
            self.num_numbers += 1
            return position + 1 + content[position]
        end = position
        for _ in range(_NUM_LINES[opcode]):
            end = content.find(b"\n", end) + 1
            if end == 0:
                raise IncompletePickleError
        if opcode in b"ILF":
            if end - position > MAX_LINE_DIGITS:
                raise MalformedPickleError(f"a number of {end - position} digits")
            self.num_loose += end - position > 18
        self.num_numbers += opcode in b"ILFi"
        return self._remember_name(end) if opcode in _NAMES and end - position <= MAX_NAME_BYTES else end

    def _remember_name(self, position: int) -> int:
        """After what stores the text or class before `position` in the memo, where that follows."""
        opcode = self.content[position : position + 1]
        if self.memoizes:
            if opcode != b"\x94":
                return position
            self.names.add(self.num_memoized)
            self.num_memoized += 1
            return position + 1
        if opcode not in (b"q", b"r"):
            return position
        end = position + (2 if opcode == b"q" else 5)
        if end > len(self.content):
            raise IncompletePickleError
        index = int.from_bytes(self.content[position + 1 : end], "little")
        if index > len(self.content):
            raise MalformedPickleError("a memo index is larger than the pickle")
        self._note_put(index)
        self.names.add(index)
        return end

    def _note_put(self, index: int) -> None:
        self.is_odd |= self.memoizes or index in self.first_puts or index in self.names
        if index < 256:
            self.first_puts.add(index)

    @property
    def _makes_numbers(self) -> bool:
        """Whether a constructor may make a number, which is called `scalar`; escapes may hide the name."""
        return b"scalar" in self.content or b"\\u" in self.content or b"\\U" in self.content

    def _is_costly(self) -> bool:
        memory = (
            self.loose_bytes * BYTES_PER_LOOSE_BYTE
            + self.text_bytes * BYTES_PER_TEXT_BYTE
            + self.tensor_bytes * BYTES_PER_TENSOR_BYTE
            + self.num_sets * BYTES_PER_SET
        )
        if memory > MAX_MEMORY_BYTES:
            return True
        fetched = Counter(self.fetched)
        for groups, count in self.tensor_fetches.items():
            for fetch in groups:
                if fetch is not None:
                    fetched[int.from_bytes(fetch[1:], "little")] += count
        filled_once = self._filled_once(fetched)
        # Everything is unfolded at most this often: each way to a part takes some of the fetches of each thing.
        doublings = 0.0
        num_loose, num_numbers = self.num_loose + 1, self.num_numbers
        for index, count in fetched.items():
            if index in filled_once and index in self.names:
                continue
            if self._makes_numbers or index not in self.made:
                num_numbers += count
            if index in filled_once and index in self.made:
                continue
            num_loose += count
            doublings += math.log2(1 + count) if index in filled_once else count
        # A comparison takes as many steps as there are values in the shorter key: all pairs of n keys take at most
        # n / 2 times the values of all.
        steps = num_loose * (self.loose_bytes + self.tensor_bytes + self.text_bytes // 16) / 2
        return num_numbers > MAX_NUMBERS or doublings > 40 or steps * 2**doublings > MAX_HASH_STEPS

    def _filled_once(self, indices: Collection[int]) -> Collection[int]:
        """Those of some memo indices of which one thing alone can have been fetched."""
        if self.is_odd:
            return ()
        if self.memoizes:
            return indices
        # Patterns pass over the PUTs from 256 on: all that look like one are counted, also within texts.
        found = {index for index in indices if index < 256}
        later = [index for index in indices if index >= 256]
        if len(later) < 8:
            once = [index for index in later if self.content.count(b"r" + index.to_bytes(4, "little")) == 1]
        elif self.content.count(b"r") > MAX_SLOW_OPERATIONS:
            once = []
        else:
            puts = Counter([behind[:4] for behind in self.content.split(b"r")])
            texts = ((index, index.to_bytes(4, "little")) for index in later)
            once = [index for index, text in texts if puts[text] == 1 and b"r" not in text]
        return found.union(once)


def _memo_line(content: bytes, position: int) -> tuple[int, int]:
    """A memo index written as text, and the offset after it."""
    end = content.find(b"\n", position) + 1
    if end == 0:
        raise IncompletePickleError
    digits = content[position : end - 1]
    if not digits.isdigit() or len(digits) > 10 or int(digits) > end:
        raise MalformedPickleError("a memo index is no number, or larger than the pickle")
    return int(digits), end


def _differs_in_numbers_alone(last: _Kept, content: bytes) -> bool:
    """Whether a pickle is the last one but for the values of numbers, which decide nothing here."""
    old = last.content
    if len(old) != len(content):
        return False
    begin, end = _changed_range(old, content)
    if end - begin > MAX_CHANGED_BYTES or end > last.found.end:
        return False
    position = last.positions[max(0, bisect.bisect_right(last.positions, begin) - 1)]
    while position < end:
        behind = _skip_operation(old, position)
        before, now = old[position:behind], content[position:behind]
        if before != now and not (
            before[:1] == now[:1]
            and before[0] in b"KMJG"
            # These bytes are counted wherever they stand.
            and before.translate(None, _NEVER_COUNTED) == now.translate(None, _NEVER_COUNTED)
        ):
            return False
        position = behind
    return True


_NEVER_COUNTED = bytes(set(range(256)) - set(_TUPLES + b"\x94"))


def _changed_range(one: bytes, other: bytes) -> tuple[int, int]:
    """The first byte in which two texts of one length differ, and the byte after the last one."""
    changed = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    if not changed:
        return len(one), 0
    return ((changed & -changed).bit_length() - 1) // 8, (changed.bit_length() + 7) // 8


def _skip_operation(content: bytes, position: int) -> int:
    """After one opcode of a pickle that was scanned, and its operand."""
    opcode = content[position]
    action = _ACTIONS[opcode]
    position += 1
    if action >= 0:
        return position + action
    if action == _PREFIXED:
        prefix = _LENGTHS[opcode]
        return position + prefix.size + int(prefix.unpack_from(content, position)[0])
    if action == _CLASS:
        return position
    if action == _LONG:
        return position + 1 + content[position]
    if opcode in _INDEX_SIZES:
        return position + _INDEX_SIZES[opcode]
    for _ in range(_NUM_LINES.get(opcode, action in (_LINE_PUT, _LINE_GET))):
        position = content.index(b"\n", position) + 1
    return position
