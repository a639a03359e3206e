"""Run directories as the frameworks leave them, written here with torch.save: who is folded, and in what order."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_ema
from tests.conftest import Outcome, StateDict, assert_same_bits, hook_teacher, make_student, quiet_fold, save_students

MOMENTUM = 0.2
BUFFERS = ("bn.running_mean",)
STUDENTS = [make_student(seed) for seed in range(1, 5)]

Writer = Callable[[Path, list[StateDict]], list[int]]


def make_average(index: int) -> StateDict:
    """An average that lies beside student `index`: the same tensors, other values."""
    return make_student(1000 + index)


def with_prefix(prefix: str, state: StateDict) -> StateDict:
    """The same tensors, `prefix` before each name."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def optimizer_state() -> dict[str, Any]:
    """A real Adam state: tensors that are no student."""
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def plan(run: Path | Sequence[Path], **options: Any) -> ckpt_ema.FoldPlan:
    """The plan with the tests' momentum."""
    return ckpt_ema.plan(run, **{"momentum": MOMENTUM, **options})


def names_of(planned: ckpt_ema.FoldPlan) -> list[str]:
    """Checkpoints that take part, in the order they are folded."""
    return [checkpoint.name for checkpoint in planned.checkpoints]


def steps_of(planned: ckpt_ema.FoldPlan) -> list[int | None]:
    """Their steps."""
    return [checkpoint.step for checkpoint in planned.checkpoints]


def fold(run: Path | Sequence[Path], tmp_path: Path, **options: Any) -> tuple[ckpt_ema.FoldPlan, StateDict]:
    """Fold into a file outside the run; the plan and the teacher's tensors."""
    output = tmp_path / "out.safetensors"
    report = ckpt_ema.fold(
        run, output, announce=lambda planned: None, **{"momentum": MOMENTUM, "overwrite": True, **options}
    )
    return report.plan, load_file(output)


def assert_folds_to(
    run: Path | Sequence[Path], tmp_path: Path, students: Sequence[StateDict], **options: Any
) -> ckpt_ema.FoldPlan:
    """Folding `run` gives the hook's teacher of `students`; BatchNorm's buffers are recognised by name."""
    planned, teacher = fold(run, tmp_path, **options)
    buffers = [name for name in students[0] if name.endswith(BUFFERS)]
    assert_same_bits(teacher, hook_teacher(students, MOMENTUM, buffers))
    return planned


def save_named(run: Path, pattern: str, numbers: Sequence[object]) -> None:
    """The students in a new run directory, each under `pattern` with its number."""
    run.mkdir()
    for number, student in zip(numbers, STUDENTS, strict=True):
        torch.save(student, run / pattern.format(number))


def refusal_of(run: Path | Sequence[Path], **options: Any) -> ckpt_ema.CkptEmaError:
    """The error that planning this run ends with."""
    with pytest.raises(ckpt_ema.CkptEmaError) as caught:
        plan(run, **options)
    return caught.value


# Layouts of frameworks: each writer returns the steps in the order they must be folded -------------------------------


def write_timm(run: Path, students: list[StateDict]) -> list[int]:
    """timm's CheckpointSaver: epochs with gaps, the best and the last as hard links."""
    epochs = [3, 9, 10, 100]
    for index, (epoch, student) in enumerate(zip(epochs, students, strict=True)):
        path = run / f"checkpoint-{epoch}.pth.tar"
        torch.save(
            {
                "epoch": epoch,
                "arch": "resnet50",
                "state_dict": OrderedDict(student),
                "optimizer": optimizer_state(),
                "version": 2,
                "args": argparse.Namespace(model="resnet50", lr=0.1, mean=None, hflip=0.5),
                "amp_scaler": {"scale": 65536.0},
                "state_dict_ema": OrderedDict(make_average(index)),
                "metric": 77.5,
            },
            path,
        )
        if epoch == 9:
            os.link(path, run / "model_best.pth.tar")
    os.link(path, run / "last.pth.tar")
    (run / "summary.csv").write_text("epoch,loss\n3,0.5\n")
    (run / "args.yaml").write_text("model: resnet50\n")
    return epochs


def write_torchvision(run: Path, students: list[StateDict]) -> list[int]:
    """references/classification with --model-ema: model_E.pth, and checkpoint.pth saved once more."""
    for epoch, student in enumerate(students, start=8):
        checkpoint = {
            "model": OrderedDict(student),
            "optimizer": optimizer_state(),
            "lr_scheduler": {"last_epoch": epoch, "_step_count": epoch + 1},
            "epoch": epoch,
            "args": argparse.Namespace(data_path="/data", output_dir="."),
            "model_ema": OrderedDict(n_averaged=torch.tensor(epoch), **with_prefix("module.", make_average(epoch))),
        }
        torch.save(checkpoint, run / f"model_{epoch}.pth")
        torch.save(checkpoint, run / "checkpoint.pth")
    return [8, 9, 10, 11]


def write_detectron2(run: Path, students: list[StateDict]) -> list[int]:
    """fvcore's PeriodicCheckpointer: 0-based iterations, and the last one again as model_final.pth."""
    iterations = [4999, 9999, 14999, 89999]
    for iteration, student in zip(iterations, students, strict=True):
        checkpoint = {
            "model": student,
            "optimizer": optimizer_state(),
            "scheduler": {"last_epoch": iteration + 1},
            "iteration": iteration,
        }
        torch.save(checkpoint, run / f"model_{iteration:07d}.pth")
    torch.save(checkpoint, run / "model_final.pth")
    (run / "last_checkpoint").write_text("model_final.pth")
    (run / "metrics.json").write_text('{"iteration": 4999}\n')
    return iterations


def write_detectron2_ending_between(run: Path, students: list[StateDict]) -> list[int]:
    """fvcore where the last iteration is no multiple of the period: model_final.pth is a checkpoint of its own."""
    iterations = [4999, 9999, 14999, 15699]
    names = ["model_0004999.pth", "model_0009999.pth", "model_0014999.pth", "model_final.pth"]
    for iteration, name, student in zip(iterations, names, students, strict=True):
        torch.save({"model": student, "iteration": iteration}, run / name)
    (run / "last_checkpoint").write_text("model_final.pth")
    return iterations


def write_fairseq(run: Path, students: list[StateDict]) -> list[int]:
    """fairseq: checkpoint_E_U.pt, one at an epoch's end, and copies called best and last."""
    updates = [900, 1000, 1200, 10000]
    names = ["checkpoint_1_900.pt", "checkpoint_1_1000.pt", "checkpoint1.pt", "checkpoint_2_10000.pt"]
    for update, name, student in zip(updates, names, students, strict=True):
        torch.save(
            {
                "args": argparse.Namespace(arch="transformer"),
                "cfg": {"model": {"arch": "transformer"}},
                "model": OrderedDict(student),
                "criterion": {},
                "optimizer_history": [
                    {"criterion_name": "CrossEntropyCriterion", "num_updates": 100},
                    {"criterion_name": "CrossEntropyCriterion", "num_updates": update},
                ],
                "task_state": {},
                "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": update}, "val_loss": 3.5},
                "last_optimizer_state": optimizer_state(),
            },
            run / name,
        )
    shutil.copy(run / names[1], run / "checkpoint_best.pt")
    shutil.copy(run / names[3], run / "checkpoint_last.pt")
    return updates


def write_torchtune(run: Path, students: list[StateDict], *, stem: str = "model") -> list[int]:
    """torchtune: epoch_E/ in the Hugging Face manner, the recipe's state in a folder beside them."""
    for epoch, student in enumerate(students):
        folder = run / f"epoch_{epoch}"
        folder.mkdir()
        names = sorted(student)
        weight_map = {}
        for index, part in enumerate((names[:2], names[2:]), start=1):
            shard = f"{stem}-{index:05d}-of-00002.safetensors"
            save_file({name: student[name] for name in part}, folder / shard, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, shard))
        table = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(table))
        (folder / "config.json").write_text('{"model_type": "llama"}')
    (run / "recipe_state").mkdir()
    torch.save({"epochs_run": 4, "optimizer": optimizer_state()}, run / "recipe_state" / "recipe_state.pt")
    torch.save({"epochs_run": 4, "optimizer": optimizer_state()}, folder / "recipe_state.pt")
    (run / "logs").mkdir()
    (run / "logs" / "log_1.txt").write_text("Step 1 | loss:0.5\n")
    return [0, 1, 2, 3]


def write_older_torchtune(run: Path, students: list[StateDict]) -> list[int]:
    """torchtune 0.5 called its shards `ft-model-...`."""
    return write_torchtune(run, students, stem="ft-model")


