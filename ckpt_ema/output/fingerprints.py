"""What a fold is of: a plan in, a table that JSON can hold out; two of these in, every difference out.

All that decides a bit of the teacher is in it. What decides only how it is made (memory, threads, the device, how the
checkpoints were chosen) is not, so that a fold may go on elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from typing import Any

from ckpt_ema._version import __version__
from ckpt_ema.byte_ranges import SourceFile
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout, Schema
from ckpt_ema.locations import RemotePath
from ckpt_ema.output.teacher_files import TeacherFiles
from ckpt_ema.plans import FoldPlan

WRITTEN_AGAIN = "was written again"

_DECIDES_NO_BIT = frozenset(
    (
        *("memory_budget_bytes", "num_threads", "device", "overwrite", "resume"),
        "init",  # an input, whatever way leads to it
        # What they select is compared itself: `--until` keeps checkpoints out that were saved meanwhile.
        *("include", "exclude", "from_step", "until_step", "last"),
    )
)


def fingerprint(planned: FoldPlan, outputs: Sequence[TeacherFiles]) -> dict[str, Any]:
    """The version of this tool, the options, every input as it is now, and the files to be written."""
    tables: dict[int, bytes] = {}
    table = {
        "version": __version__,
        "options": _options(planned),
        "inputs": [
            {
                "name": item.name,
                # Links lead to one file by many names, on a cluster more often than not.
                "files": [[str(file.path.resolve()), file.size, _version(file)] for file in layout.files],
                "table": _digest_of_table(layout, tables),
            }
            for item, layout in zip(planned.inputs, planned.layouts, strict=True)
        ],
        "updates": [teacher.updates for teacher in planned.teachers],
        "targets": [str(teacher.output.parent.resolve() / teacher.output.name) for teacher in planned.teachers],
        "files": _digest_of_files(outputs),
        "bytes": planned.blocks.data_bytes,
    }
    return _as_read_again(table)


def made_of(planned: FoldPlan, outputs: Sequence[TeacherFiles]) -> dict[str, Any]:
    """What is the same on all machines that fold together: the options, and the files to be written."""
    return _as_read_again({"version": __version__, **_options(planned), "files": _digest_of_files(outputs)})


def _version(file: SourceFile) -> str:
    """Another one also where a file was replaced and its time put back, as `cp -p` and `rsync -t` do."""
    if isinstance(file.path, RemotePath):
        return str(file.version)
    try:
        status = os.stat(file.path)
    except OSError as error:
        raise CkptEmaError(f"`{file.path}` went away before it was folded: {error.strerror}") from error
    return f"{file.version} {status.st_ctime_ns} {status.st_ino}"


def _options(planned: FoldPlan) -> dict[str, Any]:
    options = planned.options
    return {item.name: getattr(options, item.name) for item in fields(options) if item.name not in _DECIDES_NO_BIT}


def _as_read_again(table: Mapping[str, Any]) -> dict[str, Any]:
    """As it is when it was read from a file: no tuples, and texts for paths."""
    as_text: dict[str, Any] = json.loads(json.dumps(table, default=_as_text))
    return as_text


def _as_text(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else os.fspath(value)


def _digest_of_table(layout: Layout, known: dict[int, bytes]) -> str:
    """Of all that a checkpoint's header says: names, dtypes, shapes, and where the bytes lie."""
    schema = layout.schema
    if id(schema) not in known:
        known[id(schema)] = _digest_of_schema(schema)
    digest = sha256(known[id(schema)])
    digest.update(layout.file_indices.tobytes())
    digest.update(layout.begins.tobytes())
    return digest.hexdigest()


def _digest_of_schema(schema: Schema) -> bytes:
    content = (schema.names, [dtype.name for dtype in schema.dtypes], schema.shapes, schema.geometries)
    return sha256(repr((*content, list(schema.firsts))).encode("utf-8", "surrogateescape")).digest()


def _digest_of_files(outputs: Sequence[TeacherFiles]) -> str:
    digest = sha256()
    for files in outputs:
        for name, parts in files.parts:
            digest.update(f"{name} {parts.size}\n".encode("utf-8", "surrogateescape"))
            for offset, content in parts.literals:
                digest.update(offset.to_bytes(8, "little"))
                digest.update(content)
    return digest.hexdigest()


def differences_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for everything in which two fingerprints differ; none where they are equal."""
    told = False
    for line in _told_differences(before, now):
        told = True
        yield line
    if not told and any(before.get(key) != value for key, value in now.items()):
        yield "the plan is another one"


def _told_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before.get("version") != now["version"]:
        yield f"ckpt-ema {before.get('version')} became {now['version']}"
    options = _table(before.get("options"))
    for name, value in now["options"].items():
        if options.get(name) != value:
            yield f"{name.replace('_', '-')}: {_shown(options.get(name))} became {_shown(value)}"
    if before.get("targets") != now["targets"]:
        yield f"the output: {_shown(before.get('targets'))} became {_shown(now['targets'])}"
    given = before.get("inputs")
    old = (
        {item["name"]: item for item in given if isinstance(item, dict) and isinstance(item.get("name"), str)}
        if (isinstance(given, list))
        else {}
    )
    new = {item["name"]: item for item in now["inputs"]}
    for name, item in new.items():
        if name not in old:
            yield f"{name}: is new"
        elif change := _change_of_input(old[name], item):
            yield f"{name}: {change}"
    yield from (f"{name}: takes no part any more" for name in old if name not in new)


def differences_of_ranks(first: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """A line for everything in which two ranks were told to make something else (see `made_of`)."""
    return [
        f"{name.replace('_', '-')}: {_shown(first.get(name))} there, {_shown(value)} here"
        for name, value in own.items()
        if first.get(name) != value
    ]


def _change_of_input(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What became of one checkpoint, the most telling thing of it; "" where nothing did."""
    change = "" if before.get("files") == now["files"] else _change_of_files(before.get("files"), now["files"])
    if change in ("", WRITTEN_AGAIN) and before.get("table") != now["table"]:
        return "its header became another one"
    return change


def _change_of_files(before: Any, now: Sequence[Sequence[Any]]) -> str:
    old = (
        {file[0]: file for file in before if isinstance(file, list) and len(file) == 3}
        if (isinstance(before, list))
        else {}
    )
    for path, size, version in now:
        if path not in old:
            return f"lies at `{path}` now"
        if old[path][1] != size:
            return f"size {old[path][1]} became {size}"
        if old[path][2] != version:
            return WRITTEN_AGAIN
    return "has fewer files"


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
