"""Checkpoints that are folders (Hugging Face, accelerate, diffusers, torchtune): a folder in, its tensors out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_ema.assembly import AssemblyError, StoredTensor, assemble_boxes
from ckpt_ema.byte_ranges import SourceFile, TensorRange, expect_tables
from ckpt_ema.errors import UnreadableCheckpointError, hint_of_permission
from ckpt_ema.formats.contents import Contents, ModelFolder, is_plain_name, read_file, read_json
from ckpt_ema.formats.dcp import is_dcp_folder, read_dcp
from ckpt_ema.formats.deepspeed import folder_of_latest, is_deepspeed_folder, read_deepspeed
from ckpt_ema.formats.json_tables import parse_json
from ckpt_ema.formats.names import is_average_name
from ckpt_ema.formats.pickles import PickledTensor
from ckpt_ema.formats.rank_files import is_rank_folder, read_rank_files
from ckpt_ema.locations import children_of, is_dead_link, may_be_listed

WEIGHTS_SUFFIX = re.compile(r"\.(safetensors|ckpt|bin|pt|pth|pyth|th|pth\.tar|tar|pth\.lora)$", re.IGNORECASE)
SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<index>\d+)-of-(?P<count>\d+)\.(safetensors|bin|pt)$")
# accelerate numbers the models of one save: `model`, `model_1`, ...
MODEL_STEM = re.compile(r"^(?P<model>model|pytorch_model|diffusion_pytorch_model|adapter_model)(_(?P<number>\d+))?$")
# Saved beside the weights by every trainer, and never a student; KAIR's optimizers have the step in front.
NEVER_STUDENTS = re.compile(
    r"^(optimizer|scheduler|scaler|sampler|dl_state_dict|custom_checkpoint|rng_state|rng|random_states|random_state"
    r"|training_args|trainer_state|train_state|extra_state|recipe_state|lr_scheduler|iterator|metadata|optim|opt(?=\d)"
    r"|zero_pp_rank|bf16_zero_pp_rank|events\.out|\d+_optimizer[A-Z]?)([_.\-\d].*)?$"
)
# What trainers call the one file of weights in a folder.
LONE_STEM = re.compile(
    r"^(model|pytorch_model|student|weights|checkpoint|ckpt|state|consolidated|lit_model|model_optim_rng)\."
)
SERIES_STEMS = ("checkpoint", "step", "epoch", "global_step", "iter")
"""How the names of checkpoints that are folders begin, before their number."""

# Folders that are checkpoints by their whole name, whatever their one file is called: `pytorch_lora_weights`.
SERIES_NAME = re.compile(rf"^({'|'.join(SERIES_STEMS)})[-_=]?\d+(-unsharded)?$", re.IGNORECASE)
# Folders of one checkpoint that torch.distributed.checkpoint wrote the model into: accelerate, OLMo, NeMo.
DCP_SUBFOLDER = re.compile(r"^(pytorch_model_fsdp.*|model_and_optim|weights)$")
# Megatron's parts of a model, by tensor, pipeline and expert ranks.
MODEL_PARALLEL = re.compile(r"^mp_rank_\d+(_\d+)*$")
# torch.distributed.checkpoint's safetensors: each rank's pieces of a model that is cut into files.
DCP_SHARD_NAME = re.compile(r"^shard-(?P<rank>\d+)-model-(?P<index>\d+)-of-(?P<count>\d{1,5})\.safetensors$")
SHARDING_KEY = "DCP_SHARDING_INFO"


def is_weights_file_name(name: str) -> bool:
    """Whether a file called `name` may hold a student's weights."""
    return bool(
        WEIGHTS_SUFFIX.search(name)
        and not name.startswith(".")
        and not name.startswith("tmp")
        and not NEVER_STUDENTS.match(name)
        and not SHARD_NAME.match(name)  # a part of a checkpoint is none
    )


def read_folder(folder: Path) -> Contents:
    """Read the tables of a folder that is one checkpoint.

    Several models in it (accelerate's `model_1`, diffusers' `unet` and `unet_ema`) become several entries of the
    tree. Raises UnreadableCheckpointError when a shard is missing, or no weights are found.
    """
    try:
        return _read_folder(folder)
    except OSError as error:
        raise UnreadableCheckpointError(
            f"cannot read `{folder}`: {error.strerror}", hint=hint_of_permission(error, folder)
        ) from error