def composer_checkpoint(student: StateDict, batch: int, algorithms: Any, *, wrapped: bool) -> dict[str, Any]:
    """What Composer's CheckpointSaver writes."""
    timestamp = {"epoch": batch // 100, "batch": batch, "sample": batch * 8, "token": 0, "epoch_in_iteration": 0}
    return {
        "state": {
            "model": OrderedDict(with_prefix("module.", student)),
            "optimizers": {"AdamW": optimizer_state()},
            "schedulers": {"CosineAnnealingScheduler": {"last_epoch": batch}},
            "algorithms": algorithms,
            "callbacks": [("SpeedMonitor", {"total_eval_wct": 0.0})],
            "timestamp": {"Timestamp": timestamp} if wrapped else timestamp,
            "train_metrics": {},
            "run_name": "1700000000-lucky-owl",
        },
        "rng": [{"python": (3, (1, 2), None), "torch": torch.zeros(16, dtype=torch.uint8)}],
    }


def write_composer(run: Path, students: list[StateDict]) -> list[int]:
    """Composer: epE-baB-rank0.pt, the newest as a symbolic link."""
    batches = [80, 90, 100, 1000]
    for index, (batch, student) in enumerate(zip(batches, students, strict=True)):
        name = f"ep{batch // 100}-ba{batch}-rank0.pt"
        torch.save(composer_checkpoint(student, batch, [], wrapped=index % 2 == 0), run / name)
    (run / "latest-rank0.pt").symlink_to(name)
    return batches


def write_nemo(run: Path, students: list[StateDict]) -> list[int]:
    """NeMo with its EMA callback: every checkpoint has a `-EMA` twin, the newest a `-last` one."""
    steps = [90, 100, 200, 1000]
    for index, (step, student) in enumerate(zip(steps, students, strict=True)):
        names = [f"megatron_gpt--val_loss=2.5-step={step}-consumed_samples={step * 8}"]
        if index == len(steps) - 1:
            names.append(f"{names[0]}-last")
        for name in names:
            for suffix, state in (("", student), ("-EMA", make_average(index))):
                torch.save(
                    {
                        "epoch": 0,
                        "global_step": step,
                        "pytorch-lightning_version": "2.4.0",
                        "state_dict": OrderedDict(state),
                        "loops": {"fit_loop": {}},
                        "callbacks": {"EMA": {}},
                        "optimizer_states": [optimizer_state()],
                        "lr_schedulers": [],
                    },
                    run / f"{name}{suffix}.ckpt",
                )
    return steps


def write_dino(run: Path, students: list[StateDict]) -> list[int]:
    """DINO: student (under DDP) and teacher side by side, the newest again as checkpoint.pth."""
    for epoch, student in enumerate(students, start=9):
        checkpoint = {
            "student": OrderedDict(with_prefix("module.", student)),
            "teacher": OrderedDict(make_average(epoch)),
            "optimizer": optimizer_state(),
            "epoch": epoch + 1,
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": OrderedDict(center=torch.zeros(1, 16)),
            "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 0},
        }
        torch.save(checkpoint, run / "checkpoint.pth")
        torch.save(checkpoint, run / f"checkpoint{epoch:04d}.pth")
    return [10, 11, 12, 13]


def write_mean_teacher_lightning(run: Path, students: list[StateDict]) -> list[int]:
    """A LightningModule with `student` and `teacher` sub-modules and a loss with a parameter."""
    steps = [5, 10, 15, 100]
    for epoch, (step, student) in enumerate(zip(steps, students, strict=True)):
        state = {
            **with_prefix("student.", student),
            **with_prefix("teacher.", make_average(epoch)),
            "loss.weight": torch.ones(2),
        }
        torch.save(
            {"state_dict": state, "global_step": step, "epoch": epoch, "hyper_parameters": {"lr": 0.1}},
            run / f"epoch={epoch}-step={step}.ckpt",
        )
    shutil.copy(run / "epoch=3-step=100.ckpt", run / "last.ckpt")
    return steps


def write_diffusers(run: Path, students: list[StateDict]) -> list[int]:
    """A diffusers training script with --use_ema: unet/ is raw, unet_ema/ the average."""
    steps = [500, 1000, 1500, 10000]
    for step, student in zip(steps, students, strict=True):
        folder = run / f"checkpoint-{step}"
        for name, state in (("unet", student), ("unet_ema", make_average(step))):
            (folder / name).mkdir(parents=True)
            save_file(state, folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            (folder / name / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        torch.save(optimizer_state(), folder / "optimizer.bin")
        torch.save({"last_epoch": step}, folder / "scheduler.bin")
        torch.save({"step": step, "random_state": (3, (1,), None)}, folder / "random_states_0.pkl")
    return steps


def write_mmengine(run: Path, students: list[StateDict]) -> list[int]:
    """MMEngine by epoch: the count of iterations in `meta`, the best one again, a text file naming the last."""
    for epoch, student in enumerate(students, start=8):
        checkpoint = {
            "meta": {"epoch": epoch, "iter": epoch * 50, "mmengine_version": "0.10.7", "seed": 0, "cfg": "a = 1"},
            "state_dict": OrderedDict(student),
            "message_hub": {"log_scalars": {}, "runtime_info": {}},
            "optimizer": optimizer_state(),
            "param_schedulers": [{"last_step": epoch}],
        }
        torch.save(checkpoint, run / f"epoch_{epoch}.pth")
        if epoch == 9:
            torch.save(checkpoint, run / "best_coco_bbox_mAP_epoch_9.pth")
    (run / "last_checkpoint").write_text(str(run / "epoch_11.pth"))
    return [400, 450, 500, 550]


WRITERS = (
    write_timm,
    write_torchvision,
    write_detectron2,
    write_detectron2_ending_between,
    write_fairseq,
    write_torchtune,
    write_older_torchtune,
    write_composer,
    write_nemo,
    write_dino,
    write_mean_teacher_lightning,
    write_diffusers,
    write_mmengine,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_raw_students_of_a_framework_are_folded_in_step_order(tmp_path: Path, write: Writer) -> None:
    """The raw student of each checkpoint once, oldest first, without averages, copies and optimizer states."""
    run = tmp_path / "run"
    run.mkdir()
    steps = write(run, STUDENTS)
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert steps_of(planned) == steps
    assert not planned.warnings or all("keeps" in warning for warning in planned.warnings)


def test_timm_recovery_file_of_the_same_epoch_is_refused_until_excluded(tmp_path: Path) -> None:
    """recovery-E-B.pth.tar has the epoch of checkpoint-E: the user says which one counts."""
    run = tmp_path / "run"
    run.mkdir()
    write_timm(run, STUDENTS)
    torch.save({"epoch": 10, "state_dict": make_student(50)}, run / "recovery-10-400.pth.tar")
    error = refusal_of(run)
    assert "10" in error.message
    assert "--exclude" in (error.hint or "")
    assert_folds_to(run, tmp_path, STUDENTS, exclude=("recovery-*",))


# Prefixes and plain scripts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", ["model", ""])
def test_wrappers_before_every_name_are_taken_off(tmp_path: Path, prefix: str, key: str) -> None:
    """DDP's `module.` and torch.compile's `_orig_mod.` are not part of the teacher's names."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        state = with_prefix(prefix, student)
        torch.save({key: state} if key else state, run / f"step_{step}.pt")
    assert_folds_to(run, tmp_path, STUDENTS)


def test_compiled_sub_models_lose_their_mark_in_the_middle(tmp_path: Path) -> None:
    """`backbone._orig_mod.fc` is `backbone.fc`."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        torch.save(with_prefix("backbone._orig_mod.", student), run / f"step_{step}.pt")
    assert_folds_to(run, tmp_path, [with_prefix("backbone.", student) for student in STUDENTS])


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_prefixes_that_belong_to_the_model_stay(tmp_path: Path, prefix: str) -> None:
    """`model.` is taken off only on request, and `module.` only where every name carries it."""
    run = tmp_path / "run"
    run.mkdir()
    states = [{**with_prefix(prefix, student), "head.weight": student["fc.weight"].clone()} for student in STUDENTS]
    for step, state in enumerate(states):
        torch.save({"state_dict": state}, run / f"step_{step}.pt")
    assert_folds_to(run, tmp_path, states)
    assert_folds_to(run, tmp_path, STUDENTS, prefix=prefix)


def test_model_prefix_of_every_name_stays_until_asked_for(tmp_path: Path) -> None:
    """A LightningModule's `model.` on all names is kept, `--prefix model.` strips it."""
    run = tmp_path / "run"
    run.mkdir()
    states = [with_prefix("model.", student) for student in STUDENTS]
    for step, state in enumerate(states):
        torch.save({"state_dict": state}, run / f"step_{step}.pt")
    assert_folds_to(run, tmp_path, states)
    for prefix in ("model.", "model"):
        assert_folds_to(run, tmp_path, STUDENTS, prefix=prefix)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "net", "network", "my_model", ""])
def test_plain_scripts_put_the_student_under_any_key(tmp_path: Path, key: str, legacy: bool) -> None:
    """The student is found under every usual key, an unusual one or none, beside optimizer, scheduler and numbers."""
    run = tmp_path / "run"
    run.mkdir()
    for index, student in enumerate(STUDENTS):
        rest = {
            "optimizer": optimizer_state(),
            "optimizer_state_dict": optimizer_state(),
            "scheduler": {"last_epoch": 1, "base_lrs": [0.1]},
            "scaler": {"scale": 1.0},
            "loss": torch.tensor(0.5),
            "best_acc": np.float64(0.5),
            "history": [0.25, np.float32(0.5)],
            "rng_state": torch.get_rng_state(),
        }
        content = {**rest, key: student} if key else student
        torch.save(content, run / f"ckpt_{index + 8}.pt", _use_new_zipfile_serialization=not legacy)
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [8, 9, 10, 11]


@pytest.mark.parametrize("key", ["step", "global_step", "iteration", "iter", "update", "batch_idx_train", "epoch"])
def test_plain_scripts_record_their_step_under_any_key(tmp_path: Path, key: str) -> None:
    """A step recorded inside orders files whose names say nothing."""
    run = tmp_path / "run"
    run.mkdir()
    steps = [9, 10, 100, 1000]
    for name, step, student in zip(("delta", "alpha", "gamma", "beta"), steps, STUDENTS, strict=True):
        torch.save({"model": student, key: step}, run / f"{name}.pt")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert steps_of(planned) == steps
    assert {item.unit for item in planned.checkpoints} == {"epoch" if "epoch" in key else "step"}


@pytest.mark.parametrize("stray", ["rng_state", "fixed_noise", "class_weights", "loss"])
def test_a_tensor_beside_the_student_is_not_the_student(tmp_path: Path, stray: str) -> None:
    """A lone tensor at the top level never wins over the state dict beside it."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        value = torch.tensor(0.5) if stray == "loss" else torch.ones(8)
        torch.save({stray: value, "backbone": student, "step": step}, run / f"step_{step}.pt")
    assert_folds_to(run, tmp_path, STUDENTS)


@pytest.mark.parametrize("outer", ["model.", "module.model.", "net.inner."])
def test_student_and_teacher_are_told_apart_below_a_common_prefix(tmp_path: Path, outer: str) -> None:
    """A mean-teacher pair inside one sub-model: the student's part is folded, never both."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        state = {
            **with_prefix(f"{outer}student.", student),
            **with_prefix(f"{outer}teacher.", make_average(step)),
        }
        torch.save({"state_dict": state}, run / f"step_{step}.pt")
    assert_folds_to(run, tmp_path, STUDENTS)


def test_a_state_dict_two_levels_down_is_found(tmp_path: Path) -> None:
    """`{"checkpoint": {"model": ...}}` is opened by itself."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        torch.save({"checkpoint": {"model": student, "note": "x"}, "meta": {"a": 1}}, run / f"step_{step}.pt")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert planned.checkpoints[0].state_key == "checkpoint.model"


def test_sub_models_under_one_key_are_one_student(tmp_path: Path) -> None:
    """`{"model": {"encoder": {...}, "decoder": {...}}}` is folded as a whole, the parts' names in front."""
    run = tmp_path / "run"
    run.mkdir()
    flat = []
    for step, student in enumerate(STUDENTS):
        other = make_average(step)
        torch.save({"model": {"encoder": student, "decoder": other}, "step": step}, run / f"step_{step}.pt")
        flat.append({**with_prefix("encoder.", student), **with_prefix("decoder.", other)})
    assert_folds_to(run, tmp_path, flat)
    assert_folds_to(run, tmp_path, STUDENTS, prefix="encoder.")
    assert_folds_to(run, tmp_path, STUDENTS, state="model.encoder")


@pytest.mark.parametrize(
    "part",
    ["metanet", "random_proj", "argsorter", "config_head", "optimal_head", "schedule_embed", "metric_head", "lossNet"],
)
def test_sub_models_called_nearly_as_a_trainers_own_are_folded(tmp_path: Path, part: str) -> None:
    """A name that only begins as `meta`, `random_state` or `args` do is a part of the model."""
    run = tmp_path / "run"
    run.mkdir()
    flat = []
    for step, student in enumerate(STUDENTS):
        other = make_average(step)
        torch.save({"model": {part: other, "head": student}, "optimizer": optimizer_state()}, run / f"step_{step}.pt")
        flat.append({**with_prefix(f"{part}.", other), **with_prefix("head.", student)})
    assert_folds_to(run, tmp_path, flat)


def test_what_a_trainer_keeps_among_sub_models_is_told(tmp_path: Path) -> None:
    """Tensors that are left out of the model for their table's name are named; the optimizer's place is known."""
    run = tmp_path / "run"
    run.mkdir()
    flat = []
    for step, student in enumerate(STUDENTS):
        other = make_average(step)
        model = {"encoder": student, "decoder": other, "criterion": student, "rng_state": {"seed": 1}}
        torch.save({"model": model, "optimizer": {"exp_avg": student}}, run / f"step_{step}.pt")
        flat.append({**with_prefix("encoder.", student), **with_prefix("decoder.", other)})
    planned = assert_folds_to(run, tmp_path, flat)
    assert planned.left_out_tensors == (("model.criterion", "the trainer's, by its name"),)


PAIRS = {
    "moco v2": ("encoder_q.", "encoder_k."),
    "moco v3": ("base_encoder.", "momentum_encoder."),
    "byol": ("online_encoder.", "target_encoder."),
    "solo-learn": ("backbone.", "momentum_backbone."),
    "lightly": ("backbone.", "backbone_momentum."),
    "online and target": ("net_online.", "net_target."),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_momentum_encoder_is_no_part_of_the_student(tmp_path: Path, pair: str) -> None:
    """What follows the student inside a self-supervised model is left out by its name, where it mirrors the student."""
    run = tmp_path / "run"
    run.mkdir()
    online, target = PAIRS[pair]
    students = []
    for step, student in enumerate(STUDENTS):
        head = {"predictor.weight": torch.full((2, 2), float(step))}
        students.append({**with_prefix(online, student), **head})
        torch.save({"state_dict": {**students[-1], **with_prefix(target, make_average(step))}}, run / f"step_{step}.pt")
    planned = assert_folds_to(run, tmp_path, students)
    assert dict(planned.left_out_tensors) == {f"{target}{name}": f"an average (`{target}`)" for name in STUDENTS[0]}


@pytest.mark.parametrize(
    "parts",
    [
        ("backbone.", "target_head."),
        ("source_embedding.", "target_embedding."),
        ("encoder_source.", "encoder_target."),
        ("head.", "target_head."),
        ("momentum_net.",),
        ("encoder_k.",),
    ],
)
def test_a_layer_called_target_is_the_students(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """A name makes no average without what it follows, by name and tensor by tensor."""
    run = tmp_path / "run"
    run.mkdir()
    states = []
    for step, student in enumerate(STUDENTS):
        tensors = [student, make_average(step)]
        named = [with_prefix(part, tensor) for part, tensor in zip(parts, tensors, strict=False)]
        states.append({name: tensor for each in named for name, tensor in each.items()})
        torch.save(states[-1], run / f"step_{step}.pt")
    buffers = [name for name in states[0] if name.endswith("running_mean")]
    _, teacher = fold(run, tmp_path)
    assert_same_bits(teacher, hook_teacher(states, MOMENTUM, buffers))


def test_an_optimizer_among_the_tensors_is_left_out(tmp_path: Path) -> None:
    """Megatron's distributed checkpoints name the model and its optimizer in one table."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        beside = {**with_prefix("optimizer.state.fp32_param.", student), **with_prefix("optimizer.state.mu.", student)}
        torch.save({**student, **beside}, run / f"step_{step}.pt")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert {reason for _, reason in planned.left_out_tensors} == {"the trainer's, by its name"}
    assert len(planned.left_out_tensors) == 2 * len(STUDENTS[0])


def test_which_half_of_mmcvs_ema_hook_is_the_student_is_asked(tmp_path: Path) -> None:
    """MMCV 1.x swaps the average in before or after saving, by its priority: both choices are offered, and work."""
    run = tmp_path / "run"
    run.mkdir()
    averages = [make_average(k) for k in range(4)]
    parameters = [name for name in STUDENTS[0] if not name.startswith("bn.running") and "batches" not in name]
    for step, (student, average) in enumerate(zip(STUDENTS, averages, strict=True), 1):
        twins = {f"ema_{name.replace('.', '_')}": average[name] for name in parameters}
        meta = {"mmcv_version": "1.7.1", "epoch": step, "iter": 10 * step}
        torch.save({"meta": meta, "state_dict": {**student, **twins}}, run / f"epoch_{step}.pth")
    error = refusal_of(run)
    assert "holds two models of MMCV's EMAHook" in error.message
    assert error.hint is not None
    assert "`--prefix ema_`" in error.hint
    assert "`--state state_dict`" in error.hint
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS, state="state_dict")) == [10, 20, 30, 40]
    pairs = zip(STUDENTS, averages, strict=True)
    swapped = [{**student, **{name: average[name] for name in parameters}} for student, average in pairs]
    part = [{name[3:]: tensor for name, tensor in each.items() if name.startswith("fc.")} for each in swapped]
    assert_folds_to(run, tmp_path, part, prefix="ema_fc.")
    planned = assert_folds_to(run, tmp_path, swapped, prefix="ema_")
    assert {reason for _, reason in planned.left_out_tensors} == {"folded under their own names"}


def test_a_copy_that_holds_an_average_alone_is_left_out_of_a_run(tmp_path: Path) -> None:
    """The `best.pt` that a trainer leaves for users stops no fold of the students beside it."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS, 1):
        torch.save({"epoch": step, "model": student, "ema": make_average(step)}, run / f"epoch{step}.pt")
    torch.save({"ema": make_average(9)}, run / "pretrained.pt")
    torch.save({"epoch": -1, "model": make_average(4), "ema": None, "updates": None}, run / "best.pt")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert dict(planned.left_out) == dict.fromkeys(("best.pt", "pretrained.pt"), "an average, and no raw student")
    torch.save({"ema": make_average(9)}, run / "epoch9.pt")
    assert "`epoch9.pt` holds an average" in refusal_of(run).message.replace(f"{run}/", "")


class Normalizer(torch.nn.Module):
    """The running statistics of observations, as reinforcement learning keeps them."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))
        for name in names.split():
            self.register_buffer(name, torch.rand(3, dtype=torch.float64))


def _old_norm(name: str) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(torch.nn.utils, name)(torch.nn.Conv1d(2, 3, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: _old_norm("weight_norm"),
        lambda: torch.nn.utils.spectral_norm(torch.nn.Conv1d(2, 3, 4)),
        lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(2, 3, 4)),
        lambda: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv1d(2, 3, 4)),
        lambda: torch.nn.BatchNorm2d(3),
        lambda: Normalizer("running_mean running_var count"),
        lambda: Normalizer("_mean _var _std"),
        lambda: Normalizer("embed embed_avg cluster_size"),
    ],
    ids=["old-weight-norm", "old-spectral-norm", "weight-norm", "spectral-norm", "batch-norm", "rl", "rsl", "vq"],
)
def test_buffers_known_by_name_are_the_modules_own(tmp_path: Path, make: Callable[[], torch.nn.Module]) -> None:
    """What a bare state dict does not say is guessed as torch has it: buffers copied, parameters averaged."""
    model = torch.nn.Sequential(make(), torch.nn.Linear(3, 3))
    for step in (1, 2):
        torch.save(model.state_dict(), tmp_path / f"step_{step}.pt")
    tensors = plan(tmp_path).tensors
    assert {tensor.name for tensor in tensors if tensor.action == "copy"} == {name for name, _ in model.named_buffers()}
    assert {tensor.name for tensor in tensors} == set(model.state_dict())


def test_a_parameter_called_as_a_buffer_elsewhere_is_averaged(tmp_path: Path) -> None:
    """`embed`, `count` and `_mean` are buffers only beside what makes them one."""
    for step in (1, 2):
        torch.save(
            {f"head.{name}": torch.rand(3) for name in ("embed", "count", "_mean")}, tmp_path / f"step_{step}.pt"
        )
    assert {tensor.action for tensor in plan(tmp_path).tensors} == {"average"}


class WithBuffers(torch.nn.Module):
    """A model whose buffers no list of names knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False))
        self.register_buffer("prototypes", torch.randn(3, 4))
        self.register_buffer("cache", torch.randn(7), persistent=False)


@pytest.mark.parametrize("key", ["", "model", "net"])
def test_a_pickled_module_says_itself_which_tensors_are_buffers(tmp_path: Path, key: str) -> None:
    """torch.save(model) is read without running it; its buffers are copied, its unsaved ones are not there."""
    run = tmp_path / "run"
    run.mkdir()
    students = []
    for step in range(4):
        torch.manual_seed(step)
        model = WithBuffers()
        torch.save({key: model, "step": step} if key else model, run / f"step_{step}.pt")
        students.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    _, teacher = fold(run, tmp_path)
    buffers = {name for name, _ in WithBuffers().named_buffers()}
    assert_same_bits(teacher, hook_teacher(students, MOMENTUM, buffers))


# Averages ------------------------------------------------------------------------------------------------------------


def averaged_model(index: int) -> dict[str, Any]:
    """torch.optim.swa_utils.AveragedModel's state dict, saved as it is."""
    return {"n_averaged": torch.tensor(index), **with_prefix("module.", make_average(index))}


def half_module(index: int) -> torch.nn.Module:
    """What Ultralytics keeps: the averaged module itself, in half precision."""
    torch.manual_seed(index)
    return WithBuffers().half()


AVERAGED_ONLY: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "AveragedModel": (averaged_model, ""),
    "AveragedModel under a key": (lambda k: {"model": averaged_model(k), "step": k}, "model"),
    "Ultralytics": (
        lambda k: {
            "epoch": k,
            "model": None,
            "ema": half_module(k),
            "updates": k,
            "optimizer": None,
            "best_fitness": 0,
        },
        "ema",
    ),
    "YOLOX": (
        lambda k: {"start_epoch": k, "model": make_average(k), "optimizer": {}, "best_ap": 0.1, "curr_ap": 0.1},
        "model",
    ),
    "Ultralytics after strip_optimizer": (
        lambda k: {"epoch": -1, "model": make_average(k), "ema": None, "updates": None, "optimizer": None},
        "model",
    ),
    "DINO teacher": (lambda k: {"teacher": with_prefix("backbone.", make_average(k))}, "teacher"),
    "state_dict_ema": (lambda k: {"state_dict_ema": make_average(k), "epoch": k}, "state_dict_ema"),
    "model_ema": (lambda k: {"model_ema": averaged_model(k), "epoch": k}, "model_ema"),
    "ema": (lambda k: {"ema": make_average(k), "optimizer": optimizer_state()}, "ema"),
    "modelEMA": (lambda k: {"modelEMA": make_average(k), "optimizer": optimizer_state()}, "modelEMA"),
    "emaModel": (lambda k: {"emaModel": make_average(k), "optimizer": optimizer_state()}, "emaModel"),
    "Composer EMA": (
        lambda k: composer_checkpoint(
            make_average(k),
            k,
            [
                (
                    "EMA",
                    {
                        "ema_model": {"parameters": make_student(k), "buffers": {}},
                        "ema_weights_active": True,
                        "ema_started": True,
                    },
                )
            ],
            wrapped=False,
        ),
        "state.model",
    ),
    "MMEngine EMAHook without the raw one": (
        lambda k: {
            "meta": {"iter": k, "mmengine_version": "0.10.7"},
            "message_hub": {},
            "state_dict": make_average(k),
            "ema_state_dict": {},
        },
        "state_dict",
    ),
}


