"""Whether a teacher is what it says: its file in, and the run it was folded from; one check after the other out."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.averages.profiles import SMALLEST_COEFFICIENT
from ckpt_ema.byte_ranges import InputFile, SourceFile, TensorRange, count_elements, open_input, read_exactly
from ckpt_ema.coefficients import MAX_COEFFICIENT
from ckpt_ema.dtypes import BY_NAME, DType, is_rounded
from ckpt_ema.engine import cpu
from ckpt_ema.engine.contract import NonFiniteBlockError, Task
from ckpt_ema.engine.distance import distance_of, first_not_finite, last_place_of, length_of, shown_element
from ckpt_ema.engine.inputs import InputFiles
from ckpt_ema.engine.streams import Streams
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.inspection import Inspection, inspect
from ckpt_ema.keywords import refuses_unknown_keywords
from ckpt_ema.layouts import SchemaPool, compact_layout
from ckpt_ema.locations import as_path
from ckpt_ema.options import PathLike
from ckpt_ema.output.folder_faults import fault_of_folder
from ckpt_ema.plans import FoldPlan
from ckpt_ema.provenance import teacher_metadata
from ckpt_ema.replanning import SHARE_TOLERANCE, check_listed, is_exact, plan_again
from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES, counted, format_size
from ckpt_ema.teacher_record import TeacherRecord, read_record, record_of

MIN_BLOCKS = 16
"""That a sample has at least."""

SMALL_BYTES = 1 << 16
"""Of a tensor whose inputs are looked at before it is called another one."""

FLOAT32 = BY_NAME["float32"]

SUM_TOLERANCE = 1e-6
"""By which coefficients may miss 1."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    """`structure`, `finite`, `provenance` or `recomputed`."""

    is_ok: bool | None
    """None where it cannot be looked at, and nothing is known to be wrong."""

    text: str
    """What was found."""

    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found of a teacher."""

    teacher: Path
    checks: tuple[Check, ...]
    """In the order in which they were made; after a structure that fails there are no others."""

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong with it, as far as was looked."""
        return all(check.is_ok is not False for check in self.checks)


@refuses_unknown_keywords()
def verify(
    teacher: PathLike,
    run: PathLike | None = None,
    *,
    share: float = 0.05,
    seed: int | None = None,
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
) -> Verification:
    """Check a teacher's structure, that its numbers are finite, and what it says of itself.

    With `run`, the folder of the checkpoints it was folded from, a random `share` of its blocks (0 < share <= 1, at
    least 16 of them, chosen by `seed`) is folded again and compared bit for bit; of a teacher whose record says that it
    was made in parts, which cost last digits, up to what these can have cost at most: twice the epsilon of what it was
    computed in for each later update of what a checkpoint brings, relative and per block, and the epsilon of each
    dtype that it was written in on the way; a last bit that flipped is not seen there. Of a teacher whose beginning no
    run can tell, that check is neither passed
    nor failed. Buffers take up to `memory_budget_bytes`. Raises MisuseError for what is not there and for options that
    make no sense; all else is found, not raised.
    """
    if not 0 < share <= 1:
        raise MisuseError(f"`--share` is {share}, and must be above 0 and at most 1")
    if memory_budget_bytes < 1:
        raise MisuseError(f"`memory_budget_bytes` is {memory_budget_bytes}, and must be 1 or more")
    path = as_path(teacher)
    if run is not None and not as_path(run).is_dir():
        raise MisuseError(f"`{run}` is no folder", hint="pass the run directory that the teacher was folded from")
    try:
        found = inspect(path)
    except MisuseError:
        raise
    except CkptEmaError as error:
        return Verification(path, (Check("structure", False, _whole(error), error.hint),))
    if found.refusal or not found.tensors:
        return Verification(path, (Check("structure", False, found.refusal or "it holds no tensors"),))
    record = record_of(found.provenance)
    copied = record.copied_names
    checks = [
        _carried_out("structure", lambda: _check_structure(found, is_own=bool(record.table))),
        _carried_out("finite", lambda: _check_finite(found, copied, memory_budget_bytes)),
        _check_provenance(found, record),
    ]
    if run is not None:
        from_run = as_path(run)
        checks.append(
            _carried_out(
                "recomputed",
                lambda: _check_against(found, record, from_run, share, seed, memory_budget_bytes),
            )
        )
    return Verification(path, tuple(checks))


def _carried_out(name: str, look: Callable[[], Check]) -> Check:
    """What came of a check; a failed one where the file cannot be read to its end."""
    try:
        return look()
    except CkptEmaError as error:
        return Check(name, False, _whole(error), error.hint)


def _whole(error: CkptEmaError) -> str:
    return "; ".join([error.message, *error.details[:5]])


def _check_structure(found: Inspection, *, is_own: bool) -> Check:
    """Whether every library finds the same tensors at `found`."""
    wrong = fault_of_folder(found) if is_own and found.path.is_dir() else None
    if wrong is not None:
        return Check("structure", False, wrong)
    return Check("structure", True, f"{counted(len(found.tensors), 'tensor')}, {format_size(_num_bytes(found))}")


def _num_bytes(found: Inspection) -> int:
    return sum(count_elements(tensor.shape) * tensor.dtype.itemsize for tensor in found.tensors.values())


def _check_finite(found: Inspection, copied: frozenset[str], memory_budget_bytes: int) -> Check:
    layout = compact_layout(found.tensors, SchemaPool())
    with Streams([layout], memory_budget_bytes) as streams:
        for index, name in enumerate(layout.schema.names):
            if layout.schema.dtypes[index].kind == "integer":
                continue
            for begin, (elements,) in streams.portions(index):
                if (bad := first_not_finite(elements, may_be_infinite=name in copied)) is not None:
                    element, value = bad
                    return Check("finite", False, f"`{name}` holds {value} at element {begin + element}")
    infinities = " (copied ones may be infinite)" if copied else ""
    return Check("finite", True, f"every number of every tensor{infinities}")


def _check_provenance(found: Inspection, record: TeacherRecord) -> Check:
    if not record.table:
        # Not that it is somebody else's: what a model's own `save_pretrained` writes of a teacher has no record either.
        return Check("provenance", None, "none: nothing in it says how it was made, so nothing else can be checked")
    if record.unreadable:
        return Check("provenance", False, f"its record has {record.shown(record.unreadable[0])}")
    if record.made is None:
        return Check("provenance", True, "written by an online teacher")
    shares = [past.coefficient for past in record.inputs]
    # The sum of numbers beyond all bounds raises.
    total = math.fsum(shares) if all(abs(share) < MAX_COEFFICIENT for share in shares) else math.inf
    if not abs(total - 1) <= SUM_TOLERANCE:
        return Check("provenance", False, f"its {len(shares)} coefficients sum to {total:g}, not to 1")
    if record.parts > max(1, len(record.checkpoints)):
        return Check("provenance", False, f"it tells of {record.parts} parts, and of {len(shares)} files")
    copied = record.copied_names
    if record.num_averaged != len(found.tensors) - len(copied) or not copied <= found.tensors.keys():
        return Check(
            "provenance",
            False,
            f"it tells of {record.num_averaged} averaged and {len(copied)} copied tensors, and the file has"
            f" {len(found.tensors)}",
        )
    made = "folded" if record.made == "fold" else "reconstructed"
    return Check("provenance", True, f"{made} by {record.tool} {record.version} from {counted(len(shares), 'file')}")


def _check_against(
    found: Inspection,
    record: TeacherRecord,
    run: Path,
    share: float,
    seed: int | None,
    memory_budget_bytes: int,
) -> Check:
    why = None
    if not record.table:
        why = "nothing in it says how it was made"
    elif record.made is None:
        why = "an online teacher saw the student of every step"
    elif not record.checkpoints:
        return Check("recomputed", False, "cannot be done: its list of checkpoints cannot be read")
    elif record.initial_teacher is not None:
        check_listed(record, run)
        why = f"it goes on from `{record.initial_teacher}`"
    if why is not None:
        return Check("recomputed", None, f"cannot be done from a run alone: {why}")
    planned = plan_again(found, record, run, memory_budget_bytes)
    _check_told(record, planned)
    return _recompute(found, planned, record.copied_names, _tolerance_of(record, planned), share, seed)


@dataclass(frozen=True, slots=True)
class _Tolerance:
    """How far a right teacher may be from the one that is made again."""

    why: str
    """What rounds, for people."""

    updates: float
    """How often what is in the teacher was rounded, in the mean, in the fold and in its parts together."""

    others: Mapping[str, Sequence[tuple[float, DType]]]
    """By the students' dtypes, the last places of other ones that it may be off besides, and how many of each."""

    left_out: float
    """Of shares too small to be recorded, what they may have in all."""

    def of(self, norm: float, num_elements: int, dtype: DType, students: Sequence[DType]) -> tuple[float, float]:
        """How far elements of `dtype` may be from others of length `norm`: in proportion to that, and whatever it is.

        A last place is a part of a number, by the dtype's epsilon, and below the smallest normal one always the same.
        Where all roundings go one way, as they do for equal numbers at equal gaps, they add up.
        """
        computed_in = dtype if dtype.itemsize >= FLOAT32.itemsize else FLOAT32
        places = [(1.0, dtype), (self.updates, computed_in)]
        places += itertools.chain.from_iterable(self.others.get(student.name, ()) for student in students)
        relative, absolute = self.left_out, 0.0
        for count, each in places:
            epsilon, smallest = last_place_of(each)
            relative += count * epsilon
            absolute += count * smallest
        return relative * norm, absolute * math.sqrt(num_elements)


