"""The command line: words in, calls of the library, text or JSON out. The only module that prints or exits."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import queue
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import click

import ckpt_ema
from ckpt_ema._version import __version__
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES, SizeError, counted, format_size, parse_duration, parse_size

if TYPE_CHECKING:
    from tqdm import tqdm

    from ckpt_ema.records import FoldPlan, FoldReport

# `ckpt_ema.report` and the library are imported by the command that needs them: `--help` must not wait for them.

Command = Callable[..., Any]


class _Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.2
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(str(value))
        except SizeError as error:
            self.fail(str(error), param, ctx)


class _Duration(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_duration(str(value))
        except SizeError as error:
            self.fail(str(error), param, ctx)


class _ProgressBar:
    """A tqdm bar over bytes on stderr; silent unless `shown`."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> _ProgressBar:
        return self

    def update(self, done: int, total: int) -> None:
        """Draw the bar at `done` of `total` bytes."""
        if not self._shown:
            return
        if self._bar is None:
            from tqdm import tqdm  # noqa: PLC0415  (30 ms that `--help` must not wait for)

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="folding", leave=False, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class _Path(click.Path):  # type: ignore[type-arg,unused-ignore]
    """A path that is there: "" from an unset variable would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; is a variable of your shell not set?", param, ctx)
        return super().convert(value, param, ctx)


def _or_none(options: dict[str, Any]) -> dict[str, Any]:
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


def _errors_become_exits(command: Command) -> Command:
    """Print a CkptEmaError with its hint instead of a traceback: exit 1 failed, 2 misused."""

    @wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        _prepare_streams()
        with _signals_raise():
            try:
                _run(command, arguments, options)
            except SystemExit as end:
                _leave_if_among_ranks(end.code)
                raise

    return wrapped


def _leave_if_among_ranks(code: Any) -> None:
    """End a rank at once that failed: all is said, and torch's store may abort a process that ends in order."""
    ranks = sys.modules.get("ckpt_ema.ranks")
    if ranks is not None and ranks.has_met_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _run(command: Command, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    try:
        command(*arguments, **options)
    except CkptEmaError as error:
        shown = len(error.details) if options.get("verbose") else 10
        _tell(f"Error: {error.message}")
        for line in error.details[:shown]:
            _tell(f"  {line}")
        if len(error.details) > shown:
            _tell(f"  ... and {len(error.details) - shown} more (`-v` shows all)")
        if error.hint:
            _tell(f"\nhint: {error.hint}")
        sys.exit(2 if isinstance(error, MisuseError) else 1)
    except _StoppedError as stop:
        _tell("Stopped; no unfinished teacher was written" if "output" in options else "Stopped")
        sys.exit(stop.exit_code)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        _tell(f"Error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        sys.exit(1)


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may be bytes that are no text, and terminals may know no bars.
            stream.reconfigure(errors=_NAMES if _is_utf8(stream) else "backslashreplace")


def _is_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


_NAMES = "names"
"""How texts become bytes: those of a file name as they were, and half a letter in a checkpoint as `\\ud800`."""


def _encode_surrogate(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    number = ord(error.object[error.start])
    is_byte = 0xDC80 <= number <= 0xDCFF
    return bytes([number - 0xDC00]) if is_byte else f"\\u{number:04x}", error.start + 1


codecs.register_error(_NAMES, _encode_surrogate)


def _tell(text: str) -> None:
    """Print on stderr, as `_print`."""
    click.echo(_printable(text), err=True)


def _print(text: str) -> None:
    """Print on stdout what a checkpoint or a person named: no control character but the line feeds of our tables."""
    text = _printable(text)
    if not _is_utf8(sys.stdout):
        text = text.translate(dict.fromkeys(map(ord, "█▉▊▋▌▍▎▏"), "#"))
    _hand_over(text)


def _print_json(record: Any, written: Sequence[str] = ()) -> None:
    _hand_over(json.dumps(record, indent=2), written)


def _hand_over(text: str, written: Sequence[str] = ()) -> None:
    """Write on stdout, as it is; where that fails, it is said to be that, and `written` to be there."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python would write what is left on the way out again, and end with another message and another code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise CkptEmaError(
            f"cannot write to stdout: {error.strerror}",
            details=[f"`{name}` is written all the same" for name in written],
        ) from error


def _printable(text: str) -> str:
    # Terminals obey the upper control characters as well.
    return "".join(f"\\x{ord(c):02x}" if (c < " " and c != "\n") or "\x7f" <= c <= "\x9f" else c for c in text)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise, so that a half-written file is removed on the way out."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            # Once stopped, deaf until the end: a signal during the interpreter's own exit would print a traceback.
            if signal.getsignal(number) is _stop:
                signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    # A second signal must not interrupt the cleaning up.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise _StoppedError(number)


class _StoppedError(BaseException):
    """A signal asked the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _run_options(command: Command) -> Command:
    """The options that `fold` and `plan` share."""
    return _with_options(command, {})


def _reconstruct_options(command: Command) -> Command:
    """Those of `reconstruct`, which works out itself how to weigh checkpoints."""
    changed = {
        "per": None,
        "between": None,
        "coefficients": None,
        "init": None,
        "at": click.option("--at", type=int, metavar="STEP", help="Step of the wanted teacher.  [default: the newest]"),
        "half-life": click.option(
            "--half-life",
            type=float,
            multiple=True,
            metavar="STEPS",
            help="The momentum in other words: steps after which a share has halved; repeatable.",
        ),
        "interval": click.option(
            "--interval",
            type=int,
            default=1,
            show_default=True,
            metavar="N",
            help="The hook's: the wanted teacher was updated every N steps.",
        ),
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
            help="Averages of other tools: '0.*.pt=power:0.05' or 'ema_*=ema:0.001', :N behind it where updated every"
            " N steps (powers: as ema-pytorch's update_every); repeatable.",
        ),
        "plan": click.option("--plan", "only_plans", is_flag=True, help="Show what would be done; read no tensor."),
    }
    return _with_options(command, changed)


def _follow_options(command: Command) -> Command:
    """Those of `follow`, which takes what comes, and goes on from its own teacher."""
    without = ("profile", "sigma-rel", "coefficients", "init", "last", "output-format", "shard-size")
    changed: dict[str, Command | None] = dict.fromkeys((*without, "interval", "overwrite", "resume", "json", "verbose"))
    changed |= {
        "run": click.argument("run", type=_Path()),
        "output": click.option(
            "-o",
            "--output",
            type=_Path(),
            help="The teacher.  [default: RUN/teacher.safetensors; RUN/teacher for Hugging Face folders]",
        ),
        "momentum": click.option(
            "--momentum",
            type=float,
            metavar="M",
            help="Share that the student brings at each update, 0 < M < 1.  [default: the teacher's own, else 0.001]",
        ),
        "half-life": click.option(
            "--half-life",
            type=float,
            metavar="STEPS",
            help="The momentum in other words: training steps after which a share has halved; implies --per step.",
        ),
        "interval": click.option(
            "--interval",
            type=int,
            default=1,
            show_default=True,
            metavar="N",
            help="Per step, update every N steps, as MeanTeacherHook does.",
        ),
        "until": click.option(
            "--until", "until_step", type=int, metavar="STEP", help="Last step to fold; end when it is there."
        ),
        "idle": click.option(
            "--idle",
            "idle_seconds",
            type=_Duration(),
            metavar="TIME",
            help="End when nothing new was written for so long (90s, 10m, 2h).  [default: never]",
        ),
        "dtype": click.option(
            "--dtype",
            type=click.Choice(["student", "float32", "bfloat16", "float16"]),
            default="student",
            help="Dtype of the teacher.  [default: the student's, float32 where that has 16 bits]",
        ),
    }
    return _with_options(command, changed)


def _with_options(command: Command, changed: dict[str, Command | None]) -> Command:
    """Add a fold's options by name; `changed` ones in their place, or left away, or behind them."""
    options: dict[str, Command | None] = {
        "run": click.argument("run", nargs=-1, required=True, type=_Path()),
        "output": click.option(
            "-o",
            "--output",
            type=_Path(),
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
        "half-life": click.option(
            "--half-life",
            type=float,
            multiple=True,
            metavar="STEPS",
            help="The momentum in other words: training steps after which a share has halved; implies --per step;"
            " repeatable.",
        ),
        "per": click.option(
            "--per",
            type=click.Choice(["checkpoint", "step"]),
            help="What momentum works on once: each checkpoint, or each training step, as the hook's does.  [default:"
            " checkpoint]",
        ),
        "interval": click.option(
            "--interval",
            type=int,
            default=1,
            show_default=True,
            metavar="N",
            help="Fold every N-th checkpoint after the first; per step, update every N steps, as MeanTeacherHook does.",
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
            type=_Path(),
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
            type=_Path(),
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
            type=click.Choice(["student", "float32", "bfloat16", "float16"]),
            default="student",
            show_default=True,
            help="Dtype of the written teacher.",
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
            type=_Size(),
            metavar="SIZE",
            help="Write a folder of files of this size with an index, as Hugging Face does (5GB).",
        ),
        "device": click.option(
            "--device",
            default="auto",
            show_default=True,
            help="auto, which measures before a long fold, cpu or cuda[:i].",
        ),
        "memory": click.option(
            "--memory",
            "memory_budget_bytes",
            type=_Size(),
            default=format_size(DEFAULT_MEMORY_BUDGET_BYTES),
            show_default=True,
            help="For all buffers together, beside torch itself.",
        ),
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


class _Group(click.Group):
    """Keeps the words as they were typed, for hints."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckpt-ema")
def main() -> None:
    """Fold the checkpoints of a training run into a mean teacher.

    teacher = (1 - momentum) * teacher + momentum * student

    \b
    ckpt-ema plan runs/                      what would be folded, and with which share
    ckpt-ema fold runs/ --momentum 0.1       write runs/teacher.safetensors
    ckpt-ema follow runs/ --momentum 0.1     the same while training goes on, checkpoint by checkpoint
    ckpt-ema inspect runs/epoch_12.pth       what a checkpoint holds
    ckpt-ema verify teacher.safetensors runs/  whether a teacher is what it says
    ckpt-ema compare a.safetensors b.safetensors  how far two are apart
    """


@main.command()
@_run_options
@_errors_become_exits
def fold(run: tuple[str, ...], output: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Fold checkpoints into a teacher.

    RUN is a run directory, or checkpoints in the order they are to be folded. The teacher's path goes to stdout,
    everything else to stderr.

    \b
    ckpt-ema fold runs/ --momentum 0.1
    ckpt-ema fold runs/ --momentum 0.001 --per step
    ckpt-ema fold runs/ --half-life 5000 --last 10 -o teacher.safetensors
    ckpt-ema fold a.pt b.pt c.pt --momentum 0.3 -o teacher.safetensors
    ckpt-ema fold runs/ --prefix student. --dtype float32
    """

    _carry_out(ckpt_ema.fold, run, output, as_json=as_json, quiet=quiet, verbose=verbose, **options)


@main.command()
@_run_options
@_errors_become_exits
def plan(run: tuple[str, ...], output: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Show what `fold` would do with the same words; reads no tensor.

    \b
    ckpt-ema plan runs/ --momentum 0.1
    ckpt-ema plan runs/ --last 10 -v
    """
    _show(ckpt_ema.plan, run, output, as_json=as_json, quiet=quiet, verbose=verbose, **options)


@main.command()
@_reconstruct_options
@_errors_become_exits
def reconstruct(
    run: tuple[str, ...],
    output: str | None,
    only_plans: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Make the teacher that would have followed the whole of training, from all that a run has stored.

    Students and the snapshots of `MeanTeacher(..., snapshots=...)` are combined so that the result is as near to the
    wanted teacher as can be expected; how near is said before a tensor is read. `--include`, `--exclude`, `--from` and
    `--until` choose among snapshots as well.

    \b
    ckpt-ema reconstruct runs/ --momentum 0.001 --plan
    ckpt-ema reconstruct runs/ --half-life 500 --half-life 2000
    ckpt-ema reconstruct runs/ --profile power --sigma-rel 0.1 --at 30000
    """
    if only_plans:
        _show(ckpt_ema.plan_reconstruction, run, output, as_json=as_json, quiet=quiet, verbose=verbose, **options)
    else:
        _carry_out(ckpt_ema.reconstruct, run, output, as_json=as_json, quiet=quiet, verbose=verbose, **options)


@main.command()
@_follow_options
@_errors_become_exits
def follow(run: str, output: str | None, quiet: bool, **options: Any) -> None:
    """Fold each checkpoint of a run that is still training, as soon as it is finished.

    The trainer may delete it afterwards. The teacher is whole at every moment; a restart goes on where this one ended.
    Ctrl-C or SIGTERM ends it after a last look, a second one at once.

    \b
    ckpt-ema follow runs/ --momentum 0.1
    ckpt-ema follow runs/ --half-life 5000 --idle 2h -o teacher.safetensors
    """
    from datetime import datetime  # noqa: PLC0415

    def tell(text: str) -> None:
        if not quiet or text.startswith(("Warning: ", "missed ")):
            _tell(f"{datetime.now():%H:%M:%S} {text}")

    with contextlib.redirect_stdout(sys.stderr), _first_signal_sets() as stop:
        done = ckpt_ema.follow(run, output, stop=stop, tell=tell, **options)
    if not quiet:
        missed = f", missed {len(done.missed)}: {', '.join(done.missed)}" if done.missed else ""
        _tell(f"folded {counted(done.num_folded, 'checkpoint')}{missed}")
    _hand_over(str(done.output), [str(done.output)])


@contextlib.contextmanager
def _first_signal_sets() -> Iterator[threading.Event]:
    """An event that the first signal sets; the second one stops at once, as elsewhere."""
    stop = threading.Event()
    # Not by the handler itself: where it interrupts a wait for the event it would wait for the lock of that, for ever.
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    was_asked = False

    def set_when_asked() -> None:
        if asked.get():
            stop.set()

    setter = threading.Thread(target=set_when_asked, name="signals", daemon=True)
    setter.start()

    def set_it(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        if was_asked:
            _stop(number, frame)
        was_asked = True
        asked.put(True)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _stop:
            before[number] = signal.signal(number, set_it)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is set_it:
                signal.signal(number, handler)
        asked.put(False)
        setter.join()


@main.command()
@click.argument("path", type=_Path())
@click.option("--state", metavar="KEY", help="State dict to list instead of the one a fold takes.")
@click.option("--prefix", help="Sub-model to list, stripped from the names.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
@_errors_become_exits
def inspect(path: str, state: str | None, prefix: str | None, as_json: bool, verbose: bool) -> None:
    """Show what one checkpoint or teacher holds; reads no tensor.

    \b
    ckpt-ema inspect runs/epoch_12.pth
    ckpt-ema inspect runs/checkpoint-1000 -v
    ckpt-ema inspect teacher.safetensors --json
    """
    from ckpt_ema import report  # noqa: PLC0415

    found = ckpt_ema.inspect(path, state=state, prefix=prefix)
    if as_json:
        _print_json(report.inspection_record(found))
    else:
        _print(report.inspection_text(found, verbose=verbose))


_MEMORY = click.option(
    "--memory",
    "memory_budget_bytes",
    type=_Size(),
    default=format_size(DEFAULT_MEMORY_BUDGET_BYTES),
    show_default=True,
    help="For all buffers together, beside torch itself.",
)


@main.command()
@click.argument("a", type=_Path())
@click.argument("b", type=_Path())
@click.option("--state", metavar="KEY", help="State dict of both, as `inspect` lists them; a teacher has one.")
@click.option("--prefix", help="Sub-model of both, stripped from the names, as it is from a teacher's.")
@_MEMORY
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-v", "--verbose", is_flag=True, help="List every tensor that differs.")
@_errors_become_exits
def compare(a: str, b: str, as_json: bool, verbose: bool, **options: Any) -> None:
    """Show how far the tensors of two checkpoints or teachers are apart, largest first.

    Relative distance: ||a - b|| / ||b||. Any formats and dtypes.

    \b
    ckpt-ema compare teacher.safetensors runs/epoch_12.pth
    ckpt-ema compare mine.safetensors theirs.safetensors --json
    """
    from ckpt_ema import report  # noqa: PLC0415

    found = ckpt_ema.compare(a, b, **options)
    if as_json:
        _print_json(report.comparison_record(found))
    else:
        _print(report.comparison_text(found, verbose=verbose))


@main.command()
@click.argument("teacher", type=_Path())
@click.argument("run", type=_Path(), required=False)
@click.option(
    "--share",
    type=float,
    default=0.05,
    show_default=True,
    help="Part of the blocks that is folded again, from RUN; 1 for all of them.",
)
@click.option("--seed", type=int, metavar="N", help="Choose the same blocks again.")
@_MEMORY
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print what failed only.")
@_errors_become_exits
def verify(teacher: str, run: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check a teacher: its structure, its numbers, what it says of itself.

    With RUN, the folder of its checkpoints, a random part is folded again and compared bit for bit. Exit 1 where a
    check failed.

    \b
    ckpt-ema verify teacher.safetensors
    ckpt-ema verify teacher.safetensors runs/ --share 1
    """
    from ckpt_ema import report  # noqa: PLC0415

    found = ckpt_ema.verify(teacher, run, **options)
    if as_json:
        _print_json(report.verification_record(found))
    elif text := report.verification_text(found, quiet=quiet):
        _print(text)
    if not found.is_ok:
        sys.exit(1)


def _carry_out(
    work: Callable[..., FoldReport],
    run: tuple[str, ...],
    output: str | None,
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Fold or reconstruct, with a bar and a summary on stderr; the teachers' paths or the JSON on stdout.

    Under torchrun or srun the first rank alone says something, and whoever fails.
    """
    from ckpt_ema import report  # noqa: PLC0415
    from ckpt_ema.journal import done_share  # noqa: PLC0415
    from ckpt_ema.ranks import OtherRankFailedError  # noqa: PLC0415
    from ckpt_ema.writer import BEGIN_ANEW  # noqa: PLC0415

    ranks = ckpt_ema.ranks_of_environment()
    quiet = quiet or not ranks.is_first
    begun: list[FoldPlan] = []

    def announce(planned: FoldPlan) -> None:
        begun.append(planned)
        if planned.predictions and not quiet:
            _tell(report.predictions_text(planned))
        if verbose and not quiet:
            _tell(report.plan_text(planned, verbose=True))
        _warn(planned)

    shows_bar = not quiet and sys.stderr is not None and sys.stderr.isatty()
    # What a model of `--model` prints must not get between a script and the teacher's path.
    with (
        contextlib.redirect_stdout(sys.stderr),
        _ProgressBar(shown=shows_bar) as bar,
    ):
        try:
            done = work(run, output, progress=bar.update, announce=announce, ranks=ranks, **_or_none(options))
        except BaseException as error:
            can_go_on = begun and getattr(error, "hint", None) != BEGIN_ANEW
            if can_go_on and (share := done_share(begun[0].outputs)) is not None:
                _tell(f"{share:.0%} is done: the same command with `--resume` goes on from there")
            if isinstance(error, OtherRankFailedError) and not ranks.is_first:
                sys.exit(1)  # the rank that failed says why, and the first one that nothing was written
            raise
    if not ranks.is_first:
        return
    if not quiet:
        _tell(report.summary_text(done, verbose=verbose))
    written = done.plan.output_names
    if as_json:
        _print_json(report.report_record(done), written)
    else:
        _hand_over("\n".join(written), written)


def _show(
    make_plan: Callable[..., FoldPlan],
    run: tuple[str, ...],
    output: str | None,
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Print a plan, under torchrun or srun by the first rank alone; its warnings go to stderr."""
    from ckpt_ema import report  # noqa: PLC0415

    with contextlib.redirect_stdout(sys.stderr):
        planned = make_plan(run, output, **_or_none(options))
    if not ckpt_ema.ranks_of_environment().is_first:
        return
    if as_json:
        _print_json(report.plan_record(planned))
    elif not quiet:
        _print(report.plan_text(planned, verbose=verbose))
    _warn(planned)
    taken = [teacher.output for teacher in planned.teachers if teacher.output.exists()]
    if taken and not planned.options.overwrite:
        _tell(f"Warning: `{taken[0]}` exists: the teacher will not be written without `--overwrite`")


def _warn(planned: FoldPlan) -> None:
    for text in planned.warnings:
        _tell(f"Warning: {text}")
    if planned.mended_options:
        command, *words = click.get_current_context().find_root().obj
        # Behind the command's name: behind `--` an option would be a path.
        _tell(f"hint: {shlex.join(['ckpt-ema', command, *planned.mended_options, *words])}")