@pytest.mark.parametrize("kind", AVERAGED_ONLY)
def test_only_averages_stop_the_fold_until_state_names_them(
    tmp_path: Path, kind: str, cli: Callable[..., Outcome]
) -> None:
    """Where no raw student is left the command says so and how to override it; `--state` folds the average."""
    make, state = AVERAGED_ONLY[kind]
    run = tmp_path / "run"
    run.mkdir()
    for step in range(1, 4):
        torch.save(make(step), run / f"step_{step}.pt")
    outcome = cli("fold", run)
    assert outcome.code == 1
    assert "average" in outcome.stderr
    assert "no raw student" in outcome.stderr
    assert "hint: pass `--state" in outcome.stderr
    assert not (run / "teacher.safetensors").exists()
    assert steps_of(plan(run, state=state)) == [1, 2, 3]
    planned, teacher = fold(run, tmp_path, state=state)
    assert "n_averaged" not in teacher
    assert not [name for name in teacher if name.startswith("module.")]
    assert all(item.state_key == state for item in planned.checkpoints)


@pytest.mark.parametrize("prefix", ["teacher.", "ema.", "model_ema."])
def test_a_state_dict_of_averages_alone_stops_the_fold(tmp_path: Path, prefix: str) -> None:
    """Every name under `teacher.` or `ema.`: an error that names `--prefix`, which overrides it."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        torch.save({"state_dict": with_prefix(prefix, student)}, run / f"step_{step}.pt")
    error = refusal_of(run)
    assert "average" in error.message
    assert f"--prefix {prefix}" in (error.hint or "")
    assert_folds_to(run, tmp_path, STUDENTS, prefix=prefix)


@pytest.mark.parametrize(
    "average", ["ema.", "model_ema.", "teacher.", "ema_model.module.", "backbone.ema_model.", "detector.teacher."]
)
def test_averages_inside_the_students_state_dict_are_left_out(tmp_path: Path, average: str) -> None:
    """A module that keeps its own average (Lightning, lucidrains' ema_pytorch): only the raw part is folded."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        state = {**with_prefix("backbone.", student), **with_prefix(average, make_average(step))}
        torch.save({"state_dict": state}, run / f"step_{step}.pt")
    planned = assert_folds_to(run, tmp_path, [with_prefix("backbone.", student) for student in STUDENTS])
    assert f"{average}fc.weight" in dict(planned.left_out_tensors)


@pytest.mark.parametrize(
    "name", ["ema_step_{}.pt", "step_{}_ema.pt", "step-{}-EMA.ckpt", "teacher_{}.pt", "valid.acc.ave_{}best.pth"]
)
def test_files_called_averages_are_left_out_beside_students(tmp_path: Path, name: str) -> None:
    """The name of a file may be all that says it is an average."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    for step in (100, 200, 300, 400):
        torch.save({"model": make_average(step), "global_step": step}, run / name.format(step))
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert "an average" in dict(planned.left_out)[name.format(100)]


def test_files_called_averages_alone_stop_the_fold(tmp_path: Path) -> None:
    """A folder of `-EMA` files alone is not folded silently."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        torch.save({"state_dict": student, "global_step": step}, run / f"step={step}-EMA.ckpt")
    error = refusal_of(run)
    assert "average" in error.message
    assert "--state" in (error.hint or "")
    assert_folds_to(run, tmp_path, STUDENTS, state="state_dict")


@pytest.mark.parametrize(
    "keys", [("generator", "discriminator"), ("actor", "critic"), ("model", "model_1"), ("encoder", "decoder")]
)
def test_several_candidates_ask_for_state(tmp_path: Path, keys: tuple[str, str]) -> None:
    """Two state dicts of equal standing are never guessed between."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        torch.save({keys[0]: make_average(step), keys[1]: student, "step": step}, run / f"step_{step}.pt")
    error = refusal_of(run)
    assert "--state" in (error.hint or "")
    assert all(any(key in line for line in error.details) for key in keys)
    assert_folds_to(run, tmp_path, STUDENTS, state=keys[1])


@pytest.mark.parametrize(
    ("neighbours", "reason"),
    [
        (("interrupted_1500.pt", "init_0.pt"), ""),
        (("ema_10.pt", "ema_30.pt"), "an average, by its name"),
        (("model.pt",), "the final model, without a step of its own"),
        (("model.safetensors",), "the final model, without a step of its own"),
        (("best/model.safetensors",), ""),
    ],
)
def test_numbered_models_are_checkpoints_whatever_lies_beside_them(
    tmp_path: Path, neighbours: tuple[str, ...], reason: str
) -> None:
    """`model_10` is no final model, nor one of those that accelerate saves beside `model`."""
    run = tmp_path / "run"
    save_named(run, "model_{}.pt", (10, 20, 30, 1000))
    for name in neighbours:
        (run / name).parent.mkdir(exist_ok=True)
        save = save_file if name.endswith(".safetensors") else torch.save
        save(STUDENTS[0], run / name)
    plan = ckpt_ema.plan(run, momentum=MOMENTUM)
    assert {f"model_{step}.pt" for step in (10, 20, 30, 1000)} <= {item.name for item in plan.checkpoints}
    assert not reason or {(name, reason) for name in neighbours} <= set(plan.left_out)
    for number in range(2):  # and with teachers among them
        for options in ({"momentum": [0.4, 0.5]}, {"momentum": 0.3, "output_format": "dcp"}):
            again = ckpt_ema.fold(run, announce=lambda plan: None, overwrite=number > 0, **options)
            assert len(again.plan.checkpoints) == len(plan.checkpoints)


def test_models_with_gaps_between_their_numbers_are_no_models_of_one_save(tmp_path: Path) -> None:
    """accelerate counts from 1 without one; by steps or epochs nobody counts so."""
    run = tmp_path / "run"
    run.mkdir()
    for name, student in zip(("model", "model_1", "model_2", "model_4"), STUDENTS, strict=True):
        save_file(student, run / f"{name}.safetensors")
    planned = plan(run)
    assert [item.step for item in planned.checkpoints] == [1, 2, 4]
    assert ("model.safetensors", "the final model, without a step of its own") in planned.left_out
    (run / "model_4.safetensors").unlink()
    assert "--state" in (refusal_of(run).hint or "")


def test_a_listed_model_has_the_number_of_its_name_or_else_of_its_folder(tmp_path: Path) -> None:
    """accelerate's `model_1` is the second model of a save; `model_300` beside nothing is that of step 300."""
    paths = []
    for step in (5, 6):
        folder = tmp_path / f"checkpoint_{step}"
        folder.mkdir()
        for name in ("model", "model_1"):
            save_file(STUDENTS[step - 5], folder / f"{name}.safetensors")
        paths.append(folder / "model_1.safetensors")
    assert [item.step for item in ckpt_ema.plan(paths, tmp_path / "t.safetensors").checkpoints] == [5, 6]
    paths = [tmp_path / "step_7" / f"model_{step}.safetensors" for step in (300, 400)]
    paths[0].parent.mkdir()
    for path, student in zip(paths, STUDENTS, strict=False):
        save_file(student, path)
    assert [item.step for item in ckpt_ema.plan(paths, tmp_path / "t.safetensors").checkpoints] == [300, 400]


# Steps ---------------------------------------------------------------------------------------------------------------

NUMBERED = (
    "step_{}.pt",
    "step-{}.safetensors",
    "step.{}.fp16.bin",
    "checkpoint-{}.pt",
    "checkpoint_{}.pth",
    "checkpoint{}.pt",
    "iter_{}.pth",
    "epoch_{}.pth",
    "epoch{}.pt",
    "epoch=3-step={}.ckpt",
    "model_{}.pth",
    "model-{}.pt",
    "model.{}.pt",
    "ckpt-{}.pt",
    "net_g_{}.pth",
    "{}.pt",
    "resnet50_{}.pth",
    "net_g_{}.int8.pth",
    "vit_b_16-epoch-{}.pt",
    "global_step{}.pt",
    "step_{}_loss_0.25.pt",
    "v2-step={}-val_loss=1.500.ckpt",
    "run3_iteration_{}.pt",
    "student_{}.safetensors",
    "ep2-ba{}-rank0.pt",
    "{}epoch.pth",
    "{}_net_G_A.pth",
    "{}_G.pth",
    "checkpoint_7_{}.pt",
)


DATED = (
    "run_{:%Y-%m-%d}.pt",
    "model_{:%Y%m%d_%H%M%S}.pt",
    "{:%Y-%m-%dT%H-%M-%S}.safetensors",
    "{:%y}th_try_{:%Y_%m_%d}.pth",
    "model-{:%Y-%m-%d-%H-%M}.ckpt",
    "{:%Y-%m-%d_%H.%M.%S}-run.pt",
    "net {:%Y.%m.%d %H:%M:%S}.pt",
    "{:%Y%m%dT%H%M%S}-v2.pt",
)


@pytest.mark.parametrize("pattern", DATED)
def test_dates_in_names_are_an_order(tmp_path: Path, pattern: str) -> None:
    """January's last days before February's first; where there is a step beside the date, that counts."""
    run = tmp_path / "run"
    run.mkdir()
    days = [datetime(2024, 1, 30, 23, 59, 59), datetime(2024, 1, 31, 8), datetime(2024, 2, 1, 9), datetime(2025, 1, 1)]
    names = [pattern.format(*(day for _ in range(pattern.count("{")))) for day in days]
    for name, student in zip(names, STUDENTS, strict=True):
        save = save_file if name.endswith(".safetensors") else torch.save
        save(student, run / name)
    assert_folds_to(run, tmp_path, STUDENTS)
    stepped = tmp_path / "stepped"
    stepped.mkdir()
    for number, (name, student) in enumerate(zip(names, STUDENTS, strict=True)):
        path = Path(name)
        torch.save(student, stepped / f"{path.stem}_step_{10 - number}.pt")
    plan = ckpt_ema.plan(stepped, momentum=MOMENTUM)
    assert [item.step for item in plan.checkpoints] == [7, 8, 9, 10]


def test_a_bound_may_be_a_day(tmp_path: Path) -> None:
    """It takes that day in, from its beginning and until its end."""
    run = tmp_path / "run"
    run.mkdir()
    for number, day in enumerate(("2024-01-30_08-00-00", "2024-01-31_00-00-01", "2024-01-31_23-59-59", "2024-02-01")):
        torch.save(STUDENTS[number], run / f"{day}.pt")

    def days(**options: int) -> list[str]:
        return [item.name[:10] for item in plan(run, **options).checkpoints]

    assert days(until_step=20240131) == ["2024-01-30", "2024-01-31", "2024-01-31"]
    assert days(from_step=20240131) == ["2024-01-31", "2024-01-31", "2024-02-01"]
    assert days(from_step=202402) == ["2024-02-01"]


def test_a_date_is_not_taken_for_a_step(tmp_path: Path) -> None:
    """It says what comes first, and not how many steps lie between two."""
    run = tmp_path / "run"
    run.mkdir()
    for day, student in enumerate(STUDENTS, start=28):
        torch.save(student, run / f"run_2024-01-{day}.pt")
    error = refusal_of(run, per="step")
    assert error.message == "the checkpoints know dates only (20240128000000 to 20240131000000)"
    assert refusal_of(run, per="step", steps_per_epoch=10).message == error.message


@pytest.mark.parametrize(
    "pattern", ["CKPT+2024-01-{}+12-00-00+00.ckpt", "2024-01-{}_12-00-00-250.pt", "m_2024-01-{}-v{}_0.pt"]
)
def test_dates_win_over_bare_numbers_that_do_not_count_on(tmp_path: Path, pattern: str) -> None:
    """SpeechBrain's names end with `+00`, others with a step within the epoch: the dates are the order then."""
    run = tmp_path / "run"
    run.mkdir()
    for day, student in enumerate(STUDENTS, start=9):
        torch.save(student, run / pattern.format(f"{day:02}", 20 - day))
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert {item.unit for item in planned.checkpoints} == {"date"}


def test_the_step_of_onetrainers_names_is_found(tmp_path: Path) -> None:
    """Behind a date and `save`: the step, the epoch, and the step within the epoch, which is none."""
    run = tmp_path / "run"
    run.mkdir()
    for index, student in enumerate(STUDENTS, start=1):
        epoch, rest = divmod(300 * index, 250)
        name = f"lora_2025-01-{10 + index}_12-00-00-save-{300 * index}-{epoch}-{rest}.safetensors"
        save_file(student, run / name)
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [300, 600, 900, 1200]


def test_vits_calls_its_epoch_an_iteration(tmp_path: Path) -> None:
    """The step is in the names of VITS and its descendants, also where several are saved in one epoch."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in zip((0, 1000, 2000, 10000), STUDENTS, strict=True):
        for net, state in (("G", student), ("D", make_average(step))):
            content = {"model": state, "iteration": step // 2500 + 1, "optimizer": {}, "learning_rate": 2e-4}
            torch.save(content, run / f"{net}_{step}.pth")
    error = refusal_of(run)
    assert error.hint is not None
    assert "`--include 'G_*.pth'`" in error.hint
    planned = assert_folds_to(run, tmp_path, STUDENTS, include=["G_*.pth"])
    assert steps_of(planned) == [0, 1000, 2000, 10000]


@pytest.mark.parametrize("best", ["best_acc_57.pth", "best_model_fold_0.pth", "best_3.pth", "best_stg1.pth"])
def test_a_bare_number_behind_best_is_no_step(tmp_path: Path, best: str) -> None:
    """A copy's number is its metric, its fold or its stage; beside checkpoints with a number it is left out."""
    run = tmp_path / "run"
    save_named(run, "checkpoint{:04}.pth", (10, 20, 30, 40))
    torch.save(STUDENTS[1], run / best)
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert planned.left_out == ((best, "a copy by its name, without a step"),)


def test_a_folders_number_is_no_step_of_what_lies_in_a_run(tmp_path: Path) -> None:
    """`step_2_sft/` is a run, whose `best.pt` is not of step 2."""
    run = tmp_path / "step_2_sft"
    save_named(run, "step_{}.pt", (100, 200, 300, 400))
    torch.save(STUDENTS[1], run / "best.pt")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [100, 200, 300, 400]


def test_current_models_beside_one_other_are_a_series(tmp_path: Path) -> None:
    """Only beside two or more does a number behind `current` count nothing."""
    run = tmp_path / "run"
    save_named(run, "{}.pt", ("initial_50", "current_100", "current_200", "current_300"))
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [50, 100, 200, 300]


def test_a_truncated_newest_with_a_date_and_a_number_is_left_out(tmp_path: Path) -> None:
    """As any other newest one."""
    run = tmp_path / "run"
    run.mkdir()
    for number, student in enumerate(STUDENTS, 1):
        torch.save(student, run / f"ckpt_2024-02-0{number}_{number}.pt")
    (run / "ckpt_2024-02-05_5.pt").write_bytes(b"PK")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert [name for name, _ in planned.left_out] == ["ckpt_2024-02-05_5.pt"]


def test_averages_in_numbered_folders_are_no_students(tmp_path: Path) -> None:
    """`step_100/ema.pt` says by its name what it is."""
    for step in (100, 200):
        (tmp_path / f"step_{step}").mkdir()
        torch.save(make_average(step), tmp_path / f"step_{step}" / "ema.pt")
    refusal_of(tmp_path)


def test_best_models_alone_are_a_series(tmp_path: Path) -> None:
    """Where nothing else is there, their numbers count."""
    run = tmp_path / "run"
    save_named(run, "best_model_{}.pth", (5, 9, 10, 30))
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [5, 9, 10, 30]


def test_a_date_of_the_run_is_no_date_of_the_checkpoints(tmp_path: Path) -> None:
    """Steps that look like a time behind it are steps where one of them is none."""
    run = tmp_path / "run"
    run.mkdir()
    for pattern in ("run_2024-01-30_{}.pt", "model_20240130_{}.pt", "iter2024.01.30_{}.bin"):
        for step, student in zip((900, 1000, 2000, 30000), STUDENTS, strict=True):
            torch.save(student, run / pattern.format(step))
        assert [item.step for item in plan(run).checkpoints] == [900, 1000, 2000, 30000], pattern
        for path in run.iterdir():
            path.unlink()


@pytest.mark.parametrize("pattern", NUMBERED)
def test_names_are_ordered_by_number(tmp_path: Path, pattern: str) -> None:
    """9, 10, 100, 1000 and not 10, 100, 1000, 9, whatever stands around the number."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in zip((9, 10, 100, 1000), STUDENTS, strict=True):
        path = run / pattern.format(step)
        (save_file if path.suffix == ".safetensors" else torch.save)(student, path)
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert steps_of(planned) == [9, 10, 100, 1000]


@pytest.mark.parametrize("pattern", ["checkpoint-{}", "checkpoint_{}", "step_{}", "epoch_{}", "step-{:08d}", "ckpt-{}"])
def test_folders_are_ordered_by_number(tmp_path: Path, pattern: str) -> None:
    """checkpoint-1000/ comes after checkpoint-200/."""
    run = tmp_path / "run"
    for step, student in zip((9, 200, 1000, 30000), STUDENTS, strict=True):
        folder = run / pattern.format(step)
        folder.mkdir(parents=True)
        save_file(student, folder / "model.safetensors")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [9, 200, 1000, 30000]


def test_zero_padded_and_plain_numbers_are_the_same_numbers(tmp_path: Path) -> None:
    """step_0009, step_00010 and step_100 have the steps 9, 10 and 100."""
    run = tmp_path / "run"
    save_named(run, "{}.pt", ("step_0009", "step_00010", "step_100", "step_0000001000"))
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [9, 10, 100, 1000]


def test_steps_inside_win_over_names_and_times(tmp_path: Path) -> None:
    """The recorded step decides where name and modification time say something else."""
    run = tmp_path / "run"
    run.mkdir()
    for number, (step, student) in enumerate(zip((40, 30, 20, 10), STUDENTS, strict=True)):
        path = run / f"step_{number}.pt"
        torch.save({"model": student, "global_step": step}, path)
        os.utime(path, (1_000_000 + number, 1_000_000 + number))
    planned = assert_folds_to(run, tmp_path, STUDENTS[::-1])
    assert steps_of(planned) == [10, 20, 30, 40]
    assert names_of(planned) == ["step_3.pt", "step_2.pt", "step_1.pt", "step_0.pt"]


def test_trainer_state_wins_over_the_folders_name(tmp_path: Path) -> None:
    """`global_step` of trainer_state.json is the step of a Hugging Face folder that was renamed."""
    run = tmp_path / "run"
    for number, (step, student) in enumerate(zip((40, 30, 20, 10), STUDENTS, strict=True)):
        folder = run / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        save_file(student, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 0.5}))
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS[::-1])) == [10, 20, 30, 40]


def test_epochs_alone_order_a_run(tmp_path: Path) -> None:
    """Checkpoints that know only their epoch are folded by it."""
    run = tmp_path / "run"
    run.mkdir()
    for epoch, student in zip((2, 9, 10, 11), STUDENTS, strict=True):
        torch.save({"state_dict": student, "epoch": epoch}, run / f"{'abcdefghijkl'[-epoch]}.pth")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert [(item.step, item.unit) for item in planned.checkpoints] == [(e, "epoch") for e in (2, 9, 10, 11)]


@pytest.mark.parametrize("names", [("alpha", "beta"), ("step_1", "beta"), ("a-0.5", "a-0.25")])
def test_unknown_steps_ask_for_a_list(tmp_path: Path, names: tuple[str, str], cli: Callable[..., Outcome]) -> None:
    """Without a step for all the order is never guessed; the explicit list is folded as given."""
    run = tmp_path / "run"
    run.mkdir()
    for name, student in zip(names, STUDENTS, strict=False):
        torch.save(student, run / f"{name}.pt")
    outcome = cli("fold", run)
    assert outcome.code == 1
    assert "hint: list the checkpoints in the order they are to be folded" in outcome.stderr
    planned, teacher = fold([run / f"{name}.pt" for name in names], tmp_path)
    assert names_of(planned) == [f"{name}.pt" for name in names]
    assert_same_bits(teacher, hook_teacher(STUDENTS[:2], MOMENTUM, BUFFERS))


def test_steps_beside_epochs_ask_for_a_list(tmp_path: Path) -> None:
    """A step cannot be compared with an epoch."""
    run = tmp_path / "run"
    run.mkdir()
    torch.save(STUDENTS[0], run / "step_100.pt")
    torch.save(STUDENTS[1], run / "epoch_2.pt")
    assert "oldest first" in (refusal_of(run).hint or "")


def test_steps_that_begin_anew_with_each_epoch_are_refused(tmp_path: Path) -> None:
    """epoch_2_step_100 is not older than epoch_1_step_900: where epochs and steps disagree the order is asked."""
    run = tmp_path / "run"
    run.mkdir()
    names = [f"epoch_{epoch}_step_{step}.pt" for epoch, step in ((1, 400), (1, 900), (2, 100), (2, 500))]
    for name, student in zip(names, STUDENTS, strict=True):
        torch.save(student, run / name)
    assert "oldest first" in (refusal_of(run).hint or "")
    _, teacher = fold([run / name for name in names], tmp_path)
    assert_same_bits(teacher, hook_teacher(STUDENTS, MOMENTUM, BUFFERS))


def test_a_number_in_a_models_name_is_no_step(tmp_path: Path) -> None:
    """The pretrained resnet50.pt beside step_N.pt is not folded as step 50."""
    run = tmp_path / "run"
    save_students(run, 4)
    save_file(make_student(9), run / "resnet50.safetensors")
    error = refusal_of(run)
    assert any("resnet50" in line for line in error.details)
    assert_folds_to(run, tmp_path, STUDENTS, exclude=("resnet*",))


def test_the_bits_of_a_precision_are_no_step(tmp_path: Path) -> None:
    """Copies in half precision by number, and a model's beside the model: the 16 of `fp16` counts nothing."""
    run = tmp_path / "run"
    run.mkdir()
    for number, student in enumerate(STUDENTS, start=8):
        torch.save(student, run / f"{number:04}-bf16.pt")
    assert_folds_to(run, tmp_path, STUDENTS)
    for number, student in enumerate(STUDENTS, start=8):
        folder = tmp_path / "folders" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        save_file(student, folder / "model.safetensors")
        save_file(student, folder / "model.fp16.safetensors")
    assert_folds_to(tmp_path / "folders", tmp_path, STUDENTS)


def test_two_checkpoints_of_one_step_are_refused(tmp_path: Path) -> None:
    """Different files that claim the same step are named, and so is the way out."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    torch.save({"state_dict": make_student(50), "global_step": 300}, run / "resumed_step_300.pt")
    error = refusal_of(run)
    assert error.message == "2 checkpoints claim step 300"
    assert list(error.details) == ["resumed_step_300.pt", "step_300.pt"]
    assert "--exclude" in (error.hint or "")
    assert_folds_to(run, tmp_path, STUDENTS, exclude=("resumed*",))


# Aliases -------------------------------------------------------------------------------------------------------------


def make_alias(source: Path, alias: Path, how: str) -> None:
    """Another name for a checkpoint: `link`, `symlink`, `absolute` or `copy`."""
    if how == "link":
        os.link(source, alias)
    elif how == "copy":
        shutil.copy(source, alias)
    else:
        alias.symlink_to(source if how == "absolute" else source.name)


@pytest.mark.parametrize("how", ["link", "symlink", "absolute", "copy"])
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "latest.pt", "final.pt", "model_best.pt", "checkpoint.pt"])
def test_aliases_count_once(tmp_path: Path, how: str, name: str) -> None:
    """A link or a copy called last or best is the checkpoint it repeats, named among what was left out."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    make_alias(run / ("step_200.pt" if "best" in name else "step_400.pt"), run / name, how)
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert names_of(planned) == [f"step_{step}.pt" for step in (100, 200, 300, 400)]
    assert name in dict(planned.left_out)


@pytest.mark.parametrize("how", ["link", "symlink"])
@pytest.mark.parametrize("name", ["aaa.pt", "zzz.pt", "step_999.pt"])
def test_links_count_once_whatever_they_are_called(tmp_path: Path, how: str, name: str) -> None:
    """Two names of one file are one checkpoint, also where the other name looks like a checkpoint of its own."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    make_alias(run / "step_400.pt", run / name, how)
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert len(planned.checkpoints) == 4


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "final.safetensors"])
def test_copies_without_a_step_beside_numbered_checkpoints_are_left_out(tmp_path: Path, name: str) -> None:
    """A flat copy called last has no step of its own, and is none of the run's checkpoints."""
    run = tmp_path / "run"
    save_students(run, 4)
    shutil.copy(run / "step_400.safetensors", run / name)
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert name in dict(planned.left_out)


def test_a_last_checkpoint_that_is_newer_is_folded(tmp_path: Path) -> None:
    """`last.pt` that knows a later step than every numbered one is a checkpoint of its own."""
    run = tmp_path / "run"
    save_students(run, 3, suffix=".pt")
    torch.save({"state_dict": STUDENTS[3], "global_step": 350}, run / "last.pt")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [100, 200, 300, 350]


DEAD_LINKS = ("checkpoint-50.pt", "checkpoint-60", "weights.pt", "step_70.pt", "step_80.pt")


def test_links_to_folders_count_once_and_dangling_links_are_left_out(tmp_path: Path) -> None:
    """`checkpoint-best -> checkpoint-20` is no further checkpoint; a link that leads nowhere is none at all."""
    run = tmp_path / "run"
    for step, student in zip((10, 20, 30, 40), STUDENTS, strict=True):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file(student, run / f"checkpoint-{step}" / "model.safetensors")
    (run / "checkpoint-best").symlink_to("checkpoint-20")
    (run / "checkpoint-50.pt").symlink_to("deleted.pt")
    (run / "checkpoint-60").symlink_to("deleted")
    (run / "weights.pt").symlink_to("deleted.pt")
    (run / "step_70.pt").symlink_to("step_70.pt")
    (run / "step_80.pt").symlink_to("long" * 100)
    (run / "notes.txt").symlink_to("deleted.txt")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert steps_of(planned) == [10, 20, 30, 40]
    assert set(planned.left_out) == {
        ("checkpoint-best", "another name of `checkpoint-20`"),
        *((name, "a link that cannot be followed") for name in DEAD_LINKS),
    }


def test_a_run_of_dead_links_names_them(tmp_path: Path) -> None:
    """Where checkpoints were moved away and their links stayed, the error says so."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (10, 20):
        (run / f"step_{step}.pt").symlink_to(tmp_path / "moved" / f"step_{step}.pt")
    with pytest.raises(ckpt_ema.CkptEmaError, match="holds no checkpoints") as caught:
        ckpt_ema.plan(run)
    assert caught.value.details == tuple(f"step_{step}.pt: a link that cannot be followed" for step in (10, 20))


def test_another_name_of_what_is_excluded_is_folded(tmp_path: Path) -> None:
    """In a list as in a run directory: only what is folded hides its other names."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    (run / "last.pt").symlink_to("step_400.pt")
    excluded = {"exclude": ["step_400*"]}
    for paths in (run, [*(run / f"step_{step}.pt" for step in (100, 200, 300, 400)), run / "last.pt"]):
        planned = plan(paths, **excluded)
        assert names_of(planned) == ["step_100.pt", "step_200.pt", "step_300.pt", "last.pt"]
        assert planned.left_out == (("step_400.pt", "not selected by name"),)


def test_an_average_is_told_whatever_lies_above_under_its_name(tmp_path: Path) -> None:
    """Both are left out, each for its own reason."""
    run = tmp_path / "run"
    save_students(run / "checkpoints", 4, suffix=".pt")
    for folder in (run, run / "checkpoints"):
        torch.save({"model": make_average(1)}, folder / "ema.pt")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert [reason for name, reason in planned.left_out if name == "ema.pt"] == [
        "not among the numbered checkpoints",
        "an average, by its name",
    ]


# Unfinished and unreadable -------------------------------------------------------------------------------------------


def half_of(path: Path) -> None:
    """Cut a file in the middle, as a full disk or a kill does."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "empty", "zeros"])
def test_an_unfinished_newest_checkpoint_is_left_out_aloud(
    tmp_path: Path, kind: str, cli: Callable[..., Outcome]
) -> None:
    """A truncated newest file is left out with a warning that names it; the same file in the middle is an error."""
    run = tmp_path / "run"
    run.mkdir()
    suffix = ".safetensors" if kind == "safetensors" else ".pt"
    for index, student in enumerate([*STUDENTS, make_student(5)], start=1):
        path = run / f"step_{index * 100}{suffix}"
        if kind == "safetensors":
            save_file(student, path)
        else:
            torch.save(student, path, _use_new_zipfile_serialization=kind != "legacy")
    damage = {
        "empty": lambda path: os.truncate(path, 0),
        "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    }.get(kind, half_of)
    damage(path)
    outcome = cli("fold", run, "--momentum", MOMENTUM)
    assert outcome.code == 0, outcome.stderr
    assert f"Warning: `{path.name}` is left out, it looks unfinished" in outcome.stderr
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(STUDENTS, MOMENTUM, BUFFERS))
    damage(run / f"step_200{suffix}")
    outcome = cli("fold", run, "--momentum", MOMENTUM, "--overwrite")
    assert outcome.code == 1
    assert f"step_200{suffix}" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_only_one_newest_checkpoint_is_forgiven(tmp_path: Path) -> None:
    """Two that cannot be read are no trainer at work: the older one is named."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    for step in (300, 400):
        half_of(run / f"step_{step}.pt")
    error = refusal_of(run)
    assert "step_300.pt" in error.message
    assert error.hint == "leave it out: `--exclude 'step_300.pt'`"


def test_what_cannot_be_read_is_newest_only_behind_all_others(tmp_path: Path) -> None:
    """Another file of the newest step is not half of a later one."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    shutil.copy(run / "step_400.pt", run / "step-400.ckpt")
    half_of(run / "step-400.ckpt")
    assert "step-400.ckpt" in refusal_of(run).message


def test_an_unreadable_checkpoint_beside_one_without_a_step_is_no_secret(tmp_path: Path) -> None:
    """Whether it is the newest nobody can tell."""
    run = tmp_path / "run"
    run.mkdir()
    torch.save(STUDENTS[0], run / "model.pt")
    torch.save(STUDENTS[1], run / "other.pt")
    half_of(run / "other.pt")
    assert "other.pt" in refusal_of(run).message


def test_one_step_of_two_epochs_is_no_order(tmp_path: Path) -> None:
    """Steps that begin anew with every epoch may be few, and meet at one."""
    run = tmp_path / "run"
    run.mkdir()
    for epoch, student in enumerate(STUDENTS[:2]):
        torch.save({"state_dict": student, "global_step": 100, "epoch": epoch}, run / f"epoch_{epoch}.pt")
    assert "their steps begin anew with each epoch" in refusal_of(run).message


def make_folder_run(run: Path, count: int) -> None:
    """checkpoint-100/ ... in two shards with an index and no configuration."""
    for index in range(1, count + 1):
        student = make_student(index)
        folder = run / f"checkpoint-{index * 100}"
        folder.mkdir(parents=True)
        names = sorted(student)
        weight_map = {}
        for number, part in enumerate((names[:3], names[3:]), start=1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: student[name] for name in part}, folder / shard)
            weight_map.update(dict.fromkeys(part, shard))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": index * 100}))


def remove_a_shard(folder: Path) -> None:
    """The second shard never came."""
    (folder / "model-00002-of-00002.safetensors").unlink()


def remove_shard_and_index(folder: Path) -> None:
    """Neither the second shard nor the index came: the first says itself that it is one of two."""
    remove_a_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def remove_the_weights(folder: Path) -> None:
    """Only the optimizer came."""
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save(optimizer_state(), folder / "optimizer.pt")


def cut_a_shard(folder: Path) -> None:
    """The second shard came half."""
    half_of(folder / "model-00002-of-00002.safetensors")


def cut_the_index(folder: Path) -> None:
    """The index came half."""
    half_of(folder / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "damage", [remove_a_shard, remove_shard_and_index, remove_the_weights, cut_a_shard, cut_the_index]
)
def test_an_unfinished_newest_folder_is_left_out_aloud(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A newest folder that lacks something is left out with a warning; the same one in the middle is an error."""
    run = tmp_path / "run"
    make_folder_run(run, 5)
    damage(run / "checkpoint-500")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert any("`checkpoint-500` is left out" in warning for warning in planned.warnings)
    assert "unfinished" in dict(planned.left_out)["checkpoint-500"]
    damage(run / "checkpoint-200")
    assert "checkpoint-200" in refusal_of(run).message


def test_a_truncated_last_copy_is_left_out_aloud(tmp_path: Path) -> None:
    """A kill while `last.pt` is written costs nothing but a warning."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    shutil.copy(run / "step_400.pt", run / "last.pt")
    half_of(run / "last.pt")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert any("`last.pt` is left out" in warning for warning in planned.warnings)


def test_an_unreadable_checkpoint_may_be_excluded(tmp_path: Path) -> None:
    """`--exclude` is a way past a broken checkpoint in the middle."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    half_of(run / "step_200.pt")
    refusal_of(run)
    assert_folds_to(run, tmp_path, [STUDENTS[0], *STUDENTS[2:]], exclude=("step_200.pt",))


def test_a_run_of_unfinished_checkpoints_is_an_error(tmp_path: Path) -> None:
    """Where nothing can be read there is nothing to fold."""
    run = tmp_path / "run"
    save_students(run, 1, suffix=".pt")
    half_of(run / "step_100.pt")
    assert "step_100.pt" in refusal_of(run).message


# What is never a student ---------------------------------------------------------------------------------------------

BYSTANDERS = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_1.bin",
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "sampler.bin",
    "training_args.bin",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "recipe_state.pt",
    "step_500.pt.tmp",
    "tmp_step_500.pt",
    ".tmp_step_500.pt",
    ".step_500.pt.swp",
    "events.out.tfevents.1700000000.host",
    "train.log",
    "config.yaml",
)


