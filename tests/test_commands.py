"""What people see: plans, inspections, provenance, help and the library's records."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema import FoldOptions, MisuseError, ReconstructOptions
from ckpt_ema.options import FoldKeywords, ReconstructKeywords
from tests.conftest import Outcome, assert_same_bits, hook_teacher, make_student, save_students

Cli = Callable[..., Outcome]
OPTIONS = [
    "--output",
    "--momentum",
    "--half-life",
    "--per",
    "--between",
    "--steps-per-epoch",
    "--profile",
    "--sigma-rel",
    "--coefficients",
    "--interval",
    "--skip-buffers",
    "--no-skip-buffers",
    "--buffer",
    "--model",
    "--init",
    "--from",
    "--until",
    "--last",
    "--include",
    "--exclude",
    "--state",
    "--prefix",
    "--accumulate",
    "--dtype",
    "--device",
    "--memory",
    "--overwrite",
    "--resume",
    "--json",
    "--verbose",
    "--quiet",
]
COMMANDS = ("fold", "plan", "reconstruct", "follow", "inspect", "verify", "compare")
README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("command", ["fold", "follow", "inspect"])
def test_an_option_given_twice_is_not_half_ignored(tmp_path: Path, cli: Cli, command: str) -> None:
    """Where one value counts, a second one is a mistake."""
    save_students(tmp_path / "run", 2)
    outcome = cli(command, tmp_path / "run", "--state", "a", "--state", "b")
    assert outcome.code == 2
    assert "`--state` is given 2 times, and takes one value" in outcome.stderr
    assert not outcome.stdout


def test_a_report_is_printed_in_a_few_lines(tmp_path: Path) -> None:
    """In a notebook the last value of a cell is shown."""
    save_students(tmp_path, 3)
    report = ckpt_ema.fold(tmp_path, momentum=0.3)
    assert repr(report.plan) == f"<FoldPlan: 3 files of {tmp_path} into {tmp_path / 'teacher.safetensors'}>"
    assert len(repr(report)) < 1000


def test_decay_is_told_apart_from_momentum(tmp_path: Path, cli: Cli) -> None:
    """Other tools ask for the share that the teacher keeps."""
    outcome = cli("fold", tmp_path, "--decay", "0.999")
    assert outcome.code == 2
    assert "a decay of 0.999 is `--momentum 0.001`: momentum = 1 - decay" in outcome.stderr


def test_plan_shows_every_coefficient_and_reads_no_tensor(run: Path, cli: Cli) -> None:
    """A plan works on checkpoints whose tensors could not be read: it looks at their tables only."""
    outcome = cli("plan", run, "--momentum", 0.25)
    assert outcome.code == 0
    rows = re.findall(r"^step_\d+\.safetensors +(\d+) +([\d.]+)  [█▏▎▍▌▋▊▉]+$", outcome.stdout, re.MULTILINE)
    assert [int(step) for step, _ in rows] == [100, 200, 300, 400, 500]
    assert sum(float(share) for _, share in rows) == pytest.approx(1, abs=1e-5)
    assert "copy      1 tensor from step_500.safetensors: buffer (known name)" in outcome.stdout
    assert "copy      1 tensor from step_500.safetensors: int64" in outcome.stdout


def test_plan_as_json_says_what_the_text_says(run: Path, cli: Cli) -> None:
    """`plan --json` has the checkpoints, the treatment of the tensors, and bytes that add up."""
    record = json.loads(cli("plan", run, "--momentum", 0.25, "--json").stdout)
    assert [item["step"] for item in record["checkpoints"]] == [100, 200, 300, 400, 500]
    assert record["first_share"] == pytest.approx(0.75**4)
    assert record["copied"]["names"] == {
        "buffer (known name)": ["bn.running_mean"],
        "int64": ["bn.num_batches_tracked"],
    }
    parameters = 4 * (37 * 19 + 37 + 5)
    assert record["bytes_to_read"] == 5 * parameters + 4 * 5 + 8
    assert record["bytes_to_write"] == parameters + 4 * 5 + 8


def test_first_share_is_warned_of_before_reading(run: Path, cli: Cli) -> None:
    """A first checkpoint with more than half of the teacher is named, with a momentum that mends it."""
    outcome = cli("fold", run)
    assert outcome.code == 0
    assert "step_100.safetensors` keeps 99.6% of the teacher" in outcome.stderr
    momentum = re.search(r"`--momentum ([\d.]+)`", outcome.stderr)
    assert momentum is not None
    mended = cli("plan", run, "--momentum", momentum[1], "--json", "--overwrite")
    assert mended.stderr == ""
    assert json.loads(mended.stdout)["first_share"] == pytest.approx(0.1, abs=0.01)


def test_an_inverted_momentum_is_warned_of(run: Path, cli: Cli) -> None:
    """0.999 is most frameworks' share of the teacher; of several, one small momentum shows that the rule is known."""
    outcome = cli("fold", run, "--momentum", 0.999, "-o", "t.safetensors")
    assert outcome.code == 0
    assert (
        "Warning: momentum 0.999 makes the teacher nearly the student: here it is the student's share. Where it is"
        in (outcome.stderr)
    )
    assert "is written `--momentum 0.001` here" in outcome.stderr
    for words in ((0.5,), (0.1, "--momentum", 0.9)):
        outcome = cli("plan", run, "--momentum", *words, "-o", "t-{momentum}.safetensors" if len(words) > 1 else "u")
        assert "nearly the student" not in outcome.stderr