def _read_folder(folder: Path) -> Contents:
    models = _find_models(folder)
    if not models:
        sharded = _read_sharded(folder)
        if sharded is not None:
            return replace(sharded, path=folder, trainer_state=_read_trainer_state(folder))
        subfolders = [path for path in _folders_in(folder) if not path.name.startswith(".")]
        parts_of_model = [path.name for path in subfolders if MODEL_PARALLEL.match(path.name)]
        if len(parts_of_model) > 1:
            raise UnreadableCheckpointError(
                f"`{folder}` holds a model that is cut into {len(parts_of_model)} parts (tensor or pipeline"
                " parallelism), which is not read",
                details=parts_of_model,
                hint="convert it with Megatron's tools/checkpoint/convert.py to one part, and fold what that writes",
            )
        for subfolder in subfolders:
            for found in _find_models(subfolder).values():
                models[subfolder.name] = found
    if not models:
        raise UnreadableCheckpointError(f"`{folder}` holds no weights")
    trees: dict[str, Any] = {}
    parts: list[Contents] = []
    for key, files in models.items():
        contents = _read_model(files)
        trees[key] = contents.tree
        parts.append(contents)
    model_folders = {key: ModelFolder(files[0].parent, _weights_name(files[0])) for key, files in models.items()}
    trainer_state = _read_trainer_state(folder)
    if len(models) == 1:
        (only,), (model_folder,) = parts, model_folders.values()
        return Contents(
            folder,
            f"folder with {only.format}",
            only.files,
            only.tree,
            only.metadata,
            only.locator,
            {"": model_folder},
            trainer_state=trainer_state,
        )
    trees = {
        key: {**_other_entries(part), **part.locate(_flat_tensors(part))}
        for key, part in zip(trees, parts, strict=True)
    }
    files_of_all = tuple(file for part in parts for file in part.files)
    return Contents(
        folder,
        f"folder with {len(models)} models",
        files_of_all,
        trees,
        folders=model_folders,
        trainer_state=trainer_state,
    )


def has_weights(folder: Path) -> bool:
    """Whether `folder` itself holds weights that `read_folder` would read; no file is opened."""
    return bool(_find_models(folder, check=False))


def nameless_models(names: Collection[str]) -> set[str]:
    """Those of a folder's files that say by their names that they are models, and not which ones.

    `model_1000.pt` is a checkpoint by itself; what accelerate saves side by side, `model`, `model_1`, ..., is none.
    """
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stem = WEIGHTS_SUFFIX.sub("", name)
        if MODEL_STEM.match(stem):
            stems[name.removeprefix(stem)].append(stem)
    return {
        stem + suffix
        for suffix, found in stems.items()
        for beside in [_models_side_by_side(found) if suffix in (".safetensors", ".bin") else set()]
        for stem in found
        if not stem[-1].isdigit() or stem in beside
    }