@pytest.mark.parametrize("name", BYSTANDERS)
def test_other_files_of_a_run_are_never_students(tmp_path: Path, name: str) -> None:
    """Optimizer, random states, logs and half-renamed files lie beside the checkpoints and change nothing."""
    run = tmp_path / "run"
    save_students(run, 4, suffix=".pt")
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "global_step": 450}, run / name)
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert not [warning for warning in planned.warnings if name in warning]


@pytest.mark.parametrize("name", ["tmp-checkpoint-500", ".tmp-checkpoint-500", "logs", "runs", "wandb", "eval"])
def test_other_folders_of_a_run_are_never_students(tmp_path: Path, name: str) -> None:
    """A staging folder of the trainer and folders of logs are not checkpoints."""
    run = tmp_path / "run"
    make_folder_run(run, 4)
    (run / name).mkdir()
    if "tmp" in name:
        save_file(make_student(5), run / name / "model.safetensors")
    (run / name / "events.out.tfevents.1.host").write_bytes(b"x")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [100, 200, 300, 400]


def test_own_teachers_in_the_run_are_left_out(tmp_path: Path) -> None:
    """Teachers that this tool wrote into the run are no students, whatever they are called."""
    run = tmp_path / "run"
    save_students(run, 4)
    first = ckpt_ema.fold(run, momentum=MOMENTUM, announce=lambda planned: None)
    assert first.output == run / "teacher.safetensors"
    shutil.copy(first.output, run / "step_450.safetensors")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    reasons = dict(planned.left_out)
    assert "ckpt-ema" in reasons["step_450.safetensors"]
    assert "teacher.safetensors" in reasons
    error = refusal_of([run / "step_100.safetensors", run / "step_450.safetensors"])
    assert "--init" in (error.hint or "")


