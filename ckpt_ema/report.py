"""Plans, reports and inspections as people read them and as JSON: records in, text or plain tables out."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_ema.byte_ranges import count_elements
from ckpt_ema.catalogue import TeacherTensor
from ckpt_ema.inspection import Inspection
from ckpt_ema.plans import FoldPlan, FoldReport
from ckpt_ema.provenance import counting_record, made_record, profile_record
from ckpt_ema.sizes import counted, format_size
from ckpt_ema.teacher_record import TeacherRecord, record_of

if TYPE_CHECKING:  # these import torch, for which a plan must not wait
    from ckpt_ema.comparison import Comparison
    from ckpt_ema.verification import Verification

BAR_WIDTH = 30
MAX_ROWS = 60
MAX_SHOWN = 20


def plan_text(plan: FoldPlan, *, verbose: bool = False) -> str:
    """The plan as a page of text."""
    return "\n".join(_plan_lines(plan, verbose))


def _plan_lines(plan: FoldPlan, verbose: bool) -> Iterator[str]:
    options = plan.options
    yield (
        f"{_inputs(plan)} of {plan.directory}, {_profiles(plan)}"
        f"{f', interval {options.interval}' if options.interval > 1 else ''}"
    )
    yield ""
    yield from _coefficient_table(plan)
    yield ""
    yield from _prediction_lines(plan)
    yield from _note_lines(plan.notes)
    yield f"average   {counted(plan.num_averaged, 'tensor')}, {_elements(plan.tensors, 'average')} elements"
    for reason, tensors in plan.copied.items():
        yield f"copy      {counted(len(tensors), 'tensor')} from {plan.checkpoints[-1].name}: {reason}"
    for reason, names in _grouped(plan.left_out).items():
        yield f"left out  {_some(names, verbose)}: {reason}"
    for reason, names in _grouped(plan.left_out_tensors).items():
        yield f"not used  {_some(names, verbose)}: {reason}"
    yield f"read      {format_size(plan.bytes_to_read)}"
    each = f"{len(plan.teachers)} x " if len(plan.teachers) > 1 else ""
    yield f"write     {each}{format_size(plan.blocks.data_bytes)} to {', '.join(plan.output_names)}"
    threads = counted(plan.blocks.num_threads, "thread")
    yield f"memory    {format_size(plan.buffer_bytes)} of buffers beside torch itself, {threads}"
    if verbose:
        yield ""
        for tensor in plan.tensors:
            dtype = ", ".join(dtype.name for dtype in tensor.student_dtypes)
            if tensor.student_dtypes != (tensor.dtype,):
                dtype += f" -> {tensor.dtype.name}"
            treatment = tensor.action + (f" ({tensor.reason})" if tensor.reason else "")
            yield f"  {tensor.name}  {dtype} {list(tensor.shape)}  {treatment}"


def _inputs(plan: FoldPlan) -> str:
    snapshots = f" and {counted(len(plan.averages), 'snapshot')}" if plan.predictions and plan.averages else ""
    return counted(len(plan.checkpoints), "checkpoint") + snapshots


def announcement_text(plan: FoldPlan) -> str:
    """What is said before anything is read: how near reconstructed teachers are expected to come, what is assumed."""
    return "\n".join((*_prediction_lines(plan), *_note_lines(plan.assumptions)))


def _note_lines(notes: Sequence[str]) -> Iterator[str]:
    for note in notes:
        yield f"note      {note}"


def _prediction_lines(plan: FoldPlan) -> Iterator[str]:
    for number, (teacher, prediction) in enumerate(zip(plan.teachers, plan.predictions, strict=False)):
        used = sorted(
            (item for item in plan.inputs if item.coefficients[number]),
            key=lambda item: -abs(item.coefficients[number]),
        )
        most = ", ".join(f"{item.name} {item.coefficients[number]:.2g}" for item in used[:2])
        yield (
            f"expected  {teacher.profile.title}: {prediction.error:.2g} of the error of {prediction.nearest};"
            f" {counted(len(used), 'file')}, most {most}; sum of |coefficient| {prediction.amplification:.2f}"
        )


def _profiles(plan: FoldPlan) -> str:
    """`momentum 0.1, 0.3 per checkpoint`, `half-life 500 steps, straight lines between checkpoints`."""
    options, profiles = plan.options, [teacher.profile for teacher in plan.teachers]
    words, _, value = profiles[0].title.rpartition(" ")
    values = ", ".join([value, *(profile.title.rpartition(" ")[2] for profile in profiles[1:])])
    if profiles[0].kind == "given":
        return "coefficients given by hand"
    text = f"{words} {values}".strip()
    if plan.predictions:
        return (
            f"reconstructed: {text} steps" if profiles[0].half_life is not None else f"reconstructed: {text} per step"
        )
    if not options.per_step:
        return f"{text} per checkpoint"
    text += " steps" if profiles[0].half_life is not None else " per step"
    return text + (
        ", the newer checkpoint's between two" if options.between == "hold" else ", straight between checkpoints"
    )


def _coefficient_table(plan: FoldPlan) -> Iterator[str]:
    """A row per checkpoint; one teacher gets a bar beside its coefficients, several a column each."""
    what = " (initial teacher)" if plan.initial_teacher is not None else ""
    inputs = [(f"{item.name}{what}", item) for item in plan.averages]
    inputs += [(item.name, item) for item in plan.checkpoints]
    rows = [(name, "" if item.step is None else str(item.step), item.coefficients) for name, item in inputs]
    titles = [teacher.profile.title for teacher in plan.teachers]
    if len(titles) == 1:
        titles = ["coefficient"]
    unit = plan.checkpoints[-1].unit
    name_width = max(len("checkpoint"), *(len(name) for name, _, _ in rows))
    step_width = max(len(unit), *(len(step) for _, step, _ in rows))
    yield f"{'checkpoint':<{name_width}}  {unit:>{step_width}}  " + "  ".join(f"{title:>11}" for title in titles)
    widest = max(abs(shares[0]) for _, _, shares in rows)
    cut = len(rows) - MAX_ROWS
    for i, (name, step, shares) in enumerate(rows):
        if cut > 0 and MAX_ROWS // 2 <= i < MAX_ROWS // 2 + cut:
            if i == MAX_ROWS // 2:
                yield f"... {cut} more"
            continue
        columns = "  ".join(f"{share:>{max(11, len(title))}.6f}" for share, title in zip(shares, titles, strict=True))
        bar = f"  {_bar(abs(shares[0]) / widest)}" if len(shares) == 1 else ""
        yield f"{name:<{name_width}}  {step:>{step_width}}  {columns}{bar}".rstrip()


def _bar(share: float) -> str:
    eighths = round(share * BAR_WIDTH * 8)
    bar = "█" * (eighths // 8)
    return bar + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def _device(report: FoldReport, verbose: bool) -> str:
    """The device, and why it wherever there was a choice."""
    name = "the CPU" if report.device == "cpu" else report.device
    chosen = report.plan.options.device == "auto" and report.device_reason != "no GPU here"
    reasons = [report.device_reason] * (verbose or chosen) + [*report.not_compiled] * verbose
    return f"{name} ({'; '.join(reasons)})" if reasons else name


def summary_text(report: FoldReport, *, verbose: bool = False) -> str:
    """What a fold has done, in a few lines."""
    plan = report.plan
    first = plan.inputs[0].name
    lines = [
        f"folded {_inputs(plan)} into {', '.join(plan.output_names)}",
        f"  {counted(plan.num_averaged, 'tensor')} averaged, {plan.num_copied} copied from {plan.checkpoints[-1].name}",
        f"  {format_size(report.bytes_read)} in {report.seconds:.2f} s on {_device(report, verbose)},"
        f" {report.gigabytes_per_second:.2f} GB/s",
        f"  {', '.join(f'{name} {share:.0%}' for name, share in report.timings.shares().items())}",
    ]
    if report.resumed_bytes:
        lines.append(f"  {format_size(report.resumed_bytes)} more had been read when it was stopped before")
    newest = plan.checkpoints[-1]
    for teacher, share in zip(plan.teachers, newest.coefficients, strict=True):
        if len(teacher.updates) > 1 and not plan.predictions:
            which = f" of {teacher.profile.title}" if len(plan.teachers) > 1 else ""
            lines.append(f"  share in the teacher{which}: {first} {teacher.first_share:.1%}, {newest.name} {share:.1%}")
    if plan.left_out:
        lines.append(f"  left out {len(plan.left_out)}: {_some([name for name, _ in plan.left_out], False)}")
    return "\n".join(lines)


def plan_record(plan: FoldPlan) -> dict[str, Any]:
    """The plan as a table that JSON can hold."""
    several = len(plan.teachers) > 1
    teachers = [
        {"output": str(teacher.output), **profile_record(teacher.profile), **made_record(plan, number)}
        for number, teacher in enumerate(plan.teachers)
    ]
    return {
        **({"teachers": teachers} if several else teachers[0]),
        "rule": plan.teachers[0].profile.rule,
        **counting_record(plan.options),
        "initial_teacher": plan.initial_teacher,
        "averages": [
            {"name": item.name, "step": item.step, "coefficients": list(item.coefficients), "bytes": item.size}
            for item in plan.averages
        ],
        "predictions": [
            {"error": item.error, "nearest": item.nearest, "amplification": item.amplification}
            for item in plan.predictions
        ],
        "checkpoints": [
            {
                "name": item.name,
                "step": item.step,
                "unit": item.unit,
                **({"coefficients": list(item.coefficients)} if several else {"coefficient": item.coefficient}),
                "bytes": item.size,
                "state": item.state_key,
                "format": item.format,
            }
            for item in plan.checkpoints
        ],
        "averaged": {"tensors": plan.num_averaged},
        "copied": {
            "tensors": plan.num_copied,
            "names": {reason: [t.name for t in tensors] for reason, tensors in plan.copied.items()},
        },
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out],
        "left_out_tensors": [{"name": name, "reason": reason} for name, reason in plan.left_out_tensors],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "buffer_bytes": plan.buffer_bytes,
        "threads": plan.blocks.num_threads,
    }


def report_record(report: FoldReport) -> dict[str, Any]:
    """The plan and what came of it, as a table that JSON can hold."""
    return {
        **plan_record(report.plan),
        "device": report.device,
        "device_reason": report.device_reason,
        "not_compiled": list(report.not_compiled),
        "resumed_bytes": report.resumed_bytes,
        "seconds": round(report.seconds, 6),
        "gigabytes_per_second": round(report.gigabytes_per_second, 3),
        "timings": {name: round(share * report.seconds, 6) for name, share in report.timings.shares().items()},
    }


def inspection_record(found: Inspection) -> dict[str, Any]:
    """An inspection as a table that JSON can hold."""
    return {
        "path": str(found.path),
        "format": found.format,
        "bytes": found.size,
        "step": found.step,
        "step_origin": found.step_origin,
        "state_dicts": [{"key": s.key, "kind": s.kind, "entries": s.num_tensors} for s in found.state_dicts],
        "chosen": found.chosen,
        "refusal": found.refusal,
        "tensors": [
            {"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
            for name, tensor in found.tensors.items()
        ],
        # A stranger's may hold what no JSON parser but Python's reads.
        "provenance": json.loads(json.dumps(found.provenance), parse_constant=str),
    }


def inspection_text(found: Inspection, *, verbose: bool = False) -> str:
    """An inspection as a page of text."""
    return "\n".join(_inspection_lines(found, verbose))


def _inspection_lines(found: Inspection, verbose: bool) -> Iterator[str]:
    yield f"{found.path}"
    yield f"format     {found.format}, {format_size(found.size)}"
    yield f"step       {found.step} ({found.step_origin})" if found.step is not None else "step       unknown"
    if found.provenance is None:
        for state in found.state_dicts:
            mark = "  <- folded" if state.key == found.chosen else ""
            where = state.key or "(the checkpoint itself)"
            yield f"state      {where}: {state.kind}, {state.num_tensors} entries{mark}"
    if found.refusal:
        yield f"refused    {found.refusal}"
    if found.provenance is not None:
        yield from _provenance_lines(record_of(found.provenance), verbose)
    if found.tensors:
        dtypes: dict[str, int] = defaultdict(int)
        for tensor in found.tensors.values():
            dtypes[tensor.dtype.name] += 1
        yield f"tensors    {len(found.tensors)}: " + ", ".join(f"{n} {name}" for name, n in sorted(dtypes.items()))
        yield ""
        shown = len(found.tensors) if verbose else MAX_SHOWN
        width = max(len(name) for name in list(found.tensors)[:shown])
        for name, tensor in list(found.tensors.items())[:shown]:
            yield f"  {name:<{width}}  {tensor.dtype.name:<8}  {list(tensor.shape)}"
        if len(found.tensors) > shown:
            yield f"  ... and {len(found.tensors) - shown} more (`-v` shows all)"


def _provenance_lines(record: TeacherRecord, verbose: bool) -> Iterator[str]:
    yield f"teacher    by {record.tool} {record.version}: {record.rule}"
    if record.made == "reconstruct":
        yield (
            f"made       by reconstruct, steps {record.start} to {record.step}, expected error"
            f" {record.predicted_error} of that of {record.nearest}"
        )
    unit = "steps" if record.half_life is not None else f"per {record.per}"
    yield f"{_provenance_profile(record)} {unit}, interval {record.interval}"
    shown = len(record.inputs) if verbose else MAX_SHOWN
    for item in record.inputs[-shown:]:
        yield f"from       {item.name}  {item.coefficient:.6f}"
    if len(record.inputs) > shown:
        yield f"from       ... and {len(record.inputs) - shown} older ones (`-v` shows all)"


def _provenance_profile(record: TeacherRecord) -> str:
    for value, words in ((record.half_life, "half-life"), (record.sigma_rel, "power"), (record.momentum, "momentum")):
        if value is not None:
            return f"{words:<10} {value}"
    return f"profile    {record.profile}"


def comparison_text(found: Comparison, *, verbose: bool = False) -> str:
    """A verdict, a table of the tensors that differ, and what only one of the two has."""
    return "\n".join(_comparison_lines(found, verbose))


def _comparison_lines(found: Comparison, verbose: bool) -> Iterator[str]:
    different = [tensor for tensor in found.tensors if tensor.num_different]
    if found.is_identical:
        recast = sum(tensor.dtypes[0] != tensor.dtypes[1] for tensor in found.tensors)
        dtypes = f"; {recast} of them in another dtype" if recast else ""
        yield f"identical: {counted(len(found.tensors), 'tensor')}, value for value{dtypes}"
    else:
        differ = f"{counted(len(found.tensors), 'tensor')} {'differs' if len(different) == 1 else 'differ'}"
        yield f"{len(different)} of {differ}; relative distance in all {found.relative:.3g}"
    shown = different if verbose else different[:MAX_SHOWN]
    if shown:
        width = max(len("tensor"), *(len(tensor.name) for tensor in shown))
        yield ""
        yield f"{'tensor':<{width}}  relative  largest   elements            dtype and shape"
        for tensor in shown:
            total = count_elements(tensor.shape)
            dtype = " / ".join(dict.fromkeys(tensor.dtypes))
            elements = f"{tensor.num_different} of {total}"
            yield (
                f"{tensor.name:<{width}}  {tensor.relative:<8.2e}  {tensor.largest:<8.2e}  {elements:<18}  {dtype}"
                f" {list(tensor.shape)}"
            )
        if len(different) > len(shown):
            yield f"... and {len(different) - len(shown)} more (`-v` shows all)"
    for where, names in ((found.a, found.only_in_a), (found.b, found.only_in_b)):
        if names:
            yield f"only in {where}: {_some(names, verbose)}"
    for name, one, other in found.reshaped:
        yield f"another shape: {name} is {list(one)} and {list(other)}"


def comparison_record(found: Comparison) -> dict[str, Any]:
    """A comparison as a table that JSON can hold; what is no number there is a text."""
    return {
        "a": str(found.a),
        "b": str(found.b),
        "identical": found.is_identical,
        "relative": _json_number(found.relative),
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtypes": list(tensor.dtypes),
                "relative": _json_number(tensor.relative),
                "largest": _json_number(tensor.largest),
                "different_elements": tensor.num_different,
            }
            for tensor in found.tensors
        ],
        "only_in_a": list(found.only_in_a),
        "only_in_b": list(found.only_in_b),
        "other_shapes": [{"name": name, "a": list(one), "b": list(other)} for name, one, other in found.reshaped],
    }


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def verification_text(found: Verification, *, quiet: bool = False) -> str:
    """A line per check, with what helps below those that failed; `quiet`: of these alone."""
    lines = []
    for check in found.checks:
        has_failed = check.is_ok is False
        if has_failed or not quiet:
            verdict = "failed" if has_failed else "ok" if check.is_ok else "unchecked"
            lines.append(f"{verdict:<9} {check.name}: {check.text}")
        if check.hint and has_failed:
            lines.append(f"          hint: {check.hint}")
    return "\n".join(lines)


def verification_record(found: Verification) -> dict[str, Any]:
    """The checks as a table that JSON can hold."""
    checks = [{"name": item.name, "ok": item.is_ok, "text": item.text} for item in found.checks]
    return {"teacher": str(found.teacher), "ok": found.is_ok, "checks": checks}


def _grouped(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in pairs:
        groups[reason].append(name)
    return dict(groups)


def _some(names: Sequence[str], verbose: bool) -> str:
    shown = names if verbose else names[:4]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _elements(tensors: Sequence[TeacherTensor], action: str) -> str:
    total = sum(count_elements(tensor.shape) for tensor in tensors if tensor.action == action)
    return f"{total:,}"