def test_teacher_carries_its_provenance(run: Path, cli: Cli) -> None:
    """The safetensors library finds rule, momentum, checkpoints with coefficients, and `format: pt` in the teacher."""
    path = cli("fold", run, "--momentum", 0.25, "--interval", 2).stdout.strip()
    with safe_open(path, "pt") as teacher:
        metadata = teacher.metadata()
    assert metadata["format"] == "pt"
    record = json.loads(metadata["ckpt_ema"])
    assert (record["tool"], record["version"]) == ("ckpt-ema", ckpt_ema.__version__)
    assert (record["momentum"], record["interval"], record["skip_buffers"]) == (0.25, 2, True)
    assert [(item["name"], item["step"]) for item in record["checkpoints"]] == [
        ("step_100.safetensors", 100),
        ("step_300.safetensors", 300),
        ("step_500.safetensors", 500),
    ]
    assert [item["coefficient"] for item in record["checkpoints"]] == pytest.approx([0.5625, 0.1875, 0.25])
    assert all(item["bytes"] == (run / item["name"]).stat().st_size for item in record["checkpoints"])
    assert record["averaged"]["tensors"] == 3
    assert record["copied"]["names"]["int64"] == ["bn.num_batches_tracked"]
    assert str(run.parent) not in json.dumps(metadata)


def test_inspect_shows_a_checkpoint(tmp_path: Path, cli: Cli) -> None:
    """Format, step, state dicts with their kind, and tensors with dtype and shape."""
    contents = {"model": make_student(1), "model_ema": make_student(2), "iteration": 7, "optimizer": {"state": {}}}
    torch.save(contents, tmp_path / "model_0000007.pth")
    text = cli("inspect", tmp_path / "model_0000007.pth").stdout
    assert re.search(r"^format +torch.save zip", text, re.MULTILINE)
    assert re.search(r"^step +7 \(step inside\)", text, re.MULTILINE)
    assert re.search(r"^state +model: raw, 5 entries +<- folded$", text, re.MULTILINE)
    assert re.search(r"^state +model_ema: average, 5 entries$", text, re.MULTILINE)
    assert re.search(r"^ +fc.weight +float32 +\[37, 19\]$", text, re.MULTILINE)
    record = json.loads(cli("inspect", tmp_path / "model_0000007.pth", "--state", "model_ema", "--json").stdout)
    assert record["chosen"] == "model_ema"
    assert {"name": "fc.weight", "dtype": "float32", "shape": [37, 19]} in record["tensors"]


