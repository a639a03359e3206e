"""Checkpoints that claim the same step: what the hint says is typed, and folds what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import CkptEmaError
from tests.conftest import Outcome

Cli = Callable[..., Outcome]


def save_all(run: Path, names: Sequence[str], *, inside: int | None = None) -> None:
    """A checkpoint of each name, with a step inside or none."""
    run.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        counter = {} if inside is None else {"step": inside}
        torch.save({"state_dict": {"w": torch.full((2,), float(number))}, **counter}, run / name)


def refusal_of(run: Path, **options: tuple[str, ...]) -> CkptEmaError:
    """The error that planning this run ends with."""
    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.plan(run, **options)
    return caught.value


def options_in(hint: str) -> list[dict[str, tuple[str, ...]]]:
    """Every way out of a hint, as the library takes it: those between `or` are each typed alone."""
    ways = []
    for text in hint.split(" or "):
        words = shlex.split(" ".join(re.findall(r"--(?:include|exclude) [^`]+", text)))
        way: dict[str, tuple[str, ...]] = {}
        for option, pattern in zip(words[::2], words[1::2], strict=True):
            name = option.removeprefix("--")
            way[name] = (*way.get(name, ()), pattern)
        ways.append(way)
    return ways


def folded(run: Path, **options: tuple[str, ...]) -> list[str]:
    """The checkpoints that take part then."""
    return [item.name for item in ckpt_ema.plan(run, **options).checkpoints]


FAMILIES = {
    "GAN": ("net{}_{}.pt", "GD", (10, 20)),
    "zero-padded": ("{}-{:04d}.pt", ("enc", "dec"), (7, 80, 900)),
    "behind": ("step_{1}_{0}.pt", ("actor", "critic"), (100, 200)),
    "epochs as well": ("{0}_epoch{2}_step{1}.pt", ("actor", "critic"), (100, 200)),
    "numbers in names": ("resnet{}_step_{}.pt", (18, 50), (18, 36, 50, 100)),
    "one in the other": ("net{}_{}.pt", ("", "_fast"), (10, 20)),
    "brackets": ("net[{}]_{}.pt", "GD", (10, 20)),
    "three": ("net{}_{}.pt", "ABC", (1, 2)),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_of_names_are_offered_as_a_whole(tmp_path: Path, kind: str) -> None:
    """Where names differ by more than their numbers, one family is folded: never a mix of two networks."""
    pattern, parts, steps = FAMILIES[kind]
    members = {part: [pattern.format(part, step, step // 100) for step in steps] for part in parts}
    save_all(tmp_path, [name for names in members.values() for name in names])
    error = refusal_of(tmp_path)
    assert "checkpoints claim " in error.message
    assert error.hint is not None
    assert error.hint.startswith("pass `--")
    ways = options_in(error.hint)
    assert len(ways) >= 2
    for way in ways:
        assert folded(tmp_path, **way) in members.values()


def test_the_hint_of_families_reads_as_it_is_typed(tmp_path: Path, cli: Cli) -> None:
    """Generator and discriminator, in the words of the command line; both steps are told."""
    save_all(tmp_path / "g", [f"net{part}_{step}.pt" for part in "GD" for step in (10, 20)])
    shown = cli("plan", "g")
    assert "Error: 2 checkpoints claim number 10\n  netD_10.pt\n  netG_10.pt\n" in shown.stderr
    assert "  number 20 as well: netD_20.pt, netG_20.pt\n" in shown.stderr
    assert "hint: pass `--include 'netG_*.pt'` or `--include 'netD_*.pt'`\n" in shown.stderr
    shown = cli("plan", "g", "--include", "net*")
    assert "`--include 'netG_*.pt'` in place of the one you gave" in shown.stderr
    assert cli("plan", "g", "--include", "netG_*.pt").code == 0


def test_a_few_that_collide_are_left_out_by_name(tmp_path: Path) -> None:
    """A resumed run that saved some steps twice: one command leaves out all of the second copies."""
    save_all(tmp_path, [f"step_{step}.pt" for step in range(100, 900, 100)])
    save_all(tmp_path, [f"resumed_step_{step}.pt" for step in (300, 400)])
    error = refusal_of(tmp_path)
    assert error.message == "2 checkpoints claim step 300"
    [way] = options_in(error.hint or "")
    assert len(way["exclude"]) == 2
    assert folded(tmp_path, **way) == [f"step_{step}.pt" for step in range(100, 900, 100)]
    save_all(tmp_path, ["again_step_300.pt"])
    error = refusal_of(tmp_path)
    assert error.message == "3 checkpoints claim step 300"
    [way] = options_in(error.hint or "")
    assert len(folded(tmp_path, **way)) == 8


def test_the_name_with_more_like_it_is_kept(tmp_path: Path) -> None:
    """A discriminator that was saved once is left out, and does not become the first of the generators."""
    save_all(tmp_path, ["netD_10.pt", *(f"netG_{step}.pt" for step in (10, 20, 30))])
    [way] = options_in(refusal_of(tmp_path).hint or "")
    assert folded(tmp_path, **way) == ["netG_10.pt", "netG_20.pt", "netG_30.pt"]


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ([f"step_{step}.pt" for step in (0, 1, 2)], 3),
        ([f"step_{step}.pt" for step in range(12)], 12),
        ([f"step_{step:03d}.pt" for step in range(12)], 12),
        ([f"a b_{step}.pt" for step in (8, 9, 10)], 3),
        ([f"epoch_{step}.pt" for step in (9, 10)], 2),
    ],
)
def test_one_step_inside_of_all_is_told_and_their_names_order_them(
    tmp_path: Path, cli: Cli, names: list[str], count: int
) -> None:
    """A counter that the script never raised: the hint lists the checkpoints as their names count."""
    save_all(tmp_path / "my run", names, inside=500)
    shown = cli("plan", "my run")
    assert shown.code == 1
    assert f"all {count} checkpoints of `my run` say inside that they are of step 500" in shown.stderr
    typed = shown.stderr.partition("oldest first: `")[2].rpartition("`")[0]
    listed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {typed}"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert listed == [f"my run/{name}" for name in names]
    rows = re.findall(r"^(\S.*\.pt) +500 ", cli("plan", *listed).stdout, re.MULTILINE)
    assert [row.strip() for row in rows] == names


def test_many_of_one_step_are_left_to_a_list(tmp_path: Path) -> None:
    """Where neither names nor families tell more, no file is picked for the user."""
    save_all(tmp_path, [f"{word}_step_1.pt" for word in ("red", "green", "blue", "grey", "pink", "teal")], inside=7)
    save_all(tmp_path, ["step_2.pt"], inside=8)
    error = refusal_of(tmp_path)
    assert error.message == "6 checkpoints claim step 7"
    assert "list the checkpoints" in (error.hint or "")