def test_a_teacher_beside_the_checkpoints_folder_does_not_hide_it(tmp_path: Path) -> None:
    """`-o project/teacher.safetensors` for a run in project/checkpoints/: the next fold still finds the run."""
    project = tmp_path / "project"
    save_students(project / "checkpoints", 4)
    ckpt_ema.fold(project, project / "teacher.safetensors", momentum=MOMENTUM, announce=lambda planned: None)
    assert_folds_to(project, tmp_path, STUDENTS)


@pytest.mark.parametrize("stray", ["model.safetensors", "pretrained.safetensors", "best/model.safetensors"])
def test_a_lone_model_beside_the_checkpoints_folder_does_not_hide_it(tmp_path: Path, stray: str) -> None:
    """A model without a step above `checkpoints/` is not folded in place of the whole run."""
    project = tmp_path / "project"
    save_students(project / "checkpoints", 4)
    (project / stray).parent.mkdir(exist_ok=True)
    save_file(make_student(9), project / stray)
    try:
        planned = plan(project)
    except ckpt_ema.CkptEmaError as error:
        # Asking which of the two is meant is as good.
        assert error.hint  # noqa: PT017  (either outcome is right)
    else:
        assert steps_of(planned) == [100, 200, 300, 400]


@pytest.mark.parametrize("kind", ["single", "sharded", "bin"])
def test_the_final_model_beside_checkpoint_folders_is_left_out(tmp_path: Path, kind: str) -> None:
    """Trainer.save_model() puts the last weights into the run directory itself, in one file or in shards."""
    run = tmp_path / "run"
    make_folder_run(run, 4)
    newest = run / "checkpoint-400"
    if kind == "sharded":
        for path in newest.glob("model*"):
            shutil.copy(path, run / path.name)
    elif kind == "single":
        save_file(STUDENTS[3], run / "model.safetensors")
    else:
        torch.save(STUDENTS[3], run / "pytorch_model.bin")
    (run / "config.json").write_text("{}")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [100, 200, 300, 400]