def test_inspect_shows_where_a_teacher_came_from(run: Path, cli: Cli) -> None:
    """A teacher's page names rule, momentum and checkpoints."""
    path = cli("fold", run, "--momentum", 0.25).stdout.strip()
    text = cli("inspect", path).stdout
    assert "teacher = (1 - momentum) * teacher + momentum * student" in text
    assert re.search(r"^momentum +0.25 per checkpoint", text, re.MULTILINE)
    assert re.search(r"^from +step_500.safetensors +0.250000$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("numbered", "final"),
    [
        ("A/checkpoint-1/model.safetensors", ["A/model.safetensors"]),
        ("A/step_7.safetensors", ["A/model.safetensors", "B/model.safetensors"]),
        ("A/checkpoints/epoch_3.safetensors", ["B/model.safetensors"]),
        ("checkpoint-1/model.safetensors", []),
        ("step_5/unet/diffusion_pytorch_model.safetensors", ["unet/diffusion_pytorch_model.safetensors"]),
    ],
)
def test_a_folder_of_runs_is_no_checkpoint(tmp_path: Path, numbered: str, final: list[str]) -> None:
    """Not even where a final model lies in one of its folders: none of them is meant by the whole, and one is named."""
    folder, other = tmp_path / "all", tmp_path / "model.safetensors"
    for path in (folder / numbered, *(folder / name for name in final), other):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(make_student(1), path)
    looks: list[Callable[[Path], object]] = [
        *(ckpt_ema.inspect, ckpt_ema.verify),
        *(lambda path: ckpt_ema.compare(path, other), lambda path: ckpt_ema.compare(other, path)),
    ]
    for look in looks:
        with pytest.raises(ckpt_ema.MisuseError) as caught:
            look(folder)
        named = re.fullmatch(rf"`{folder}` is no checkpoint: `(.+)` and the like lie below it", caught.value.message)
        assert named is not None, caught.value.message
        assert caught.value.hint == (
            f"pass one of them: `{folder / named[1]}`; for a run directory: `ckpt-ema plan {folder}`"
        )
        assert numbered.startswith(named[1])
        look(folder / named[1])


def test_weights_one_level_down_are_one_checkpoint(tmp_path: Path, cli: Cli) -> None:
    """diffusers' folders: a student beside its average, variants in half precision, parts of a pipeline by number."""
    for folder, names in (
        ("checkpoint-300", ["unet/diffusion_pytorch_model", "unet_ema/diffusion_pytorch_model"]),
        ("variant", ["unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model.fp16"]),
        ("pipeline", ["unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"]),
    ):
        for seed, name in enumerate(names, start=1):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(make_student(seed), tmp_path / folder / f"{name}.safetensors")
        state = "unet" if folder == "pipeline" else None
        assert ckpt_ema.inspect(tmp_path / folder, state=state).chosen == ("" if folder == "variant" else "unet")
        assert ckpt_ema.compare(tmp_path / folder, tmp_path / folder, state=state).is_identical
    compared = cli("compare", "checkpoint-300", "variant/unet/diffusion_pytorch_model.safetensors")
    assert compared.stdout.startswith("identical: 5 tensors"), compared.stderr
    assert cli("verify", "checkpoint-300").code == cli("verify", "variant").code == 0


MODEL_SOURCE = """
import torch

class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(19, 37)
        self.bn = torch.nn.BatchNorm1d(5)
        self.register_buffer("prototypes", torch.zeros(4))
"""


def test_a_model_tells_its_buffers_exactly(tmp_path: Path, cli: Cli) -> None:
    """`--model` finds a buffer that no list of names knows, without a checkpoint's code being run."""
    (tmp_path / "my_models.py").write_text(MODEL_SOURCE)
    students = []
    (tmp_path / "run").mkdir()
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed + 50)
        extra = {"bn.bias": torch.randn(5, generator=generator), "bn.running_var": torch.rand(5, generator=generator)}
        students.append({**make_student(seed), **extra, "prototypes": torch.randn(4, generator=generator)})
        torch.save(students[-1], tmp_path / "run" / f"step_{seed}.pt")
    outcome = cli("fold", "run", "--momentum", 0.3, "--model", "my_models:Student")
    assert outcome.code == 0, outcome.stderr
    buffers = ("bn.running_mean", "bn.running_var", "prototypes")
    assert_same_bits(load_file(tmp_path / outcome.stdout.strip()), hook_teacher(students, 0.3, buffers))


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("my_models", 2, "is not MODULE:FACTORY"),
        ("no_such_module:Student", 2, "ModuleNotFoundError"),
        ("my_models:Teacher", 2, "AttributeError"),
        ("my_models:torch.float32", 2, "cannot be built"),
        ("my_models:Student", 1, "different tensor names"),
    ],
)
def test_a_model_that_does_not_fit_is_an_error(
    tmp_path: Path, run: Path, cli: Cli, model: str, code: int, message: str
) -> None:
    """A model that cannot be built is misuse, one of other tensors a failure; neither is a traceback."""
    (tmp_path / "my_models.py").write_text(MODEL_SOURCE)
    outcome = cli("plan", run, "--model", model)
    assert (outcome.code, "Traceback" in outcome.stderr) == (code, False)
    assert message in outcome.stderr