def _tolerance_of(record: TeacherRecord, planned: FoldPlan) -> _Tolerance | None:
    """None for bit for bit."""
    parts = min(record.parts, len(record.checkpoints))
    is_same = is_exact(planned, record)
    if is_same and parts == 1:
        return None
    why = f"its {parts} parts" if parts > 1 else "its recorded coefficients"
    left_out = 0.0 if is_same else SMALLEST_COEFFICIENT  # what a part still had, and one at once leaves out
    # Every later update rounds what an input brings: the product, the sum and the share that it is multiplied with.
    latest_first = reversed(planned.inputs)
    updates = 2 * sum(abs(item.coefficients[0]) * later for later, item in enumerate(latest_first, start=1))
    others: dict[str, list[tuple[float, DType]]] = {}
    for (student, written), share in record.rounded_to.items():
        if written in BY_NAME:
            others.setdefault(student, []).append((share, BY_NAME[written]))
    if planned.options.accumulate == "student":
        for dtype in {tensor.student_dtype for tensor in planned.tensors if tensor.action == "average"}:
            others.setdefault(dtype.name, []).append((math.sqrt(len(record.checkpoints)), dtype))
    return _Tolerance(why, updates, others, left_out)


def _check_told(record: TeacherRecord, planned: FoldPlan) -> None:
    """Raise CkptEmaError where a record says of its rule what the plan of the same fold does not."""
    if record.made != "fold" or record.earlier_rules:
        return
    again = read_record(teacher_metadata(planned, 0))
    share, shown = (math.nan if told.first_share is None else told.first_share for told in (record, again))
    is_near = math.isclose(share, shown, rel_tol=SHARE_TOLERANCE)
    for name, is_same in (("rule", record.rule == again.rule), ("first_share", is_near)):
        if not is_same:
            raise CkptEmaError(f"its record says {record.shown(name)}, and the fold {getattr(again, name)!r}")