ONE_FILE = {
    "diffusers' LoRA scripts": ("checkpoint-{}/pytorch_lora_weights.safetensors", ["optimizer.bin", "scheduler.bin"]),
    "LLaVA": ("checkpoint-{}/mm_projector.bin", ["config.json", "trainer_state.json"]),
    "LitGPT": ("step-{:08}/lit_model.pth", ["hyperparameters.yaml"]),
    "LitGPT's LoRA": ("step-{:08}/lit_model.pth.lora", ["lit_config.json"]),
    "OLMo": ("step{}-unsharded/model.pt", ["train.pt", "optim.pt", "config.yaml"]),
    "Megatron": ("iter_{:07}/mp_rank_00/model_optim_rng.pt", ["../../latest_checkpointed_iteration.txt"]),
}


@pytest.mark.parametrize("kind", ONE_FILE)
def test_a_folder_with_a_number_is_a_checkpoint_whatever_its_file_is_called(tmp_path: Path, kind: str) -> None:
    """One file of weights in it is the student; the same in the run directory is the last one again, without a step."""
    run = tmp_path / "run"
    pattern, beside = ONE_FILE[kind]
    paths = [run / pattern.format(step) for step in (900, 1000, 1500, 2000)]
    for path, student in zip(paths, STUDENTS, strict=True):
        path.parent.mkdir(parents=True)
        save_file(student, path) if path.suffix == ".safetensors" else torch.save(student, path)
        for name in beside:
            (path.parent / name).write_bytes(b"{}")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [900, 1000, 1500, 2000]
    if "mp_rank" not in pattern:
        assert steps_of(assert_folds_to(paths, tmp_path, STUDENTS)) == [900, 1000, 1500, 2000]
        shutil.copy(paths[-1], run)
        planned = assert_folds_to(run, tmp_path, STUDENTS)
        assert planned.left_out == ((paths[-1].name, "the final model, without a step of its own"),)


