"""What a fold is asked for: keywords of a caller in, options of which none contradicts another out."""

from __future__ import annotations

import numbers
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from ckpt_ema.averages.profiles import DEFAULT_MOMENTUM, Between, Profile, check_momentum
from ckpt_ema.averages.responses import declared_response, gamma_of, momentum_of_half_life
from ckpt_ema.blocks import Accumulate
from ckpt_ema.dtypes import WrittenDtype
from ckpt_ema.errors import MisuseError
from ckpt_ema.keywords import made_of_known_keywords
from ckpt_ema.runs.students import check_prefix
from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES, MAX_COUNT

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack  # noqa: PLC0414  (for the functions that take these keywords)
else:
    from typing_extensions import Unpack as Unpack  # noqa: PLC0414

_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")
PathLike = str | os.PathLike[str]


_OPTIONAL_INTEGER = (int, type(None))
_OPTIONAL_TEXT = (str, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    "interval": (int,),
    "from_step": _OPTIONAL_INTEGER,
    "until_step": _OPTIONAL_INTEGER,
    "last": _OPTIONAL_INTEGER,
    "num_threads": _OPTIONAL_INTEGER,
    "steps_per_epoch": _OPTIONAL_INTEGER,
    "memory_budget_bytes": (int,),
    "shard_size_bytes": _OPTIONAL_INTEGER,
    "model": _OPTIONAL_TEXT,
    "state": _OPTIONAL_TEXT,
    "prefix": _OPTIONAL_TEXT,
    "device": (str,),
}