def test_buffers_named_by_pattern_are_copied(run: Path, cli: Cli) -> None:
    """`--buffer` adds to what is copied; a pattern that matches nothing is an error."""
    record = json.loads(cli("plan", run, "--buffer", "fc.*", "--json").stdout)
    assert record["copied"]["names"]["buffer (`--buffer`)"] == ["fc.bias", "fc.weight"]
    outcome = cli("plan", run, "--buffer", "nothing.*")
    assert outcome.code == 1
    assert "`--buffer nothing.*` matches no tensor" in outcome.stderr


@pytest.mark.parametrize("command", ["fold", "plan", "inspect"])
def test_help_names_every_option_in_words(cli: Cli, command: str) -> None:
    """Every command prints help with examples, and `-h` is `--help`."""
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert f"ckpt-ema {command} " in outcome.stdout
    assert cli(command, "-h").stdout == outcome.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "`--device` is 'gpu', and must be auto, cpu or cuda[:i]"),
        ({"device": "cuda:²"}, "`--device` is 'cuda:²', and must be auto, cpu or cuda[:i]"),
        ({"skip_buffers": "no"}, "`skip_buffers` is 'no', and must be True or False"),
        ({"overwrite": 1}, "`overwrite` is 1, and must be True or False"),
        ({"momentum": "0.1"}, "`momentum` is '0.1', a str"),
        ({"memory_budget_bytes": "64MiB"}, "`memory_budget_bytes` is '64MiB' (str), and must be a whole number"),
    ],
)
def test_options_are_checked_when_they_are_made(options: dict[str, Any], message: str) -> None:
    """Before any run is looked at, with the value that was given."""
    with pytest.raises(MisuseError) as caught:
        ckpt_ema.FoldOptions(**options)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("options", "keywords"), [(FoldOptions, FoldKeywords), (ReconstructOptions, ReconstructKeywords)]
)
def test_every_option_is_a_keyword_that_editors_know(options: type, keywords: type) -> None:
    """`fold(run, mom` completes, and a type checker sees what each keyword takes."""
    assert get_type_hints(keywords) == get_type_hints(options)


@pytest.mark.parametrize("function", ["fold", "follow", "plan", "plan_reconstruction", "reconstruct"])
def test_annotations_can_be_resolved(function: str) -> None:
    """By whatever makes documentation or a command line of them."""
    assert get_type_hints(getattr(ckpt_ema, function))["options"]


def test_numpys_numbers_are_numbers(run: Path) -> None:
    """A momentum out of an array or a sweep."""
    planned = ckpt_ema.plan(run, momentum=[np.float32(0.25), np.float64(0.5)])
    assert [teacher.momentum for teacher in planned.teachers] == [0.25, 0.5]
    assert type(planned.teachers[0].momentum) is float


def test_students_that_changed_are_folded_from_there_by_the_hint(tmp_path: Path, cli: Cli) -> None:
    """The hint names the step from which on they agree, and works as it is typed."""
    save_students(tmp_path / "run", 4)
    for step in (100, 200):
        save_file({"other": torch.ones(2)}, tmp_path / "run" / f"step_{step}.safetensors")
    outcome = cli("plan", tmp_path / "run")
    assert "hint: fold only checkpoints that agree: pass `--from 300` to fold the later ones" in outcome.stderr
    assert cli("plan", tmp_path / "run", "--from", 300).code == 0


def test_help_of_the_whole_has_a_sentence_for_every_command(cli: Cli) -> None:
    """Each command is in its example and has a line of its own that is not cut off, in 80 columns."""
    text = cli("--help").stdout
    examples, _, table = text.partition("Options:")
    for command in COMMANDS:
        assert f"ckpt-ema {command} " in examples
        assert re.search(rf"^  {command} +[A-Z].*\.$", table, re.MULTILINE)
    assert "..." not in table
    assert max(map(len, text.splitlines())) <= 80


def test_every_option_of_the_issue_is_there_and_readme_knows_no_other(cli: Cli) -> None:
    """The README's options exist, and an option that exists is not spelled differently there."""
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(cli(c, "--help").stdout for c in COMMANDS)))
    for option in OPTIONS:
        assert option in known
    used = set()
    for line in README.read_text().splitlines():
        if "ckpt-ema" in line or line.startswith("| "):
            used |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line))
    assert used <= known


