"""Options: what was typed in, the library's arguments out, and what `--help` says of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ckpt_ema.errors import MisuseError
from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES, SizeError, format_size, parse_duration, parse_size

Command = Callable[..., Any]
Option = Callable[[Command], Command]


class _Quantity(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.2
    """A number with a unit, as one of `sizes` reads it."""

    def __init__(self, name: str, parse: Callable[[str], float]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return self._parse(str(value))
        except SizeError as error:
            self.fail(str(error), param, ctx)


_SIZE = _Quantity("SIZE", parse_size)
_DURATION = _Quantity("TIME", parse_duration)


class GivenPath(click.Path):  # type: ignore[type-arg,unused-ignore]
    """A path as it was typed; "" from an unset variable would be the current folder.

    Whether it may be read is told by who reads it.
    """

    def __init__(self) -> None:
        super().__init__(readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; is a variable of your shell not set?", param, ctx)
        return super().convert(value, param, ctx)


class StrictCommand(click.Command):
    """Refuses an option that is given twice where one value counts, and knows momentum by its other name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses twice, first only to see which options were given; raises click.UsageError."""
        try:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        except click.NoSuchOption as error:
            if error.option_name not in ("--decay", "--ema-decay"):
                raise
            text = f"{error.message.rstrip('.')}; a decay of 0.999 is `--momentum 0.001`: momentum = 1 - decay"
            raise click.UsageError(text, ctx) from error
        for option in given:
            takes_one = isinstance(option, click.Option) and not option.multiple and not option.is_flag
            if takes_one and given.count(option) > 1:
                raise click.UsageError(
                    f"`{option.opts[-1]}` is given {given.count(option)} times, and takes one value", ctx
                )
        return super().parse_args(ctx, args)


MEMORY = click.option(
    "--memory",
    "memory_budget_bytes",
    type=_SIZE,
    default=format_size(DEFAULT_MEMORY_BUDGET_BYTES),
    show_default=True,
    help="For all buffers together, beside torch itself.",
)

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_WRITTEN_DTYPE = click.Choice(["student", "float32", "bfloat16", "float16"])


def _interval(text: str) -> Option:
    return click.option("--interval", type=int, default=1, show_default=True, metavar="N", help=text)


def _half_life(text: str, *, multiple: bool) -> Option:
    return click.option("--half-life", type=float, multiple=multiple, metavar="STEPS", help=text)


def run_options(command: Command) -> Command:
    """The options that `fold` and `plan` share."""
    return _with_options(command, {})


def reconstruct_options(command: Command) -> Command:
    """Those of `reconstruct`, which works out itself how to weigh checkpoints."""
    changed = {
        "per": None,
        "between": None,
        "coefficients": None,
        "init": None,
        "at": click.option("--at", type=int, metavar="STEP", help="Step of the wanted teacher.  [default: the newest]"),
        "half-life": _half_life(
            "The momentum in other words: steps after which a share has halved; repeatable.", multiple=True
        ),
        "interval": _interval("The hook's: the wanted teacher was updated every N steps."),
        "profile": click.option(
            "--profile",
            type=click.Choice(["ema", "uniform", "power"]),
            default="ema",
            show_default=True,
            help="How shares fall with age; power needs --sigma-rel.",
        ),
        "average": click.option(
            "--average",
            "averages",
            multiple=True,
            metavar="GLOB=WHAT",
            help="Averages of other tools: '0.*.pt=power:0.05' or 'ema_*=ema:0.001', :N after it where updated every"
            " N steps (powers: as ema-pytorch's update_every); repeatable.",
        ),
        "plan": click.option("--plan", "only_plans", is_flag=True, help="Show what would be done; read no tensor."),
    }
    return _with_options(command, changed)


def follow_options(command: Command) -> Command:
    """Those of `follow`, which takes what comes, and goes on from its own teacher."""
    without = ("profile", "sigma-rel", "coefficients", "init", "last", "output-format", "shard-size")
    changed: dict[str, Option | None] = dict.fromkeys((*without, "interval", "overwrite", "resume", "json", "verbose"))
    changed |= {
        "run": click.argument("run", type=GivenPath()),
        "output": click.option(
            "-o",
            "--output",
            type=GivenPath(),
            help="The teacher.  [default: RUN/teacher.safetensors; RUN/teacher for Hugging Face folders]",
        ),
        "momentum": click.option(
            "--momentum",
            type=float,
            metavar="M",
            help="Share that the student brings at each update, 0 < M < 1.  [default: the teacher's own, else 0.001]",
        ),
        "half-life": _half_life(
            "The momentum in other words: training steps after which a share has halved; implies --per step.",
            multiple=False,
        ),
        "interval": _interval("Per step, update every N steps, as MeanTeacherHook does."),
        "until": click.option(
            "--until",
            "until_step",
            type=int,
            metavar="STEP",
            help="Last step to fold; end when it is there, or was passed.",
        ),
        "idle": click.option(
            "--idle",
            "idle_seconds",
            type=_DURATION,
            metavar="TIME",
            help="End when nothing new was written for so long (90s, 10m, 2h).  [default: never]",
        ),
        "dtype": click.option(
            "--dtype",
            type=_WRITTEN_DTYPE,
            default="student",
            help="Dtype of the teacher.  [default: the student's, float32 where that has 16 bits or changes]",
        ),
    }
    return _with_options(command, changed)


def _with_options(command: Command, changed: dict[str, Option | None]) -> Command:
    """Add a fold's options by name; `changed` ones in their place, or left out, or after them."""
    options: dict[str, Option | None] = {
        "run": click.argument("run", nargs=-1, required=True, type=GivenPath()),
        "output": click.option(
            "-o",
            "--output",
            type=GivenPath(),
            help="The teacher.  [default: RUN/teacher.safetensors; RUN/teacher for Hugging Face folders; for a list of"
            " checkpoints, in their folder]  For several teachers a pattern (teacher-{momentum}.safetensors, or"
            " {half_life}, {sigma_rel}), or a folder.",
        ),
        "momentum": click.option(
            "--momentum",
            type=float,
            multiple=True,
            metavar="M",
            help="Share that the student brings at each update, 0 < M < 1; given several times, as many teachers from"
            " one pass.  [default: 0.001]",
        ),
        "half-life": _half_life(
            "The momentum in other words: training steps after which a share has halved; implies --per step;"
            " repeatable.",
            multiple=True,
        ),
        "per": click.option(
            "--per",
            type=click.Choice(["checkpoint", "step"]),
            help="What momentum works on once: each checkpoint, or each training step, as the hook's does.  [default:"
            " checkpoint]",
        ),
        "interval": _interval(
            "Fold every N-th checkpoint after the first; per step, update every N steps, as MeanTeacherHook does."
        ),
        "between": click.option(
            "--between",
            type=click.Choice(["linear", "hold"]),
            help="Per step: between two checkpoints the student moved in a straight line, or was the newer one all"
            " along.  [default: linear]",
        ),
        "steps-per-epoch": click.option(
            "--steps-per-epoch",
            type=int,
            metavar="N",
            help="Per step, for runs that know epochs only.",
        ),
        "profile": click.option(
            "--profile",
            type=click.Choice(["ema", "uniform", "minus-sqrt", "power"]),
            default="ema",
            show_default=True,
            help="Exponential, plain mean, WSM's merge, or EDM2's power average (per step, with --sigma-rel).",
        ),
        "sigma-rel": click.option(
            "--sigma-rel",
            type=float,
            multiple=True,
            metavar="S",
            help="Width of a power profile relative to the length of training, 0 < S < 0.2886; repeatable.",
        ),
        "coefficients": click.option(
            "--coefficients",
            type=GivenPath(),
            metavar="FILE",
            help='Coefficients given by hand: JSON, {"step_100.pt": 0.5, ...}, or what `plan --json` printed.',
        ),
        "skip-buffers": click.option(
            "--skip-buffers/--no-skip-buffers",
            default=True,
            show_default=True,
            help="Average parameters only, or every floating-point tensor.",
        ),
        "buffer": click.option(
            "--buffer",
            "buffers",
            multiple=True,
            metavar="GLOB",
            help="Tensors that are buffers (quote it: '*.queue'); repeatable.",
        ),
        "model": click.option(
            "--model",
            metavar="MODULE:FACTORY",
            help="Build the model (on the meta device) to learn its buffers exactly.",
        ),
        "init": click.option(
            "--init",
            type=GivenPath(),
            help="Start from this teacher instead of from the first checkpoint.",
        ),
        "from": click.option(
            "--from",
            "from_step",
            type=int,
            metavar="STEP",
            help="First step to fold; epoch, where only epochs are known.",
        ),
        "until": click.option("--until", "until_step", type=int, metavar="STEP", help="Last step to fold."),
        "last": click.option("--last", type=int, metavar="N", help="Fold the newest N checkpoints only."),
        "include": click.option(
            "--include", multiple=True, metavar="GLOB", help="Names of checkpoints to fold; repeatable."
        ),
        "exclude": click.option(
            "--exclude", multiple=True, metavar="GLOB", help="Names of checkpoints to leave out; repeatable."
        ),
        "state": click.option(
            "--state", metavar="KEY", help="State dict inside the checkpoint, as `inspect` lists them."
        ),
        "prefix": click.option("--prefix", help="Sub-model to fold (`student.`), stripped from the names."),
        "accumulate": click.option(
            "--accumulate",
            type=click.Choice(["float32", "float64", "student"]),
            default="float32",
            show_default=True,
            help="Dtype of the running teacher.",
        ),
        "dtype": click.option(
            "--dtype",
            type=_WRITTEN_DTYPE,
            default="student",
            show_default=True,
            help="Dtype of the written teacher; any but `student` folds a run whose precision changes, too.",
        ),
        "output-format": click.option(
            "--output-format",
            type=click.Choice(["safetensors", "dcp"]),
            default="safetensors",
            show_default=True,
            help="dcp: a folder that torch.distributed.checkpoint loads.",
        ),
        "shard-size": click.option(
            "--shard-size",
            "shard_size_bytes",
            type=_SIZE,
            metavar="SIZE",
            help="Write a folder of files of this size with an index, as Hugging Face does (5GB).",
        ),
        "device": click.option(
            "--device",
            default="auto",
            show_default=True,
            help="auto, which measures before a long fold, cpu or cuda[:i].",
        ),
        "memory": MEMORY,
        "overwrite": click.option("--overwrite", is_flag=True, help="Replace an existing teacher."),
        "resume": click.option(
            "--resume",
            is_flag=True,
            help="Go on with a fold that was stopped, if there is one; and keep what this one does if it is stopped.",
        ),
        "json": click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout."),
        "quiet": click.option("-q", "--quiet", is_flag=True, help="No progress, no summary; warnings and errors only."),
        "verbose": click.option("-v", "--verbose", is_flag=True, help="List every tensor and every difference."),
    }
    for option in reversed([option for option in {**options, **changed}.values() if option is not None]):
        command = option(command)
    return command


def or_none(options: dict[str, Any]) -> dict[str, Any]:
    """The library's words for options that may be given several times: nothing, one number, or all of them."""
    for name in ("momentum", "half_life", "sigma_rel"):
        given = options.get(name, ())
        options[name] = None if not given else given[0] if len(given) == 1 else given
    if "averages" in options:
        pairs = [text.rpartition("=") for text in options["averages"]]
        for _, separator, what in pairs:
            if not separator:
                raise MisuseError(f"`--average {what}` names no file", hint=f"pass `--average 'GLOB={what}'`")
        globs = [glob for glob, _, _ in pairs]
        for glob in globs:
            if globs.count(glob) > 1:
                raise MisuseError(f"`--average '{glob}=...'` is given twice", hint="pass it once")
        options["averages"] = {glob: what for glob, _, what in pairs}
    return options