def _models_side_by_side(stems: Collection[str]) -> set[str]:
    """Of several models in one save: `model_1`, `model_2`, ..., counted without a gap from `model` on."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for stem in stems:
        match = MODEL_STEM.match(stem)
        if match and match["number"]:
            numbers[match["model"]].add(int(match["number"]))
    return {
        f"{model}_{number}"
        for model, found in numbers.items()
        if model in stems and max(found) == len(found)
        for number in found
    }


def _find_models(folder: Path, *, check: bool = True) -> dict[str, list[Path]]:
    """Weight files by model: one file each, or the index or the shards of one."""
    names = [path.name for path in children_of(folder) if not is_dead_link(path) and path.is_file()]
    models: dict[str, list[Path]] = {}
    # The order of preference is that of Transformers: one safetensors file, its shards, then the older pickles.
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"):
        for name in names:
            stem = name.removesuffix(suffix)
            if not name.endswith(suffix) or not MODEL_STEM.match(stem):
                continue
            key = stem.replace("pytorch_model", "model") if stem.startswith("pytorch_model") else stem
            models.setdefault(key, [folder / name])
    beside = _models_side_by_side(models)
    models = {key: files for key, files in models.items() if not key[-1].isdigit() or key in beside}
    if "model" in models and "adapter_model" in models:
        # A folder with a whole model and an adapter: the adapter is what was trained on top of it.
        del models["model"]
    if not models:
        models = _find_shards_without_index(folder, names, check=check)
    return models


def _find_shards_without_index(folder: Path, names: list[str], *, check: bool) -> dict[str, list[Path]]:
    pieces = [(match, folder / name) for name in names if (match := DCP_SHARD_NAME.match(name))]
    if pieces:
        ranks = {int(match["rank"]) for match, _ in pieces}
        files = {int(match["index"]) for match, _ in pieces}
        if check and ranks != set(range(1, len(ranks) + 1)):
            raise UnreadableCheckpointError(f"`{folder}` has the shards of {len(ranks)} of {max(ranks)} ranks")
        count = max(int(match["count"]) for match, _ in pieces)
        if check and files != set(range(1, count + 1)):
            raise UnreadableCheckpointError(f"`{folder}` has {len(files)} of the {count} files that ranks wrote")
        return {"model": [path for _, path in pieces]}
    shards: dict[tuple[str, int], list[tuple[int, Path]]] = defaultdict(list)
    for name in names:
        match = SHARD_NAME.match(name)
        if match:
            shards[match["stem"], int(match["count"])].append((int(match["index"]), folder / name))
    models = {}
    for (stem, count), found in shards.items():
        indices = sorted(index for index, _ in found)
        if check and indices not in (list(range(1, count + 1)), list(range(count))):
            raise UnreadableCheckpointError(f"`{folder}` has {len(found)} of {count} shards of `{stem}`")
        models[stem] = [path for _, path in sorted(found)]
    if models:
        return models
    # Last resort, a folder around one single file of weights; several would be several checkpoints.
    single = [name for name in names if is_weights_file_name(name) and name != "train.pt"]  # OLMo's trainer
    if len(single) == 1 and (LONE_STEM.match(single[0]) or _is_of_series(folder, single[0])):
        return {"model": [folder / single[0]]}
    return {}


def _is_of_series(folder: Path, name: str) -> bool:
    """Whether the folder's name counts, the file's does not, and nothing else there is the model.

    Not many ranks' files beside it, nor a folder with a model of its own.
    """
    return (
        SERIES_NAME.match(folder.name) is not None
        and not re.search(r"\d", stem := WEIGHTS_SUFFIX.sub("", name))
        and not is_average_name(stem)
        and not is_sharded(folder)
        and folder_of_latest(folder) is None
        and not any(_find_models(child, check=False) for child in _folders_in(folder))
    )


def _folders_in(folder: Path) -> list[Path]:
    """The folders one level down, but for those that may not be listed."""
    folders = [child for child in children_of(folder) if not is_dead_link(child) and child.is_dir()]
    return [child for child in folders if may_be_listed(child)]


def _weights_name(path: Path) -> str:
    name = path.name
    shard = SHARD_NAME.match(name)
    stem = shard["stem"] if shard else re.sub(r"(\.index\.json)$", "", name)
    stem = WEIGHTS_SUFFIX.sub("", stem)
    return stem if stem in ("adapter_model", "diffusion_pytorch_model") else "model"


def _read_model(files: list[Path]) -> Contents:
    first = files[0]
    if first.name.endswith(".index.json"):
        return _read_shards(first.parent, *_read_index(first))
    if DCP_SHARD_NAME.match(first.name):
        return _read_pieces(first.parent, files)
    if len(files) > 1:
        return _read_shards(first.parent, files, None)
    return read_file(first)


def _read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableCheckpointError(f"`{path}` has no `weight_map`")
    for name, shard in weight_map.items():
        # An index is untrusted: a shard is a file beside it, never a path to somewhere else.
        if not is_plain_name(shard):
            raise UnreadableCheckpointError(
                f"`{path}` says that `{name}` lies in a file that is none: {ascii(shard)[:80]}"
            )
    shards = [path.parent / shard for shard in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UnreadableCheckpointError(
            f"`{path.parent}` lacks {len(missing)} of its {len(shards)} shards", details=missing
        )
    return shards, weight_map


def _read_shards(folder: Path, shards: list[Path], weight_map: dict[str, str] | None) -> Contents:
    tensors: dict[str, StoredTensor] = {}
    others: dict[str, Any] = {}
    homes: dict[str, str] = {}
    files: list[SourceFile] = []
    metadata: Mapping[str, str] = {}
    expect_tables(shards)
    for shard in shards:
        contents = read_file(shard)
        files += contents.files
        metadata = metadata or contents.metadata
        others |= _other_entries(contents)
        for name, tensor in contents.locate(_flat_tensors(contents)).items():
            if name in tensors:
                raise UnreadableCheckpointError(f"`{folder}`: `{homes[name]}` and `{shard.name}` both hold `{name}`")
            tensors[name] = tensor
            homes[name] = shard.name
    for name, shard_name in (weight_map or {}).items():
        if homes.get(name) != shard_name and name not in others:
            raise UnreadableCheckpointError(
                f"`{folder}`: the index says that `{shard_name}` holds `{name}`, which it does not"
            )
    if weight_map is not None and len(homes) > len(weight_map):
        extra = next(name for name in homes if name not in weight_map)
        raise UnreadableCheckpointError(f"`{folder}`: `{homes[extra]}` holds `{extra}`, which the index does not know")
    kind = "safetensors" if shards[0].suffix == ".safetensors" else "torch.save"
    return Contents(folder, f"{len(shards)} {kind} shards", tuple(files), {**others, **tensors}, metadata)


def _read_pieces(folder: Path, files: list[Path]) -> Contents:
    """Safetensors files of which each holds one rank's boxes of the tensors; metadata says where these begin."""
    pieces: dict[str, list[tuple[tuple[int, ...], TensorRange]]] = defaultdict(list)
    sources: list[SourceFile] = []
    expect_tables(files)
    for path in files:
        contents = read_file(path)
        sources += contents.files
        try:
            begins = parse_json(contents.metadata.get(SHARDING_KEY, "null"))
        except (ValueError, RecursionError):
            begins = None
        for name, tensor in _flat_tensors(contents).items():
            entry = begins.get(name) if isinstance(begins, dict) else None
            offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
            if (
                not isinstance(tensor, TensorRange)
                or not isinstance(offsets, list)
                or len(offsets) != len(tensor.shape)
                or not all(type(offset) is int and 0 <= offset < 1 << 62 for offset in offsets)
            ):
                raise UnreadableCheckpointError(f"`{path}` does not say which part of `{name}` it holds")
            pieces[name].append((tuple(offsets), tensor))
    tensors: dict[str, StoredTensor] = {}
    for name, parts in pieces.items():
        filled = [part for part in parts if 0 not in part[1].shape] or parts
        ends = zip(*(map(int.__add__, offsets, tensor.shape) for offsets, tensor in filled), strict=True)
        try:
            tensors[name] = assemble_boxes(filled[0][1].dtype, tuple(map(max, ends)), filled)
        except AssemblyError as error:
            raise UnreadableCheckpointError(f"`{folder}`: tensor `{name}` {error}") from None
    return Contents(folder, f"safetensors of {len(files)} ranks", tuple(sources), tensors)