def test_public_names_are_one_sorted_list() -> None:
    """`__all__` is sorted, complete, what `dir` offers, and every name in it can be had."""
    assert ckpt_ema.__all__ == sorted(ckpt_ema.__all__) == dir(ckpt_ema)
    for name in ckpt_ema.__all__:
        assert getattr(ckpt_ema, name) is not None
    with pytest.raises(AttributeError):
        ckpt_ema.no_such_name  # noqa: B018


def test_options_that_make_no_sense_are_refused_at_birth() -> None:
    """The library checks what the command line would have checked."""
    for options in ({"momentum": 1.0}, {"interval": 0}, {"dtype": "int8"}, {"accumulate": "float16"}, {"last": 0}):
        with pytest.raises(ckpt_ema.MisuseError):
            ckpt_ema.FoldOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("compare", "it has `a`, `b`, `"),
        ("fold", "`help(ckpt_ema.fold)` and `help(ckpt_ema.FoldOptions)` list its keywords"),
        ("follow", "`help(ckpt_ema.follow)` and `help(ckpt_ema.FoldOptions)` list its keywords"),
        ("inspect", "it has `"),
        ("plan", "`help(ckpt_ema.plan)` and `help(ckpt_ema.FoldOptions)` list its keywords"),
        (
            "plan_reconstruction",
            "`help(ckpt_ema.plan_reconstruction)` and `help(ckpt_ema.ReconstructOptions)` list its keywords",
        ),
        ("reconstruct", "`help(ckpt_ema.reconstruct)` and `help(ckpt_ema.ReconstructOptions)` list its keywords"),
        ("verify", "it has `"),
        ("FoldOptions", "`help(ckpt_ema.FoldOptions)` lists its keywords"),
        ("MeanTeacher", "`help(ckpt_ema.MeanTeacher)` lists its keywords"),
        ("ReconstructOptions", "`help(ckpt_ema.ReconstructOptions)` lists its keywords"),
        ("Snapshots", "it has `directory`, `every`, `"),
    ],
)
def test_a_keyword_that_is_unknown_is_misuse(name: str, hint: str) -> None:
    """Every function and class of the library names itself, the keyword, and what it has instead, if that is short."""
    with pytest.raises(ckpt_ema.MisuseError) as raised:
        getattr(ckpt_ema, name)(nonsense=1)
    assert raised.value.message == f"`{name}` has no keyword `nonsense`"
    assert (raised.value.hint or "").startswith(hint)
    assert "`self`" not in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("name", "keyword", "hint"),
    [
        ("fold", "momentun", "pass `momentum`"),
        ("plan", "until", "pass `until_step`"),
        ("fold", "memory", "pass `memory_budget_bytes`"),
        ("follow", "idle", "pass `idle_seconds`"),
        ("follow", "half_live", "pass `half_life`"),
        ("reconstruct", "average", "pass `averages`"),
        ("verify", "shares", "pass `share`"),
        ("compare", "perfix", "pass `prefix`"),
        ("fold", "decay", "a decay of 0.999 is `momentum=0.001`: momentum = 1 - decay"),
        ("MeanTeacher", "decay", "a decay of 0.999 is `momentum=0.001`: momentum = 1 - decay"),
        ("MeanTeacher", "half_live", "pass `half_life`"),
        ("Snapshots", "ema_decay", "a decay of 0.999 is `momentum=0.001`: momentum = 1 - decay"),
        ("FoldOptions", "memory", "pass `memory_budget_bytes`"),
        ("ReconstructOptions", "average", "pass `averages`"),
    ],
)
def test_the_keyword_that_may_be_meant_is_named(name: str, keyword: str, hint: str) -> None:
    """As people type it: misspelt, without its unit, or as the command or another library has it."""
    with pytest.raises(ckpt_ema.MisuseError) as raised:
        getattr(ckpt_ema, name)(**{keyword: 1})
    assert raised.value.message == f"`{name}` has no keyword `{keyword}`"
    assert raised.value.hint == hint


@pytest.mark.parametrize("name", ["FoldOptions", "MeanTeacher", "ReconstructOptions", "Snapshots"])
def test_a_class_that_looks_at_its_keywords_shows_them(name: str) -> None:
    """Editors and `help` have its own signature."""
    parameters = inspect.signature(getattr(ckpt_ema, name)).parameters
    assert "momentum" in parameters
    assert not {"self", "arguments", "keywords"} & parameters.keys()