def test_a_file_beside_a_models_folder_is_not_the_model(tmp_path: Path) -> None:
    """`checkpoint-500/` with `unet/` and learned embeddings beside it: the network is folded, as without them."""
    run = tmp_path / "run"
    for step, student in zip((500, 1000, 1500, 2000), STUDENTS, strict=True):
        unet = run / f"checkpoint-{step}" / "unet"
        unet.mkdir(parents=True)
        save_file(student, unet / "diffusion_pytorch_model.safetensors")
        save_file({"<token>": torch.ones(3)}, unet.parent / "learned_embeds.safetensors")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [500, 1000, 1500, 2000]


@pytest.mark.parametrize(
    "folders", [("step_1_pretrain", "step_2_sft"), ("lora_run_1/checkpoint-500", "lora_run_2/checkpoint-500")]
)
@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "final.safetensors"])
def test_experiments_side_by_side_are_no_run(tmp_path: Path, folders: tuple[str, ...], name: str) -> None:
    """A number in the middle of a folder's name counts experiments; nothing is folded across these."""
    for folder, student in zip(folders, STUDENTS, strict=False):
        (tmp_path / folder).mkdir(parents=True)
        save_file(student, tmp_path / folder / name)
    assert f"`{tmp_path}` holds 2 folders with checkpoints" in refusal_of(tmp_path).message


@pytest.mark.parametrize(
    ("pattern", "beside"),
    [
        ("best_{}.pt", ["last.pt"]),
        ("epoch_{}_ave_acc_0.5.pth", []),
        ("AVE_epoch_{}.pth", []),
        ("300ep_checkpoint_{}.pth", []),
        ("10_epochs_lr0.1_{}.pt", []),
    ],
)
def test_names_with_other_words_are_in_order(tmp_path: Path, pattern: str, beside: list[str]) -> None:
    """What a trainer was told, or means by `best`, is not in the way of the number that counts on."""
    run = tmp_path / "run"
    save_named(run, pattern, (5, 10, 20, 100))
    for name in beside:
        torch.save(STUDENTS[0], run / name)
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [5, 10, 20, 100]


def test_best_models_beside_another_network_are_not_dropped_for_it(tmp_path: Path) -> None:
    """One file without a number is no series that they would be copies of."""
    for name in ("best_1", "best_2", "discriminator"):
        torch.save(STUDENTS[0], tmp_path / f"{name}.pt")
    assert "order of the checkpoints" in refusal_of(tmp_path).message


def test_ranks_of_adapters_are_no_parts(tmp_path: Path) -> None:
    """LoRA's rank 8 and rank 16 of one step are two models: the hint takes one of them."""
    for step in (5, 6):
        for rank in (8, 16):
            torch.save(STUDENTS[0], tmp_path / f"step_{step}_rank{rank}.pt")
    error = refusal_of(tmp_path)
    assert error.hint is not None
    assert "`--include 'step_*_rank8.pt'`" in error.hint
    assert steps_of(plan(tmp_path, include=["step_*_rank8.pt"])) == [5, 6]


def test_a_learned_optimizer_is_a_part_of_the_student(tmp_path: Path) -> None:
    """A module called so has other names than an optimizer's state."""
    run = tmp_path / "run"
    run.mkdir()
    states = [{**student, "optimizer.lstm.weight": torch.full((2,), float(k))} for k, student in enumerate(STUDENTS)]
    for step, state in enumerate(states):
        torch.save(state, run / f"step_{step}.pt")
    assert_folds_to(run, tmp_path, states)


def test_parts_of_one_model_are_never_students(tmp_path: Path) -> None:
    """Ranks' files of one step, tensor parallel folders and DeepSpeed's experts: refused, and said why."""
    for names in (("c_1_100-shard{}.pt", "c_1_200-shard{}.pt"), ("ckpt_6999_rank{}.pt",), ("m_0012.rank_{}.pth",)):
        run = tmp_path / names[0]
        run.mkdir()
        for name in names:
            for rank in (0, 1):
                torch.save(STUDENTS[rank], run / name.format(rank))
        assert (
            refusal_of(run).message == "2 files are parts of one checkpoint, by their names, and are not put together"
        )
    for step in (1, 2):
        for part in (0, 1):
            folder = tmp_path / "parallel" / f"iter_{step:07}" / f"mp_rank_{part:02}"
            folder.mkdir(parents=True)
            torch.save({"model": STUDENTS[part], "iteration": step}, folder / "model_optim_rng.pt")
        folder = tmp_path / "experts" / f"global_step{step}"
        folder.mkdir(parents=True)
        torch.save({"module": STUDENTS[0]}, folder / "mp_rank_00_model_states.pt")
        torch.save(STUDENTS[1], folder / "layer_0_expert_0_mp_rank_00_model_states.pt")
    assert "holds a model that is cut into 2 parts" in refusal_of(tmp_path / "parallel").message
    assert "checkpoint of a mixture of experts" in refusal_of(tmp_path / "experts").message


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (("init.pt", "1.pt", "2.pt", "10.pt"), "--exclude init.pt"),
        (("lora-000001.pt", "lora-000002.pt", "lora-000003.pt", "lora.pt"), "--exclude lora.pt"),
        (("epoch_0.pt", "epoch_1.pt", "step_100.pt", "step_200.pt"), "--include 'epoch_*.pt'"),
    ],
)
def test_what_has_no_step_is_left_out_by_the_hint(tmp_path: Path, names: tuple[str, ...], hint: str) -> None:
    """A file that is none of the series stops the command, and typing the hint goes on."""
    for name, student in zip(names, STUDENTS, strict=True):
        torch.save(student, tmp_path / name)
    error = refusal_of(tmp_path)
    assert error.hint is not None
    assert f"`{hint}`" in error.hint
    option, pattern = shlex.split(hint)
    assert len(plan(tmp_path, **{option[2:]: [pattern]}).checkpoints) in (2, 3)


