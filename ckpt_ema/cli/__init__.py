"""The command line: words in, calls of the library, text or JSON out. The only package that prints or exits."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

import ckpt_ema
from ckpt_ema._version import __version__
from ckpt_ema.cli.exits import ends_in_order, first_signal_sets
from ckpt_ema.cli.options import (
    AS_JSON,
    MEMORY,
    GivenPath,
    StrictCommand,
    follow_options,
    or_none,
    reconstruct_options,
    run_options,
)
from ckpt_ema.cli.terminal import (
    ProgressBar,
    hand_over,
    print_json,
    print_text,
    silence_stderr,
    silence_stdout,
    tell,
)
from ckpt_ema.sizes import counted

if TYPE_CHECKING:
    from ckpt_ema.following import FollowReport
    from ckpt_ema.plans import FoldPlan, FoldReport

# `ckpt_ema.report` and the library are imported by the command that needs them: `--help` must not wait for them.


class _Group(click.Group):
    """Keeps the words as they were typed, for hints; whatever click raises ends in a line and an exit code."""

    command_class = StrictCommand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run a command; help and misuse that cannot be printed are no traceback."""
        try:
            sys.exit(super().main(*arguments, **{**settings, "standalone_mode": False}))
        except click.ClickException as misuse:
            try:
                misuse.show()
            except OSError:
                silence_stderr()
            sys.exit(misuse.exit_code)
        except click.Abort:
            tell("Aborted!")
            sys.exit(1)
        except OSError as error:
            silence_stdout()
            tell(f"Error: cannot write to stdout: {error.strerror}")
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckpt-ema")
def main() -> None:
    """Fold the checkpoints of a training run into a mean teacher.

    teacher = (1 - momentum) * teacher + momentum * student

    \b
    ckpt-ema plan runs/                           coefficients; reads no tensor
    ckpt-ema fold runs/ --momentum 0.1            write runs/teacher.safetensors
    ckpt-ema follow runs/ --momentum 0.1          the same while training goes on
    ckpt-ema reconstruct runs/ --half-life 500    any teacher after the fact
    ckpt-ema inspect runs/epoch_12.pth            what a checkpoint holds
    ckpt-ema verify teacher.safetensors runs/     whether a teacher is right
    ckpt-ema compare a.safetensors b.safetensors  how far two are apart
    """


@main.command()
@run_options
@ends_in_order
def fold(**options: Any) -> None:
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
    _carry_out(ckpt_ema.fold, **options)


@main.command()
@run_options
@ends_in_order
def plan(**options: Any) -> None:
    """Show what `fold` would do; reads no tensor.

    Takes the options of `fold`.

    \b
    ckpt-ema plan runs/ --momentum 0.1
    ckpt-ema plan runs/ --last 10 -v
    """
    _show(ckpt_ema.plan, **options)


@main.command()
@reconstruct_options
@ends_in_order
def reconstruct(only_plans: bool, **options: Any) -> None:
    """Make any teacher after the fact, from all that a run holds.

    It is the one that would have followed the whole training. Students and the snapshots of `MeanTeacher(...,
    snapshots=...)` are combined so that the result is as near to the wanted teacher as can be expected; how near is
    said before a tensor is read. `--include`, `--exclude`, `--from` and `--until` choose among snapshots as well.

    \b
    ckpt-ema reconstruct runs/ --momentum 0.001 --plan
    ckpt-ema reconstruct runs/ --half-life 500 --half-life 2000
    ckpt-ema reconstruct runs/ --profile power --sigma-rel 0.1 --at 30000
    """
    if only_plans:
        _show(ckpt_ema.plan_reconstruction, **options)
    else:
        _carry_out(ckpt_ema.reconstruct, **options)


@main.command()
@follow_options
@ends_in_order
def follow(run: str, output: str | None, quiet: bool, **options: Any) -> None:
    """Fold each checkpoint of a run that is still training.

    It is folded as soon as it is finished, and the trainer may delete it then. The teacher is whole at every moment; a
    restart goes on where this one ended. Ctrl-C or SIGTERM ends it after a last look, a second one at once.

    \b
    ckpt-ema follow runs/ --momentum 0.1
    ckpt-ema follow runs/ --half-life 5000 --idle 2h -o teacher.safetensors
    """
    from datetime import datetime  # noqa: PLC0415

    from ckpt_ema.following import OutOfReachError  # noqa: PLC0415

    def tell_with_time(text: str) -> None:
        tell(f"{datetime.now():%H:%M:%S} {text}")

    try:
        with contextlib.redirect_stdout(sys.stderr), first_signal_sets() as stop:
            told = None if quiet else tell_with_time
            done = ckpt_ema.follow(run, output, stop=stop, tell=told, warn=tell_with_time, **options)
    except OutOfReachError as error:
        if error.report is not None:
            _hand_over_followed(error.report, quiet=quiet)
        raise
    _hand_over_followed(done, quiet=quiet)


def _hand_over_followed(done: FollowReport, *, quiet: bool) -> None:
    """A summary on stderr, and on stdout the teacher's path where it is in reach."""
    if not quiet:
        missed = f", missed {len(done.missed)}: {', '.join(done.missed)}" if done.missed else ""
        tell(f"folded {counted(done.num_folded, 'checkpoint')}{missed}")
    if done.output.exists():
        hand_over(str(done.output), [str(done.output)])


@main.command()
@click.argument("path", type=GivenPath())
@click.option("--state", metavar="KEY", help="State dict to list instead of the one a fold takes.")
@click.option("--prefix", help="Sub-model to list, stripped from the names.")
@AS_JSON
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
@ends_in_order
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
        print_json(report.inspection_record(found))
    else:
        print_text(report.inspection_text(found, verbose=verbose))