def test_library_warns_of_a_dominating_first_checkpoint(tmp_path: Path) -> None:
    """Without a callback for the plan, its warnings are Python warnings."""
    save_students(tmp_path / "run", 3)
    with pytest.warns(UserWarning, match=r"keeps 99\.8% of the teacher"):
        ckpt_ema.fold(tmp_path / "run")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """The progress callback ends at exactly the planned number of bytes, and never goes back."""
    save_students(tmp_path / "run", 4)
    seen: list[tuple[int, int]] = []
    report = ckpt_ema.fold(
        tmp_path / "run", announce=lambda plan: None, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (report.plan.bytes_to_read, report.plan.bytes_to_read)


def test_version_is_said_in_one_place(cli: Cli) -> None:
    """`--version`, the package and its metadata agree."""
    version = importlib.import_module("ckpt_ema._version").__version__
    assert cli("--version").stdout.strip().endswith(version)
    assert ckpt_ema.__version__ == version


def test_overwrite_never_replaces_a_checkpoint(run: Path, cli: Cli) -> None:
    """`--overwrite` is for teachers: a checkpoint, folded or not, stays what it was."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for name in ("step_100.safetensors", "step_500.safetensors"):
        outcome = cli("fold", run, "--last", 3, "-o", run / name, "--overwrite")
        assert outcome.code == 1
        assert "never replaced" in outcome.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_fold_that_averages_nothing_says_so(run: Path, cli: Cli) -> None:
    """When every tensor is a buffer, the teacher is a copy, and that is said."""
    outcome = cli("plan", run, "--momentum", 0.5, "--buffer", "*")
    assert "Warning: nothing is averaged: all 5 tensors are copied from `step_500.safetensors`" in outcome.stderr


@pytest.mark.parametrize("words", [["fold", ""], ["plan", "run", "-o", ""], ["plan", "run", "--init", ""]])
def test_an_empty_path_is_misuse(run: Path, cli: Cli, words: list[str]) -> None:
    """An unset shell variable does not become the current folder."""
    assert cli(*words).code == 2


def test_patterns_given_as_text_are_refused() -> None:
    """A text where patterns are meant would be taken apart into its characters."""
    for name in ("include", "exclude", "buffers"):
        with pytest.raises(ckpt_ema.MisuseError, match="list of patterns"):
            ckpt_ema.FoldOptions(**{name: "best*"})  # type: ignore[arg-type]


def test_a_pipe_that_closes_early_is_no_error(run: Path, tmp_path: Path) -> None:
    """`ckpt-ema plan run | head -1` ends quietly."""
    command = f"{sys.executable} -m ckpt_ema plan {run} --momentum 0.5 -v | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60)
    assert done.stdout.startswith("5 checkpoints of")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("fold run --momentum 0.5 -o t.safetensors", ["t.safetensors"]),
        ("fold run --momentum 0.5 -o t.safetensors --json", ["t.safetensors"]),
        ("fold run --momentum 0.5 --momentum 0.6 -o t{momentum}.safetensors", ["t0.5.safetensors", "t0.6.safetensors"]),
        ("follow run --momentum 0.5 -o t.safetensors --until 500", ["t.safetensors"]),
        ("plan run --momentum 0.5 -v", []),
        ("inspect run/step_100.safetensors", []),
        ("inspect run/step_100.safetensors --json", []),
        ("compare run/step_100.safetensors run/step_200.safetensors", []),
        ("verify run/step_100.safetensors", []),
        ("verify run/step_100.safetensors --json", []),
    ],
)
def test_a_full_stdout_is_told_from_a_full_disk(run: Path, tmp_path: Path, words: str, written: list[str]) -> None:
    """The line could not be printed, and says so; a teacher that is written is not taken for one that failed."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ckpt_ema", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    _, _, told = done.stderr.partition("Error: ")
    lines = [f"  `{name}` is written all the same" for name in written]
    assert told.splitlines() == ["cannot write to stdout: No space left on device", *lines]
    for name in written:
        assert set(load_file(tmp_path / name)) == set(make_student(1))


def test_a_teacher_that_is_nearly_the_newest_checkpoint_is_warned_of(run: Path, cli: Cli) -> None:
    """A momentum that forgets everything between two checkpoints makes no average, and `--per step` is no mend then."""
    outcome = cli("plan", run, "--momentum", 0.5, "--per", "step")
    assert "Warning: `step_500.safetensors` alone is " in outcome.stderr
    assert "a share halves in 1 step, and the newest two checkpoints are 100 steps apart" in outcome.stderr
    [share] = re.findall(r"alone is ([\d.]+)%", outcome.stderr)
    assert float(share) == pytest.approx(99, abs=0.5)  # of a straight line over 100 steps, all but the last one or two
    outcome = cli("plan", run, "--last", 2, "--momentum", 0.2)
    assert "keeps 80.0% of the teacher" in outcome.stderr
    assert "--per step" not in outcome.stderr
    assert cli("plan", run, "--momentum", 0.02, "--per", "step").stderr == ""


def test_per_step_is_not_offered_to_who_asked_for_per_checkpoint(tmp_path: Path, cli: Cli) -> None:
    """The last one of two options would win: the hint would change nothing."""
    save_students(tmp_path / "run", 30)
    assert "--per step" in cli("plan", tmp_path / "run").stderr
    outcome = cli("plan", tmp_path / "run", "--per", "checkpoint")
    assert "keeps " in outcome.stderr
    assert "--per step" not in outcome.stderr


def test_terminals_without_unicode_get_plain_bars(run: Path, cli: Cli) -> None:
    """A latin-1 stdout gets `#` for a bar, and no traceback."""
    outcome = cli("plan", run, "--momentum", 0.5, PYTHONIOENCODING="latin1")
    assert outcome.code == 0
    assert "####" in outcome.stdout


def test_momentum_per_step_is_offered_where_steps_are_known(tmp_path: Path, cli: Cli) -> None:
    """The warning prints the command that mends it, and typed as printed it does."""
    save_students(tmp_path / "run with space", 30)
    outcome = cli("plan", tmp_path / "run with space")
    assert "`--per step` makes it work as in training" in outcome.stderr
    (command,) = re.findall(r"^hint: ckpt-ema (.*)$", outcome.stderr, re.MULTILINE)
    mended = cli(*shlex.split(command))
    assert mended.stderr == ""
    first, newest = re.findall(r"^step_\S+ +\d+ +(\S+)", mended.stdout, re.MULTILINE)[::29]
    # Half a gap of the path lies nearer to each end.
    assert float(first) == pytest.approx(0.999**2850, rel=0.02)
    assert float(newest) == pytest.approx(1 - 0.999**50, rel=0.02)


def test_hints_are_words_of_a_shell_whatever_a_name_holds(run: Path, tmp_path: Path, cli: Cli) -> None:
    """Typed as printed, in a shell: a name with an apostrophe, a star and a space."""
    name = "it's * step_600.pt"
    (run / name).write_bytes(b"half of a checkpoint")
    (run / "step_700.safetensors").write_bytes((run / "step_500.safetensors").read_bytes())
    shown = cli("plan", run, "--momentum", 0.5)
    assert shown.code == 1
    [option] = re.findall(r"leave it out: `(.*)`", shown.stderr)
    words = f"{sys.executable} -m ckpt_ema plan {run} --momentum 0.5 {option} --json"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert [item["step"] for item in json.loads(done.stdout)["checkpoints"]] == [100, 200, 300, 400, 500, 700]


def test_a_model_beside_numbered_files_does_not_hide_them(run: Path) -> None:
    """`model.safetensors` beside `step_N.safetensors` is the final model, not the run."""
    save_file(make_student(9), run / "model.safetensors")
    plan = ckpt_ema.plan(run, momentum=0.5)
    assert [checkpoint.step for checkpoint in plan.checkpoints] == [100, 200, 300, 400, 500]
    assert ("model.safetensors", "the final model, without a step of its own") in plan.left_out


@pytest.mark.parametrize("names", [("500k", "1M", "2M"), ("1e3", "2e4", "5e4")])
def test_steps_with_letters_behind_them_are_unknown(tmp_path: Path, names: tuple[str, ...]) -> None:
    """`step_1M` is not step 1: the command asks for a list instead of guessing an order."""
    for seed, name in enumerate(names):
        save_file(make_student(seed), tmp_path / f"step_{name}.safetensors")
    with pytest.raises(ckpt_ema.CkptEmaError, match="order of the checkpoints"):
        ckpt_ema.plan(tmp_path)


def test_the_mending_command_works_behind_two_dashes(run: Path, cli: Callable[..., Outcome]) -> None:
    """What is added is an option, wherever the paths stand."""
    warned = cli("plan", "--momentum", 0.02, "--", run)
    [hint] = [line for line in warned.stderr.splitlines() if line.startswith("hint: ckpt-ema ")]
    mended = cli(*shlex.split(hint)[2:])
    assert mended.code == 0
    assert "per step" in mended.stdout


def test_the_mending_command_is_the_one_that_was_called(tmp_path: Path) -> None:
    """Also inside another program, whose own words are others."""
    from click.testing import CliRunner

    from ckpt_ema.cli import main

    save_students(tmp_path / "run", 20)
    shown = CliRunner().invoke(main, ["plan", str(tmp_path / "run")])
    assert shown.exit_code == 0
    assert f"hint: ckpt-ema plan --per step {tmp_path / 'run'}\n" in shown.output


def test_without_numpy_there_is_no_word_of_it(tmp_path: Path, run: Path, cli: Cli) -> None:
    """Nothing here needs it, and torch warns at every start where it is missing."""
    numpy = tmp_path / "without" / "numpy"
    numpy.mkdir(parents=True)
    (numpy / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")\n")
    path = os.pathsep.join([str(numpy.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    for words in (["fold", run, "--momentum", 0.3, "-o", "t.safetensors", "-q"], ["verify", "t.safetensors", run]):
        done = cli(*words, PYTHONPATH=path)
        assert (done.code, done.stderr) == (0, "")


def notes_of(text: str) -> list[str]:
    """The notes in what was printed."""
    return [line.removeprefix("note      ") for line in text.splitlines() if line.startswith("note ")]


def test_a_fold_says_what_it_assumes_and_no_other_note(tmp_path: Path, cli: Cli) -> None:
    """What decides the teacher and was not typed is told before a tensor is read; which state dict it is, by `plan`."""
    run = tmp_path / "run"
    run.mkdir()
    for number in (1, 5, 9):
        torch.save({"state_dict" if number < 9 else "model": make_student(number)}, run / f"student_{number}.pt")
    mixed = "the student is `state_dict` of 2 checkpoints, `model` of `student_9.pt`"
    by_name = "the numbers in the names (1 to 9) are taken for training steps"
    done = cli("fold", run, "--half-life", 3, "-o", "t.safetensors")
    assert notes_of(done.stderr) == [mixed, by_name]
    assert done.stderr.index("note ") < done.stderr.index("folded 3")
    assert notes_of(cli("plan", run, "--half-life", 3).stdout) == [mixed, by_name]
    assert cli("fold", run, "--half-life", 3, "-o", "q.safetensors", "-q").stderr == ""
    (run / "student_9.pt").unlink()
    torch.save({"state_dict": make_student(9)}, run / "student_14.pt")
    alike = cli("fold", run, "--momentum", 0.5, "-o", "a.safetensors")
    assert (alike.code, notes_of(alike.stderr)) == (0, [])
    assert notes_of(cli("plan", run, "--momentum", 0.5).stdout) == ["the student is `state_dict` of each checkpoint"]


def test_a_fold_says_by_which_rule_it_continues(tmp_path: Path, cli: Cli) -> None:
    """No momentum was typed: the teacher's own."""
    save_students(tmp_path / "run", 4)
    assert cli("fold", "run", "--until", 200, "--momentum", 0.25, "-o", "early.safetensors").code == 0
    done = cli("fold", "run", "--init", "early.safetensors", "-o", "on.safetensors")
    assert notes_of(done.stderr) == ["continues as `early.safetensors` was made: momentum 0.25 per checkpoint"]


def test_a_reconstruction_says_what_it_assumes(tmp_path: Path, cli: Cli) -> None:
    """That nothing was stored of what lies before or between; not how steps were counted, which `--plan` shows."""
    save_students(tmp_path / "run", 4)
    done = cli("reconstruct", "run", "--half-life", 100, "-o", "t.safetensors")
    told = [
        "no snapshots of an online teacher are here: students alone take part",
        "these teachers begin as the student of step 100: what was before is not stored",
    ]
    assert notes_of(done.stderr) == told
    assert done.stderr.startswith("expected ")
    planned = notes_of(cli("reconstruct", "run", "--half-life", 100, "-o", "p.safetensors", "--plan").stdout)
    assert planned[:2] == told
    assert planned[2].startswith("steps count by how far the student moved")