def test_a_list_in_a_shells_order_brings_a_warning_where_no_step_is_known(tmp_path: Path) -> None:
    """`10_a.pt` before `9_a.pt` is the order of letters, whatever the numbers count."""
    for name, student in zip(("run_9_a.pt", "run_10_a.pt", "run_11_a.pt"), STUDENTS, strict=False):
        torch.save(student, tmp_path / name)
    [warning] = [text for text in plan(sorted(tmp_path.iterdir())).warnings if "order" in text]
    assert warning.endswith("and is folded so; a shell sorts 10 before 9")
    assert "run_9_a.pt` comes after" in warning
    ordered = [tmp_path / f"run_{number}_a.pt" for number in (9, 10, 11)]
    assert not [text for text in plan(ordered).warnings if "order" in text]


def test_adapters_are_folded_without_their_base_model(tmp_path: Path) -> None:
    """PEFT saves adapter_model.safetensors: the teacher is an adapter folder with the adapter's configuration."""
    run = tmp_path / "run"
    for step, student in zip((5, 10, 15, 20), STUDENTS, strict=True):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(with_prefix("base_model.model.", student), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        torch.save(optimizer_state(), folder / "optimizer.pt")
    report = ckpt_ema.fold(run, momentum=MOMENTUM, announce=lambda planned: None)
    assert {path.name for path in report.output.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    expected = hook_teacher(STUDENTS, MOMENTUM, BUFFERS)
    assert_same_bits(load_file(report.output / "adapter_model.safetensors"), with_prefix("base_model.model.", expected))


# Where a run lies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["checkpoints", "weights", "lightning_logs/version_0/checkpoints", "a/b"])
def test_checkpoints_are_found_below_the_run_directory(tmp_path: Path, where: str) -> None:
    """The folder given to the trainer is enough."""
    run = tmp_path / "run"
    save_students(run / where, 4)
    (run / "logs").mkdir()
    (run / "logs" / "events.out.tfevents.1.host").write_bytes(b"x")
    (run / "hparams.yaml").write_text("lr: 0.1\n")
    planned = assert_folds_to(run, tmp_path, STUDENTS)
    assert plan(run).output == run / "teacher.safetensors"
    assert planned.directory == run / where


def test_two_runs_below_one_folder_are_not_mixed(tmp_path: Path) -> None:
    """version_0 and version_1 are two trainings: the error names both and asks for one."""
    root = tmp_path / "root" / "lightning_logs"
    for version in (0, 1):
        save_students(root / f"version_{version}" / "checkpoints", 4)
    error = refusal_of(tmp_path / "root")
    assert [f"version_{v}" in line for v, line in enumerate(error.details)] == [True, True]
    assert_folds_to(root / "version_1", tmp_path, STUDENTS)


@pytest.mark.parametrize("files", [[], ["train.log", "optimizer.pt", "config.json"]])
def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path, files: list[str]) -> None:
    """Nothing to fold is said, not done."""
    run = tmp_path / "run"
    run.mkdir()
    for name in files:
        (run / name).write_bytes(b"{}")
    assert "no checkpoints" in refusal_of(run).message


# Which checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--from", 200], [200, 300, 400, 500]),
        (["--from", 201], [300, 400, 500]),
        (["--until", 300], [100, 200, 300]),
        (["--until", 299], [100, 200]),
        (["--from", 200, "--until", 400], [200, 300, 400]),
        (["--last", 2], [400, 500]),
        (["--last", 9], [100, 200, 300, 400, 500]),
        (["--until", 400, "--last", 2], [300, 400]),
        (["--include", "step_[24]00.*"], [200, 400]),
        (["--include", "step_100.*", "--include", "*500*"], [100, 500]),
        (["--exclude", "step_[24]00.*"], [100, 300, 500]),
        (["--include", "step_[1-4]*", "--exclude", "*_300*"], [100, 200, 400]),
        (["--interval", 2], [100, 300, 500]),
        (["--interval", 3], [100, 400]),
        (["--from", 200, "--interval", 2], [200, 400]),
        (["--last", 3, "--interval", 2], [300, 500]),
    ],
)
def test_options_select_checkpoints(
    run: Path, cli: Callable[..., Outcome], options: list[object], steps: list[int]
) -> None:
    """Every selection takes the checkpoints it names, both ends included, and accounts for the others."""
    outcome = cli("plan", run, "--json", *options)
    assert outcome.code == 0, outcome.stderr
    planned = json.loads(outcome.stdout)
    assert [item["step"] for item in planned["checkpoints"]] == steps
    assert len(planned["left_out"]) == 5 - len(steps)


@pytest.mark.parametrize(
    "options", [{"from_step": 600}, {"until_step": 50}, {"include": ("epoch*",)}, {"exclude": ("*",)}]
)
def test_a_selection_that_leaves_nothing_is_an_error(run: Path, options: dict[str, Any]) -> None:
    """An empty selection is said, with what was left out and why."""
    error = refusal_of(run, **options)
    assert "left to fold" in error.message
    assert len(error.details) == 5


def test_from_and_until_count_epochs_where_epochs_are_all_there_is(tmp_path: Path) -> None:
    """Selection by step means the number that orders the run."""
    run = tmp_path / "run"
    run.mkdir()
    write_torchvision(run, STUDENTS)
    assert steps_of(plan(run, from_step=9, until_step=10)) == [9, 10]


def test_a_list_is_folded_as_listed_with_a_warning_when_steps_descend(
    run: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    """The order given wins over the steps, aloud."""
    listed = [run / f"step_{step}.safetensors" for step in (300, 100, 500)]
    outcome = cli("fold", *listed, "-o", tmp_path / "t.safetensors", "--momentum", MOMENTUM)
    assert outcome.code == 0, outcome.stderr
    assert "step 100 comes after step 300" in outcome.stderr
    expected = hook_teacher([make_student(3), make_student(1), make_student(5)], MOMENTUM, BUFFERS)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected)


def test_a_list_in_step_order_brings_no_warning(run: Path) -> None:
    """Nothing is said about an order that is right."""
    planned = plan([run / "step_100.safetensors", run / "step_300.safetensors"], momentum=0.5)
    assert not planned.warnings
    assert planned.output == run / "teacher.safetensors"


def folder_of(path: Path) -> Path:
    """The checkpoint's folder of a checkpoint, or of the file in it."""
    return path if path.is_dir() else path.parent


@pytest.mark.parametrize("listed", ["folders", "files"])
def test_what_a_shell_lists_as_text_is_folded_by_step(tmp_path: Path, listed: str) -> None:
    """`run/checkpoint-*` and `run/checkpoint-*/model.safetensors` put 1000 before 200: folded by step, and said."""
    run = tmp_path / "run"
    for step, student in zip((200, 1000, 3000), STUDENTS, strict=False):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file(student, run / f"checkpoint-{step}" / "model.safetensors")
    found = sorted(run.glob("checkpoint-*" if listed == "folders" else "checkpoint-*/model.safetensors"))
    planned = plan(found, output=tmp_path / "t.safetensors")
    assert steps_of(planned) == [200, 1000, 3000]
    assert any("(number 1000 before number 200), as a shell sorts" in warning for warning in planned.warnings)
    # Two of them, or another order than a shell's, are somebody's wish.
    for wished, text in (
        (found[:2], "number 200 comes after number 1000"),
        (found[::-1], "number 200 comes after number 3000"),
    ):
        planned = plan(wished, output=tmp_path / "t.safetensors")
        assert steps_of(planned) == [int(path.name.split("-")[-1]) for path in map(folder_of, wished)]
        assert any(text in warning for warning in planned.warnings)


@pytest.mark.parametrize("missing", ["first", "second"])
def test_a_listed_checkpoint_that_cannot_be_read_is_an_error(run: Path, missing: str) -> None:
    """In an explicit list nothing is left out silently, not even the newest."""
    half_of(run / "step_500.safetensors")
    listed = [run / "step_100.safetensors", run / "step_500.safetensors"]
    assert "step_500" in refusal_of(listed if missing == "second" else listed[::-1]).message


def test_state_names_another_state_dict(tmp_path: Path) -> None:
    """`--state` overrides what the tool would pick, by dotted path."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        content = {
            "model": make_average(step),
            "model_ema": student,
            "extra": {"deep": with_prefix("module.", student)},
        }
        torch.save(content, run / f"step_{step}.pt")
    assert plan(run).checkpoints[0].state_key == "model"
    assert_folds_to(run, tmp_path, STUDENTS, state="model_ema")
    assert_folds_to(run, tmp_path, STUDENTS, state="extra.deep")


def test_a_state_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    """A mistyped `--state` is answered with what could have been meant."""
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"model": STUDENTS[0], "model_ema": STUDENTS[1]}, run / "step_1.pt")
    error = refusal_of(run, state="modle")
    assert "`modle`" in error.message
    assert "model, model_ema" in error.details[0]


@pytest.mark.parametrize("prefix", ["student.", "student"])
def test_prefix_takes_a_sub_model(tmp_path: Path, prefix: str) -> None:
    """`--prefix student` and `--prefix student.` fold the same tensors, names stripped."""
    run = tmp_path / "run"
    run.mkdir()
    for step, student in enumerate(STUDENTS):
        state = {**with_prefix("student.", student), **with_prefix("students_loss.", make_average(step))}
        torch.save(state, run / f"step_{step}.pt")
    planned = assert_folds_to(run, tmp_path, STUDENTS, prefix=prefix)
    assert "students_loss.fc.weight" in dict(planned.left_out_tensors)


def test_a_prefix_that_no_name_has_lists_those_there_are(run: Path) -> None:
    """A mistyped `--prefix` is answered with the beginnings of the names."""
    error = refusal_of(run, prefix="studnet.")
    assert "`studnet.`" in error.message
    assert "bn., fc." in error.details[0]


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["w"], "omit `--prefix`"),
        (["w", ".x"], "omit `--prefix`"),
        (["a", "head.weight"], "pass `--prefix head.`"),
        (["my head.weight"], "pass `--prefix 'my head.'`"),
    ],
)
def test_the_hint_for_a_prefix_that_no_name_has_can_be_typed(tmp_path: Path, names: list[str], hint: str) -> None:
    """A name without a dot has no prefix: only those that exist are offered, and are then taken."""
    torch.save({"model": {name: torch.ones(2) for name in names}}, tmp_path / "step_1.pt")
    error = refusal_of(tmp_path, prefix="foo.")
    assert error.hint == hint
    typed = shlex.split(hint.partition("--prefix ")[2].rstrip("`")) if hint.startswith("pass") else [None]
    assert len(plan(tmp_path, prefix=typed[0]).tensors) == (len(names) if typed == [None] else 1)


class Carried(torch.nn.Module):
    """A module whose class old files carry the source of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        self.bn = torch.nn.BatchNorm1d(4)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_pickled_module_is_folded_in_both_formats(tmp_path: Path, legacy: bool) -> None:
    """`torch.save(model)`: its parameters are averaged, its buffers known exactly, none of its code is run."""
    modules = [Carried(), Carried()]
    for number, module in enumerate(modules):
        torch.save(module, tmp_path / f"step_{number}.pt", _use_new_zipfile_serialization=not legacy)
    report = quiet_fold(tmp_path, tmp_path / "t.safetensors", momentum=0.25)
    students = [{name: tensor.detach() for name, tensor in module.state_dict().items()} for module in modules]
    expected = hook_teacher(students, 0.25, ("bn.running_mean", "bn.running_var"))
    assert_same_bits(load_file(report.output), expected)