@main.command()
@click.argument("a", type=GivenPath())
@click.argument("b", type=GivenPath())
@click.option("--state", metavar="KEY", help="State dict of both, as `inspect` lists them; a teacher has one.")
@click.option("--prefix", help="Sub-model of both, stripped from the names, as it is from a teacher's.")
@MEMORY
@AS_JSON
@click.option("-v", "--verbose", is_flag=True, help="List every tensor that differs.")
@ends_in_order
def compare(a: str, b: str, as_json: bool, verbose: bool, **options: Any) -> None:
    """Show how far two checkpoints or teachers are apart.

    Tensor by tensor, largest first. Relative distance: ||a - b|| / ||b||. Any formats and dtypes.

    \b
    ckpt-ema compare teacher.safetensors runs/epoch_12.pth
    ckpt-ema compare mine.safetensors theirs.safetensors --json
    """
    from ckpt_ema import report  # noqa: PLC0415

    found = ckpt_ema.compare(a, b, **options)
    if as_json:
        print_json(report.comparison_record(found))
    else:
        print_text(report.comparison_text(found, verbose=verbose))


@main.command()
@click.argument("teacher", type=GivenPath())
@click.argument("run", type=GivenPath(), required=False)
@click.option(
    "--share",
    type=float,
    default=0.05,
    show_default=True,
    help="Part of the blocks that is folded again, from RUN; 1 for all of them.",
)
@click.option("--seed", type=int, metavar="N", help="Choose the same blocks again.")
@MEMORY
@AS_JSON
@click.option("-q", "--quiet", is_flag=True, help="Print what failed only.")
@ends_in_order
def verify(teacher: str, run: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check a teacher: its files, its numbers, how it was made.

    With RUN, the folder of its checkpoints, a random part is folded again and compared bit for bit. Exit 1 where a
    check failed.

    \b
    ckpt-ema verify teacher.safetensors
    ckpt-ema verify teacher.safetensors runs/ --share 1
    """
    from ckpt_ema import report  # noqa: PLC0415

    found = ckpt_ema.verify(teacher, run, **options)
    if as_json:
        print_json(report.verification_record(found))
    elif text := report.verification_text(found, quiet=quiet):
        print_text(text)
    if not found.is_ok:
        sys.exit(1)


def _carry_out(
    work: Callable[..., FoldReport],
    *,
    run: tuple[str, ...],
    output: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Fold or reconstruct, with a bar and a summary on stderr; the teachers' paths or the JSON on stdout.

    Under torchrun or srun the first rank alone says something, and whoever fails.
    """
    from ckpt_ema import report  # noqa: PLC0415
    from ckpt_ema.errors import LostWorkError  # noqa: PLC0415
    from ckpt_ema.output.journal import done_share  # noqa: PLC0415
    from ckpt_ema.ranks import OtherRankFailedError  # noqa: PLC0415

    ranks = ckpt_ema.ranks_of_environment()
    ranks.tell = tell
    quiet = quiet or not ranks.is_first
    begun: list[FoldPlan] = []

    def announce(planned: FoldPlan) -> None:
        begun.append(planned)
        text = report.plan_text(planned, verbose=True) if verbose else report.announcement_text(planned)
        if text and not quiet:
            tell(text)
        _warn(planned)

    shows_bar = not quiet and sys.stderr is not None and sys.stderr.isatty()
    # What a model of `--model` prints must not get between a script and the teacher's path.
    with (
        contextlib.redirect_stdout(sys.stderr),
        ProgressBar(shown=shows_bar) as bar,
    ):
        try:
            done = work(run, output, progress=bar.update, announce=announce, ranks=ranks, **or_none(options))
        except BaseException as error:
            can_go_on = begun and not isinstance(error, LostWorkError)
            if can_go_on and (share := done_share(begun[0].outputs)) is not None:
                tell(f"{share:.0%} is done: the same command with `--resume` goes on from there")
            if isinstance(error, OtherRankFailedError) and not ranks.is_first:
                sys.exit(1)  # the rank that failed says why, and the first one that nothing was written
            raise
    if not ranks.is_first:
        return
    if not quiet:
        tell(report.summary_text(done, verbose=verbose))
    written = done.plan.output_names
    if as_json:
        print_json(report.report_record(done), written)
    else:
        hand_over("\n".join(written), written)


def _show(
    make_plan: Callable[..., FoldPlan],
    *,
    run: tuple[str, ...],
    output: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Print a plan, under torchrun or srun by the first rank alone; its warnings go to stderr."""
    from ckpt_ema import report  # noqa: PLC0415

    with contextlib.redirect_stdout(sys.stderr):
        planned = make_plan(run, output, **or_none(options))
    if not ckpt_ema.ranks_of_environment().is_first:
        return
    if as_json:
        print_json(report.plan_record(planned))
    elif not quiet:
        print_text(report.plan_text(planned, verbose=verbose))
    _warn(planned)
    taken = [teacher.output for teacher in planned.teachers if teacher.output.exists()]
    if taken and not planned.options.overwrite:
        tell(f"Warning: `{taken[0]}` exists: the teacher will not be written without `--overwrite`")


def _warn(planned: FoldPlan) -> None:
    for text in planned.warnings:
        tell(f"Warning: {text}")
    if planned.mended_options:
        command, *words = click.get_current_context().find_root().obj
        # Right after the command's name: behind a `--` typed there an option would be a path.
        tell(f"hint: {shlex.join(['ckpt-ema', command, *planned.mended_options, *words])}")