def _flat_tensors(contents: Contents) -> dict[str, TensorRange | PickledTensor]:
    if not isinstance(contents.tree, dict):
        raise UnreadableCheckpointError(f"`{contents.path}` holds no state dict")
    return {str(name): leaf for name, leaf in contents.tree.items() if isinstance(leaf, (TensorRange, PickledTensor))}


def _other_entries(contents: Contents) -> dict[str, Any]:
    """What of a flat state dict is no tensor that can be located: whoever chooses the student says so."""
    tree = contents.tree if isinstance(contents.tree, dict) else {}
    return {str(name): leaf for name, leaf in tree.items() if not isinstance(leaf, (TensorRange, PickledTensor))}


def _read_trainer_state(folder: Path) -> dict[str, Any]:
    path = folder / "trainer_state.json"
    return read_json(path) if path.is_file() else {}


def is_sharded(folder: Path) -> bool:
    """Whether ranks saved their parts of one checkpoint into `folder`."""
    return _sharded_folder(folder) is not None


def _sharded_folder(folder: Path) -> Path | None:
    """The folder that the files of a sharded checkpoint lie in: this one, or the model's below it."""
    if is_dcp_folder(folder) or is_deepspeed_folder(folder) or is_rank_folder(folder):
        return folder
    for child in children_of(folder):
        if DCP_SUBFOLDER.match(child.name) and child.is_dir() and may_be_listed(child) and is_dcp_folder(child):
            return child
    return None


def _read_sharded(folder: Path) -> Contents | None:
    found = _sharded_folder(folder) or folder_of_latest(folder)
    if found is None:
        return None
    if is_rank_folder(found):
        return read_rank_files(found)
    return read_dcp(found) if is_dcp_folder(found) else read_deepspeed(found)