def _recompute(
    found: Inspection,
    planned: FoldPlan,
    copied: frozenset[str],
    tolerance: _Tolerance | None,
    share: float,
    seed: int | None,
) -> Check:
    """Fold a sample of the blocks again, and compare."""
    blocks = list(planned.blocks.blocks())
    seed = random.randrange(1 << 32) if seed is None else seed
    chosen = random.Random(seed).sample(blocks, min(len(blocks), max(MIN_BLOCKS, math.ceil(share * len(blocks)))))
    chosen.sort(key=lambda block: block.position)
    with (
        InputFiles(planned.layouts, planned.blocks.thread_buffers.answer) as files,
        _Judge(found, planned, copied, tolerance) as judge,
    ):
        task = Task(planned.blocks, planned.layouts, [planned.teachers[0].updates], files)
        try:
            cpu.fold_blocks(task, [judge], lambda num_bytes: None, chosen)
        except _DifferentError as difference:
            return Check("recomputed", False, str(difference), _hint_of_rounding(planned))
        except NonFiniteBlockError as error:
            name = next(tensor.name for tensor in planned.tensors if tensor.index == error.origin.tensor)
            return Check("recomputed", False, f"`{name}` of the run is not finite")
        files.check_unchanged()
    for name, (text, distance) in judge.doubtful.items():
        norm = _norm_of_inputs(planned, name)
        # Of a few numbers the roundings may all go one way.
        num_elements = count_elements(found.tensors[name].shape)
        length = norm * max(1.0, math.sqrt(len(planned.inputs) / num_elements))
        if not judge.is_near(name, distance, length, num_elements):
            return Check("recomputed", False, text, _hint_of_rounding(planned))
    part = sum(block.end_position - block.position for block in chosen) / max(1, planned.blocks.data_bytes)
    what = f"{len(chosen)} of {len(blocks)} blocks ({part:.1%}, `--seed {seed}`)"
    if len(chosen) == len(blocks):
        what = "all of it"
    how = "bit for bit"
    if judge.differs and tolerance is not None:
        how = f"up to the rounding of {tolerance.why}"
        if judge.largest:
            how += f" (relative distance {judge.largest:.1e} at most)"
    return Check("recomputed", True, f"{what} from {counted(len(planned.inputs), 'file')}, {how}")