@made_of_known_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class FoldOptions:
    """What a fold can be asked for; the defaults are MeanTeacherHook's."""

    momentum: float | Sequence[float] | None = None
    """Share that each new student brings, 0 < momentum < 1, 0.001 by default; several make as many teachers from one
    pass."""

    half_life: float | Sequence[float] | None = None
    """The momentum in other words: training steps after which a student's share has halved. Implies `per="step"`."""

    per: Literal["checkpoint", "step"] | None = None
    """What the momentum works on once: each checkpoint (the default), or each training step, as the hook's does."""

    interval: int = 1
    """The hook's: fold every interval-th checkpoint, or with `per="step"` update once every interval steps."""

    between: Between | None = None
    """With `per="step"`: between two checkpoints the student moved in a straight line (`linear`, the default), or
    was the newer one all along (`hold`)."""

    steps_per_epoch: int | None = None
    """With `per="step"`, for runs that know epochs only."""

    profile: Literal["ema", "uniform", "minus-sqrt", "power"] = "ema"
    """How the students' shares fall with their age; `power`, of width `sigma_rel`, counts steps."""

    sigma_rel: float | Sequence[float] | None = None
    """Width of a power profile relative to the length of training, 0 < sigma_rel < 0.2886; several make as many
    teachers."""

    coefficients: PathLike | Mapping[str, float] | None = None
    """The share of each checkpoint by its name, given by hand, or a JSON file of these; they sum to 1."""

    skip_buffers: bool = True
    """Average parameters only; otherwise every floating-point tensor."""

    buffers: Sequence[str] = ()
    """Patterns of tensor names that are buffers."""

    model: str | None = None
    """`MODULE:FACTORY` of the student, built on the meta device to learn its buffers exactly."""

    init: PathLike | None = None
    """Teacher to start from; the first checkpoint otherwise."""

    from_step: int | None = None
    until_step: int | None = None
    last: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    """Which checkpoints: by step (both ends included), the newest only, or by name."""

    state: str | None = None
    """Dotted path of the state dict inside each checkpoint; found by itself otherwise."""

    prefix: str | None = None
    """Sub-model to fold, its prefix stripped from the names."""

    accumulate: Accumulate = "float32"
    """Dtype of the running teacher: never narrower than any student's. `student` wants all students in one."""

    dtype: WrittenDtype = "student"
    """Dtype of the written teacher's floating-point tensors; `student` wants all students in one."""

    output_format: Literal["safetensors", "dcp"] = "safetensors"
    """What the teacher is written as; `dcp` is a folder that torch.distributed.checkpoint loads."""

    shard_size_bytes: int | None = None
    """Write a folder of safetensors files of about this many bytes each, with an index; one file otherwise."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda[:i]`."""

    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES
    """For all buffers together."""

    num_threads: int | None = None
    """Reading and folding threads; as many as there are processors, at most 16, otherwise."""

    overwrite: bool = False
    """Replace an existing teacher, or an unfinished one."""

    resume: bool = False
    """Go on with an unfinished fold where there is one; and if this one fails, keep what it has done."""

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "buffers"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):  # its characters would be patterns, and `*` matches everything
                raise MisuseError(
                    f"`{name}` is a text, and must be a list of patterns", hint=f"pass `{name}=[{patterns!r}]`"
                )
            object.__setattr__(self, name, tuple(patterns))
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                wanted = "a whole number" if int in kinds else "a text"
                raise MisuseError(f"`{name}` is {value!r} ({type(value).__name__}), and must be {wanted}")
        if not isinstance(self.coefficients, (str, os.PathLike, Mapping, type(None))):
            raise MisuseError(
                f"`coefficients` is a {type(self.coefficients).__name__}, and must map names to numbers, or be a file"
            )
        for name in ("momentum", "half_life", "sigma_rel"):
            object.__setattr__(self, name, _as_numbers(name, getattr(self, name)))
        self._check_profile()
        check_prefix(self.prefix)
        for name in ("interval", "last", "num_threads", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < MAX_COUNT:
                option = name if name == "num_threads" else f"--{name.replace('_', '-')}"  # no option of the command
                raise MisuseError(f"`{option}` is {value}, and must be 1 or more, below 2**53")
        if self.from_step is not None and self.until_step is not None and self.from_step > self.until_step:
            raise MisuseError(f"`--from {self.from_step}` lies after `--until {self.until_step}`")
        for name in ("skip_buffers", "overwrite", "resume"):
            if not isinstance(getattr(self, name), bool):
                raise MisuseError(f"`{name}` is {getattr(self, name)!r}, and must be True or False")
        # Whether the GPU is there is asked when folding: a plan must not wait for torch.
        if not _DEVICE.fullmatch(self.device):
            raise MisuseError(
                f"`--device` is {self.device!r}, and must be auto, cpu or cuda[:i]",
                hint="pass for example `--device cuda:0`",
            )
        for name, choices in (
            ("accumulate", get_args(Accumulate)),
            ("dtype", get_args(WrittenDtype)),
            ("output_format", ("safetensors", "dcp")),
        ):
            if getattr(self, name) not in choices:
                raise MisuseError(f"`{name}` is {getattr(self, name)!r}, and must be one of {', '.join(choices)}")

        if self.shard_size_bytes is not None and self.shard_size_bytes < 1:
            raise MisuseError("`--shard-size` must be 1 byte or more", hint="pass for example `--shard-size 5GB`")
        if self.shard_size_bytes is not None and self.output_format == "dcp":
            raise MisuseError("`--shard-size` cuts safetensors files, and `--output-format dcp` has none")

    @property
    def writes_folder(self) -> bool:
        """Whether the teacher is a folder, whatever the students are."""
        return self.shard_size_bytes is not None or self.output_format == "dcp"

    def _check_profile(self) -> None:
        for name, choices in (
            ("per", ("checkpoint", "step", None)),
            ("between", ("linear", "hold", None)),
            ("profile", ("ema", "uniform", "minus-sqrt", "power")),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise MisuseError(f"`{name}` is {getattr(self, name)!r}, and must be one of {known}")
        given = [
            f"`--{name.replace('_', '-')}`"
            for name in ("momentum", "half_life", "sigma_rel", "coefficients")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise MisuseError(f"{' and '.join(given)} say different things of one teacher", hint="pass one of them")
        wants_sigma = self.profile == "power"
        if wants_sigma and self.sigma_rel is None:
            raise MisuseError("`--profile power` needs a width", hint="pass for example `--sigma-rel 0.1`")
        if self.sigma_rel is not None and not wants_sigma:
            raise MisuseError("`--sigma-rel` is the width of a power profile", hint="pass `--profile power` too")
        if self.profile != "ema" and (self.momentum is not None or self.half_life is not None):
            raise MisuseError(f"`--profile {self.profile}` has no momentum", hint="omit one of them")
        if self.coefficients is not None and self.profile != "ema":
            raise MisuseError(f"`--coefficients` and `--profile {self.profile}` say different things")
        if self.per == "checkpoint" and (self.half_life is not None or wants_sigma):
            what = "a power profile" if wants_sigma else "`--half-life`"
            raise MisuseError(f"{what} counts steps, not checkpoints", hint="omit `--per checkpoint`")
        if self.per == "step" and (self.profile == "minus-sqrt" or self.coefficients is not None):
            what = "`--coefficients`" if self.coefficients is not None else "`--profile minus-sqrt`"
            raise MisuseError(f"{what} counts checkpoints, not steps", hint="omit `--per step`")
        if self.per_step and self.interval > 1 and self.profile != "ema":
            raise MisuseError(f"`--interval` has no meaning for `--profile {self.profile}` per step")
        if not self.per_step and (self.between is not None or self.steps_per_epoch is not None):
            option = "--between" if self.between is not None else "--steps-per-epoch"
            raise MisuseError(f"`{option}` has no meaning where checkpoints are counted", hint="pass `--per step` too")
        if self.init is not None and (self.profile != "ema" or self.coefficients is not None):
            raise MisuseError("`--init` continues an exponential moving average only")

    @property
    def per_step(self) -> bool:
        """Whether training steps are counted rather than checkpoints."""
        return self.per == "step" or self.half_life is not None or self.profile == "power"

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """One per teacher, in the order given."""
        if self.coefficients is not None:
            return (Profile("given"),)
        if self.half_life is not None:
            return tuple(Profile("ema", half_life=value) for value in _several(self.half_life))
        if self.profile == "power":
            return tuple(Profile("power", sigma_rel=value) for value in _several(self.sigma_rel))
        if self.profile != "ema":
            return (Profile(self.profile),)
        momentum = DEFAULT_MOMENTUM if self.momentum is None else self.momentum
        return tuple(Profile("ema", momentum) for momentum in _several(momentum))


@made_of_known_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructOptions(FoldOptions):
    """What a reconstruction can be asked for: a fold's options, but for those that say how to weigh checkpoints."""

    at: int | None = None
    """Step after which the wanted teacher stood; that of the newest checkpoint otherwise."""

    averages: Mapping[str, str] = field(default_factory=dict)
    """Files of other tools that hold averages, by a pattern of their names: `power:SIGMA_REL` or `ema:MOMENTUM`, begun
    with training; `:EVERY` after it where it was updated every so many steps (ema-pytorch's `update_every`)."""

    def __post_init__(self) -> None:
        if not isinstance(self.averages, Mapping):
            raise MisuseError(
                f"`averages` is a {type(self.averages).__name__}, and must map patterns of names to what they are",
                hint="pass for example `averages={'0.*.pt': 'power:0.05'}`",
            )
        for glob, text in dict(self.averages).items():
            if not isinstance(glob, str) or not glob:
                raise MisuseError("`--average` names no file", hint="pass for example `--average '0.*.pt=power:0.05'`")
            declared_response(glob, text, 1)
        for name in ("per", "between", "init", "coefficients"):
            if getattr(self, name) is not None:
                raise MisuseError(
                    f"`--{name}` says how to weigh checkpoints, which a reconstruction works out", hint="omit it"
                )
        if self.profile == "minus-sqrt":
            raise MisuseError("`--profile minus-sqrt` counts checkpoints, and is no average over training")
        if self.at is not None and (type(self.at) is not int or self.at < 0):
            raise MisuseError(f"`--at` is {self.at!r}, and must be a step")
        FoldOptions.__post_init__(self)

    @property
    def per_step(self) -> bool:
        """Always: a reconstruction is of what training would have made."""
        return True


class FoldKeywords(TypedDict, total=False):
    """The fields of `FoldOptions` as keywords of `fold`, for editors and type checkers."""

    momentum: float | Sequence[float] | None
    half_life: float | Sequence[float] | None
    per: Literal["checkpoint", "step"] | None
    interval: int
    between: Between | None
    steps_per_epoch: int | None
    profile: Literal["ema", "uniform", "minus-sqrt", "power"]
    sigma_rel: float | Sequence[float] | None
    coefficients: PathLike | Mapping[str, float] | None
    skip_buffers: bool
    buffers: Sequence[str]
    model: str | None
    init: PathLike | None
    from_step: int | None
    until_step: int | None
    last: int | None
    include: Sequence[str]
    exclude: Sequence[str]
    state: str | None
    prefix: str | None
    accumulate: Accumulate
    dtype: WrittenDtype
    output_format: Literal["safetensors", "dcp"]
    shard_size_bytes: int | None
    device: str
    memory_budget_bytes: int
    num_threads: int | None
    overwrite: bool
    resume: bool


class ReconstructKeywords(FoldKeywords, total=False):
    """The fields of `ReconstructOptions` as keywords of `reconstruct`."""

    at: int | None
    averages: Mapping[str, str]


def _several(given: Any) -> tuple[float, ...]:
    return given if isinstance(given, tuple) else (given,)


def _as_numbers(name: str, given: object) -> float | tuple[float, ...] | None:
    """A number as a float, several as a tuple of them; raises MisuseError for anything else."""
    if given is None:
        return None
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        try:
            values = tuple(given)
        except TypeError:  # a tensor without dimensions
            raise MisuseError(f"`{name}` is {given!r}, a {type(given).__name__}") from None
        found = tuple(_as_number(name, number) for number in values)
        if not found:
            raise MisuseError(f"`{name}` is an empty list", hint=f"pass for example `{name}=[0.1, 0.2]`")
        if len(set(found)) < len(found):
            option = f"--{name.replace('_', '-')}"
            raise MisuseError(f"`{option} {max(found, key=found.count)}` is given twice")
        return found
    return _as_number(name, given)


def _as_number(name: str, given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise MisuseError(f"`{name}` is {given!r}, a {type(given).__name__}", hint=f"pass `{name}` as a plain number")
    given = (
        given if isinstance(given, (int, float)) else float(given)
    )  # float32(0.1) is told as 0.1, and is 0.10000000149
    if isinstance(given, int) and abs(given) >= MAX_COUNT:
        raise MisuseError(f"`{name}` is larger than any number of steps there can be")
    if name == "momentum":
        check_momentum(given)
    elif name == "sigma_rel":
        gamma_of(given)
    else:
        momentum_of_half_life(given)
    return float(given)