def _norm_of_inputs(planned: FoldPlan, name: str) -> float:
    """The lengths of a tensor in all inputs, by what each brings: the rounding of a sum is in proportion to these."""
    index = next(tensor.index for tensor in planned.tensors if tensor.name == name)
    norm = 0.0
    for item, layout in zip(planned.inputs, planned.layouts, strict=True):
        with Streams([layout], planned.options.memory_budget_bytes) as streams:
            length = math.hypot(*(length_of(elements) for _, (elements,) in streams.portions(index)))
        norm += abs(item.coefficients[0]) * length
    return norm


def _hint_of_rounding(planned: FoldPlan) -> str | None:
    """What to do where a teacher may be right and yet differ: the record of one in parts is that of one at once."""
    if not any(
        lane.action == "average" and is_rounded(lane.accumulate_dtype, lane.dtype) for lane in planned.blocks.lanes
    ):
        return None
    return (
        "a teacher that was continued (`--init`, `follow`) was rounded each time, and is only near the fold of all"
        " at once: fold again, and `ckpt-ema compare` the two"
    )


class _DifferentError(Exception):
    """The teacher's file holds something else."""


class _Judge:
    """A Teacher that compares what it is given with what the file holds."""

    def __init__(
        self, found: Inspection, planned: FoldPlan, copied: frozenset[str], tolerance: _Tolerance | None
    ) -> None:
        self._copied = copied
        self._tolerance = tolerance
        # The teacher's own, and its students'.
        self._dtypes = {
            tensor.name: (found.tensors[tensor.name].dtype, tensor.student_dtypes) for tensor in planned.tensors
        }
        self.differs = False
        """Whether any block is not equal, where rounding is allowed for."""
        self.largest = 0.0
        """The largest relative distance of these, but of the smallest numbers, whose last place is no part of them."""
        self.doubtful: dict[str, tuple[str, float]] = {}
        """Small tensors that are further apart than that, for their own length: what was found, and how far.
        They may be the small difference of large numbers."""
        self._ranges: list[tuple[int, int, str, TensorRange]] = []
        for name, (begin, end) in planned.blocks.offsets.items():
            stored = found.tensors[name]
            if not isinstance(stored, TensorRange) or stored.strides is not None:
                raise CkptEmaError(f"`{name}` is stored in pieces, which no teacher of ckpt-ema is")
            if begin < end:
                self._ranges.append((begin, end, name, stored))
        self._ranges.sort(key=operator.itemgetter(0))
        self._files: dict[SourceFile, InputFile] = {}

    def __enter__(self) -> _Judge:
        with contextlib.ExitStack() as stack:
            for _, _, _, stored in self._ranges:
                if stored.file not in self._files:
                    file = self._files[stored.file] = open_input(stored.file.path)
                    stack.callback(file.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, block: memoryview, position: int) -> None:
        """Compare `block` with the bytes at `position` of the data section; raises _DifferentError."""
        stop = position + len(block)
        place = bisect.bisect_right(self._ranges, position, key=operator.itemgetter(0)) - 1
        for begin, end, name, stored in itertools.islice(self._ranges, max(0, place), None):
            first, last = max(begin, position), min(end, stop)
            if first >= last:
                break
            held = read_exactly(self._files[stored.file], last - first, stored.begin + first - begin)
            made = bytes(block[first - position : last - position])
            if held == made:
                continue
            text = _first_difference(name, stored.dtype, first - begin, held, made)
            if self._tolerance is None or name in self._copied:
                raise _DifferentError(text)
            apart = distance_of(held, made, stored.dtype)
            num_elements = len(made) // stored.dtype.itemsize
            if self.is_near(name, apart.distance, apart.norm, num_elements):
                continue
            if len(made) == end - begin <= SMALL_BYTES:
                self.doubtful[name] = (text, apart.distance)
            else:
                raise _DifferentError(text)

    def is_near(self, name: str, distance: float, norm: float, num_elements: int) -> bool:
        """Whether rounding may have made so many elements of a tensor differ from others of length `norm`."""
        if self._tolerance is None:
            return False
        relative, absolute = self._tolerance.of(norm, num_elements, *self._dtypes[name])
        if not distance <= relative + absolute:
            return False
        self.differs = True
        if relative > absolute:
            self.largest = max(self.largest, distance / norm)
        return True


def _first_difference(name: str, dtype: DType, offset: int, held: bytes, made: bytes) -> str:
    at = next(i for i, (one, other) in enumerate(zip(held, made, strict=True)) if one != other) // dtype.itemsize
    one, other = (
        shown_element(content[at * dtype.itemsize : (at + 1) * dtype.itemsize], dtype) for content in (held, made)
    )
    return f"`{name}` holds {one} at element {offset // dtype.itemsize + at}, and the fold makes {other}"
