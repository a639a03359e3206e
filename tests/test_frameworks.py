"""Checkpoints written by the real frameworks, and their folds against the hook's rule run beside the training."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckpt_ema
from tests.conftest import Outcome, StateDict, assert_same_bits, hook_teacher, lightning_trainer

# Read when huggingface_hub is imported: a test must never wait for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

MOMENTUM = 0.1
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    """The same random numbers for every test, and no chatter of the frameworks."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quiet_fold(run: Path | Sequence[Path], output: Path | None = None, **options: Any) -> ckpt_ema.FoldReport:
    """Fold with the tests' momentum and without Python warnings about the first share."""
    return ckpt_ema.fold(run, output, announce=lambda plan: None, **{"momentum": MOMENTUM, **options})


def fold_to_tensors(run: Path, tmp_path: Path, **options: Any) -> StateDict:
    """The teacher's tensors of a run that is no Hugging Face folder."""
    return load_file(quiet_fold(run, tmp_path / "teacher.safetensors", **options).output)


def make_net() -> torch.nn.Module:
    """A student with parameters and with buffers that move."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 2, bias=False)
    )


def buffers_of(state: StateDict) -> list[str]:
    """BatchNorm's running statistics."""
    return [name for name in state if name.endswith(RUNNING)]


def bits_of(state: StateDict) -> StateDict:
    """A state dict's tensors alone, detached from the framework's kind of dict."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def steps_of(report: ckpt_ema.FoldReport) -> list[int | None]:
    """Steps that took part, in the order they were folded."""
    return [checkpoint.step for checkpoint in report.plan.checkpoints]


# MMEngine ------------------------------------------------------------------------------------------------------------


def train_with_mmengine(
    model: Any, work_dir: Path, hooks: list[Any], *, iterations: int = 6, by_epoch: bool = False, **settings: Any
) -> Any:
    """Train `model` in a real Runner that saves after every iteration (or every second one, an epoch)."""
    from mmengine.runner import Runner

    # MMEngine sleeps two seconds wherever its data begins anew, so one pass has to do.
    samples = [(torch.randn(6), torch.tensor(k % 2)) for k in range(8 if by_epoch else 4 * iterations)]
    duration = {"max_epochs": iterations // 2} if by_epoch else {"max_iters": iterations}
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        experiment_name=work_dir.as_posix().replace("/", "_"),
        train_dataloader=torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True),
        train_cfg={"by_epoch": by_epoch, **duration},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": by_epoch}},
        custom_hooks=hooks,
        log_level="ERROR",
        **settings,
    )
    runner.train()
    return runner


def mmengine_model(*, pair: bool) -> Any:
    """A model for the Runner: one net, or a student beside the teacher that a hook moves."""
    from mmengine.model import BaseModel

    class Tiny(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.student = make_net()
            self.teacher = copy.deepcopy(make_net() if pair else torch.nn.Identity())

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mode: str = "tensor") -> Any:
            logits = self.student(inputs)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels)} if mode == "loss" else logits

    class Plain(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = make_net()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mode: str = "tensor") -> Any:
            logits = self.backbone(inputs)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels)} if mode == "loss" else logits

    return Tiny() if pair else Plain()


def mean_teacher_hook(momentum: float, interval: int, *, skip_buffers: bool) -> Any:
    """The rule of MMDetection's MeanTeacherHook; it also saves the student it starts from, as `iter_0.pth`."""
    from mmengine.hooks import Hook

    class MeanTeacherHook(Hook):
        def before_train(self, runner: Any) -> None:
            self.update(runner.model, 1)
            runner.save_checkpoint(
                runner.work_dir, "iter_0.pth", by_epoch=False, meta={"iter": 0, "epoch": 0}, save_param_scheduler=False
            )

        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            if (runner.iter + 1) % interval == 0:
                self.update(runner.model, momentum)

        def update(self, model: Any, share: float) -> None:
            if skip_buffers:
                pairs = zip(model.student.parameters(), model.teacher.parameters(), strict=True)
            else:
                states = model.student.state_dict(), model.teacher.state_dict()
                pairs = zip(states[0].values(), states[1].values(), strict=True)
            for source, target in pairs:
                if target.dtype.is_floating_point:
                    target.data.mul_(1 - share).add_(source.data, alpha=share)

    return MeanTeacherHook()


@pytest.mark.parametrize("skip_buffers", [True, False])
@pytest.mark.parametrize(("momentum", "interval"), [(0.1, 1), (0.001, 1), (0.25, 2)])
def test_mmengine_fold_is_the_online_teacher(
    tmp_path: Path, momentum: float, interval: int, skip_buffers: bool
) -> None:
    """The fold of a Runner's checkpoints has the bits of the teacher that MeanTeacherHook's rule trained beside it."""
    pytest.importorskip("mmengine")
    run = tmp_path / "run"
    runner = train_with_mmengine(
        mmengine_model(pair=True), run, [mean_teacher_hook(momentum, interval, skip_buffers=skip_buffers)]
    )
    assert (run / "last_checkpoint").is_file()
    report = quiet_fold(
        run, tmp_path / "t.safetensors", momentum=momentum, interval=interval, skip_buffers=skip_buffers
    )
    teacher = load_file(tmp_path / "t.safetensors")
    assert steps_of(report) == list(range(0, 7, interval))
    online = bits_of(runner.model.teacher.state_dict())
    student = bits_of(runner.model.student.state_dict())
    for name in student:
        # What the hook does not average the tool takes from the newest student, the hook leaves as it was.
        if name.endswith(RUNNING) and (skip_buffers or not student[name].is_floating_point()):
            online[name] = student[name]
    assert_same_bits(teacher, online)


@pytest.mark.parametrize("by_epoch", [False, True])
def test_mmengine_ema_hook_swaps_and_the_raw_student_is_folded(tmp_path: Path, by_epoch: bool) -> None:
    """With EMAHook `state_dict` is the average and `ema_state_dict` the student as trained, which is what is folded."""
    pytest.importorskip("mmengine")
    from mmengine.hooks import EMAHook, Hook

    trained: list[StateDict] = []

    class Witness(Hook):
        priority = "NORMAL"

        def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            trained.append(bits_of(runner.model.state_dict()))

    run = tmp_path / "run"
    train_with_mmengine(mmengine_model(pair=False), run, [Witness(), EMAHook(momentum=0.5)], by_epoch=by_epoch)
    stored = torch.load(max(run.glob("*.pth")), weights_only=False)
    assert not torch.equal(stored["state_dict"]["backbone.0.weight"], trained[-1]["backbone.0.weight"])
    assert_same_bits(fold_to_tensors(run, tmp_path), hook_teacher(trained, MOMENTUM, buffers_of(trained[0])))


# Lightning -----------------------------------------------------------------------------------------------------------


def lightning_module() -> Any:
    """A LightningModule around the tiny net."""
    import lightning

    class Tiny(lightning.LightningModule):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = make_net()

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Tiny()


def train_with_lightning(root: Path, callbacks: list[Any], *, steps: int = 12, logger: Any = False) -> None:
    """`steps` steps in a real Trainer."""
    samples = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.arange(16) % 2)
    trainer = lightning_trainer(root, callbacks, max_steps=steps, logger=logger)
    trainer.fit(lightning_module(), torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True))


def load_lightning(run: Path, key: str = "state_dict") -> list[StateDict]:
    """The students of every numbered checkpoint, by `global_step`."""
    loaded = [torch.load(path, weights_only=False) for path in run.glob("epoch=*.ckpt")]
    return [bits_of(item[key]) for item in sorted(loaded, key=lambda item: item["global_step"])]


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_lightning_fold_is_the_hooks_rule(tmp_path: Path, save_last: Any, weights_only: bool) -> None:
    """A ModelCheckpoint folder is folded by global_step, and `last.ckpt` is no further checkpoint."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    run = tmp_path / "run"
    train_with_lightning(
        tmp_path,
        [
            ModelCheckpoint(
                run, save_top_k=-1, every_n_train_steps=2, save_last=save_last, save_weights_only=weights_only
            )
        ],
    )
    assert (run / "last.ckpt").exists()
    students = load_lightning(run)
    assert len(students) == 6
    report = quiet_fold(run, tmp_path / "t.safetensors")
    assert steps_of(report) == [2, 4, 6, 8, 10, 12]
    assert "last.ckpt" in {name for name, _ in report.plan.left_out}
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, MOMENTUM, buffers_of(students[0])))


def test_lightning_checkpoints_are_found_below_the_root(tmp_path: Path) -> None:
    """Passing the root folder is enough: the checkpoints lie three levels below, beside logs."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    root = tmp_path / "root"
    train_with_lightning(
        root, [ModelCheckpoint(save_top_k=-1, every_n_train_steps=3)], logger=CSVLogger(root, name="lightning_logs")
    )
    report = quiet_fold(root)
    run = root / "lightning_logs" / "version_0" / "checkpoints"
    assert report.plan.directory == run
    assert report.output == root / "teacher.safetensors"
    students = load_lightning(run)
    assert_same_bits(load_file(report.output), hook_teacher(students, MOMENTUM, buffers_of(students[0])))


@pytest.mark.parametrize("callback", ["WeightAveraging", "EMAWeightAveraging"])
def test_lightning_weight_averaging_keeps_the_raw_student_apart(tmp_path: Path, callback: str) -> None:
    """Under Lightning's averaging callbacks `state_dict` is the average; `current_model_state` is folded."""
    pytest.importorskip("lightning")
    from lightning.pytorch import callbacks

    if not hasattr(callbacks, callback):
        pytest.skip(f"this Lightning has no {callback}")
    run = tmp_path / "run"
    train_with_lightning(
        tmp_path, [getattr(callbacks, callback)(), callbacks.ModelCheckpoint(run, save_top_k=-1, every_n_train_steps=2)]
    )
    students = load_lightning(run, "current_model_state")
    assert len(students) == 6
    averages = load_lightning(run)
    assert not torch.equal(students[-1]["net.0.weight"], averages[-1]["net.0.weight"])
    report = quiet_fold(run, tmp_path / "t.safetensors")
    assert {checkpoint.state_key for checkpoint in report.plan.checkpoints} == {"current_model_state"}
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, MOMENTUM, buffers_of(students[0])))


def test_lightning_checkpoints_saved_twice_under_one_step_are_refused(tmp_path: Path) -> None:
    """Two runs into one folder leave `-v1` files of the same step: which one counts is asked, not guessed."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    run = tmp_path / "run"
    for _ in range(2):
        train_with_lightning(tmp_path, [ModelCheckpoint(run, save_top_k=-1, every_n_train_steps=2)], steps=4)
    assert list(run.glob("*-v1.ckpt"))
    with pytest.raises(ckpt_ema.CkptEmaError, match="2 checkpoints claim step 2"):
        ckpt_ema.plan(run)
    assert steps_of(quiet_fold(run, tmp_path / "t.safetensors", exclude=("*-v1.ckpt",))) == [2, 4]


# Transformers --------------------------------------------------------------------------------------------------------


def bert() -> Any:
    """A two-layer BERT classifier; its `pooler` and heads make 40 tensors."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def gpt2() -> Any:
    """A two-layer GPT-2: its output layer is tied to its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def tokenizer() -> Any:
    """A tokenizer of four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "mean": 2, "teacher": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


def train_with_transformers(
    model: Any, output: Path, *, steps: int = 12, callbacks: Sequence[Any] = (), resume: Path | None = None
) -> Any:
    """`steps` steps in a real Trainer, saving after every second one."""
    from transformers import Trainer, TrainingArguments

    samples = [
        {"input_ids": torch.randint(0, 32, (8,)), "attention_mask": torch.ones(8).long(), "labels": k % 2}
        for k in range(16)
    ]
    if type(model).__name__.startswith("GPT2"):
        samples = [{**sample, "labels": sample["input_ids"]} for sample in samples]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(output),
            max_steps=steps,
            save_steps=2,
            learning_rate=0.01,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=samples,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def load_transformers(path: Path, model: Any, **options: Any) -> StateDict:
    """What `from_pretrained` makes of a folder, in the dtype that its configuration says."""
    loaded, info = type(model).from_pretrained(path, output_loading_info=True, **{"dtype": "auto", **options})
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return bits_of(loaded.state_dict())


@pytest.mark.parametrize("make", [bert, gpt2])
def test_transformers_run_becomes_a_model_folder(
    tmp_path: Path, make: Callable[[], Any], cli: Callable[..., Outcome]
) -> None:
    """`ckpt-ema fold OUTPUT_DIR` gives a folder with tokenizer that loads as the hook's teacher of the students."""
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    model = make()
    trainer = train_with_transformers(model, run)
    trainer.save_model()  # the final model beside checkpoint-N/ is no further checkpoint
    students = [load_transformers(run / f"checkpoint-{step}", model) for step in range(2, 13, 2)]
    assert not torch.equal(*(next(iter(students[k].values())) for k in (0, 1)))

    outcome = cli("fold", run, "--momentum", MOMENTUM)
    assert outcome.code == 0, outcome.stderr
    teacher = run / "teacher"
    assert outcome.stdout == f"{teacher}\n"
    assert_same_bits(load_transformers(teacher, model), hook_teacher(students, MOMENTUM))

    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(teacher)("mean teacher")["input_ids"] == [2, 3]
    kept = {path.name for path in teacher.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= kept
    assert not kept & {"optimizer.pt", "scheduler.pt", "training_args.bin", "trainer_state.json"}
    assert not [name for name in kept if name.startswith("rng_state")]
    assert (teacher / "config.json").read_bytes() == (run / "checkpoint-12" / "config.json").read_bytes()


def test_transformers_run_is_folded_again_without_its_own_teacher(tmp_path: Path) -> None:
    """The teacher folder in the run is no student of the next fold, which may replace it and has the same bytes."""
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    train_with_transformers(bert(), run, steps=4)
    first = quiet_fold(run)
    written = (run / "teacher" / "model.safetensors").read_bytes()
    with pytest.raises(ckpt_ema.CkptEmaError, match="exists"):
        quiet_fold(run)
    again = quiet_fold(run, overwrite=True)
    assert steps_of(first) == steps_of(again) == [2, 4]
    assert (run / "teacher" / "model.safetensors").read_bytes() == written


def save_by_hand(model: Any, folder: Path, kind: str) -> None:
    """One checkpoint folder of an older or a larger run."""
    if kind == "sharded":
        model.save_pretrained(folder, max_shard_size="4KB")
        assert (folder / "model.safetensors.index.json").is_file()
        return
    model.config.save_pretrained(folder)
    state = bits_of(model.state_dict())
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {}
    for index in range(3):
        shard = f"pytorch_model-{index + 1:05d}-of-00003.bin"
        torch.save({name: state[name] for name in names[index::3]}, folder / shard)
        weight_map.update(dict.fromkeys(names[index::3], shard))
    index_table = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index_table))


@pytest.mark.parametrize("kind", ["sharded", "bin", "sharded bin"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_transformers_folders_of_every_kind(tmp_path: Path, kind: str, make: Callable[[], Any]) -> None:
    """Shards with their index and the older pickles fold to one safetensors file that loads, tied weights included."""
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    students = []
    for step in (500, 1000, 1500):
        model = make()
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_by_hand(model, run / f"checkpoint-{step}", kind)
        students.append(bits_of(model.state_dict()))
    report = quiet_fold(run)
    assert steps_of(report) == [500, 1000, 1500]
    names = {path.name for path in report.output.iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith("index.json")]
    assert_same_bits(load_transformers(report.output, model), hook_teacher(students, MOMENTUM))


def test_several_teachers_of_a_transformers_run_are_a_folder_each(tmp_path: Path) -> None:
    """Each beside its own copy of the configuration, each the teacher of its own fold."""
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    students = []
    for step in (10, 20, 30):
        model = bert()
        model.save_pretrained(run / f"checkpoint-{step}")
        students.append(bits_of(model.state_dict()))
    report = quiet_fold(run, momentum=[0.25, 0.5])
    assert [teacher.output for teacher in report.plan.teachers] == [run / "teacher-0.25", run / "teacher-0.5"]
    for teacher in report.plan.teachers:
        expected = hook_teacher(students, teacher.momentum)
        assert_same_bits(load_transformers(teacher.output, model), expected)


@pytest.mark.parametrize("dtype", ["student", "float32", "float16"])
def test_transformers_teacher_loads_in_the_dtype_it_was_written_in(tmp_path: Path, dtype: str) -> None:
    """bfloat16 students and `--dtype float32`: the configuration says float32, so nothing is rounded on loading."""
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    students = []
    for step in (10, 20, 30):
        model = bert().to(torch.bfloat16)
        model.save_pretrained(run / f"checkpoint-{step}")
        students.append(bits_of(model.state_dict()))
    report = quiet_fold(run, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "student" else getattr(torch, dtype)
    config = json.loads((report.output / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(wanted).removeprefix("torch.")
    wide = hook_teacher([{name: tensor.float() for name, tensor in s.items()} for s in students], MOMENTUM)
    assert_same_bits(
        load_transformers(report.output, model), {name: tensor.to(wanted) for name, tensor in wide.items()}
    )


def test_transformers_folders_in_the_order_given(tmp_path: Path) -> None:
    """Checkpoint folders as arguments are folded as listed, into the folder that is named."""
    pytest.importorskip("transformers")
    folders, students = [], []
    for step in (1, 2, 3):
        model = bert()
        folders.append(tmp_path / f"checkpoint-{step}")
        model.save_pretrained(folders[-1])
        students.append(bits_of(model.state_dict()))
    report = quiet_fold(folders[::-1], tmp_path / "mean")
    assert steps_of(report) == [3, 2, 1]
    assert_same_bits(load_transformers(tmp_path / "mean", model), hook_teacher(students[::-1], MOMENTUM))


# accelerate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Any]:
    """An Accelerator that names its checkpoints itself; its state, one per process, is forgotten afterwards."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    AcceleratorState._reset_state(True)
    configuration = ProjectConfiguration(str(tmp_path / "project"), automatic_checkpoint_naming=True)
    yield Accelerator(cpu=True, project_config=configuration)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_accelerate_project_is_folded_in_the_order_of_its_saves(
    accelerator: Any, tmp_path: Path, safe_serialization: bool
) -> None:
    """`save_state` with automatic names: the project folder is enough, and save 10 comes after save 9."""
    project = Path(accelerator.project_dir)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    model, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    students = []
    for _ in range(12):
        loss = model(torch.randn(4, 6)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        accelerator.save_state(safe_serialization=safe_serialization)
        students.append(bits_of(accelerator.unwrap_model(model).state_dict()))
    assert (project / "checkpoints" / "checkpoint_11").is_dir()
    report = quiet_fold(project, tmp_path / "t.safetensors")
    assert [item.name for item in report.plan.checkpoints] == [f"checkpoint_{k}" for k in range(12)]
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, MOMENTUM, buffers_of(students[0])))


def test_accelerate_trains_on_beside_a_teacher(accelerator: Any, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    """Its `save_state` and `load_state` want a number in every name in `checkpoints/`: ours is never put there."""
    checkpoints = Path(accelerator.project_dir) / "checkpoints"
    accelerator.prepare(make_net())
    for _ in range(3):
        accelerator.save_state()
    refused = cli("fold", checkpoints, "-o", checkpoints / "teacher-1.safetensors")
    assert refused.code == 2
    assert f"hint: pass `--output {checkpoints.parent / 'teacher-1.safetensors'}`" in refused.stderr
    assert cli("fold", checkpoints).code == 0
    assert (checkpoints.parent / "teacher.safetensors").is_file()
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"checkpoint_{k}" for k in range(3)]
    accelerator.project_configuration.total_limit = 3
    accelerator.save_state()
    accelerator.load_state()


def test_accelerate_projects_of_two_models_ask_which_one(accelerator: Any, tmp_path: Path) -> None:
    """Two prepared models lie side by side in each save: `--state` names the one to fold."""
    project = Path(accelerator.project_dir)
    first, second = accelerator.prepare(make_net(), torch.nn.Linear(3, 3))
    students = []
    for _ in range(3):
        for net in (first, second):
            torch.nn.init.normal_(net.weight if net is second else net[0].weight)
        accelerator.save_state()
        students.append(bits_of(second.state_dict()))
    with pytest.raises(ckpt_ema.CkptEmaError) as caught:
        ckpt_ema.plan(project)
    assert "--state" in (caught.value.hint or "")
    teacher = fold_to_tensors(project, tmp_path, state="model_1")
    assert_same_bits(teacher, hook_teacher(students, MOMENTUM))


# loading -------------------------------------------------------------------------------------------------------------


def test_a_teacher_is_loaded_as_the_readme_says(tmp_path: Path) -> None:
    """Into a module, Lightning's too; as a `.pth` by MMEngine; by torch.distributed.checkpoint."""
    pytest.importorskip("mmengine")
    pytest.importorskip("lightning")
    import safetensors.torch
    import torch.distributed.checkpoint as dcp
    from lightning.pytorch.callbacks import ModelCheckpoint
    from mmengine.runner import load_checkpoint

    for step in (1, 2, 3):
        torch.manual_seed(step)
        torch.save({"model": make_net().state_dict()}, tmp_path / f"step_{step}.pt")
    expected = load_file(quiet_fold(tmp_path, tmp_path / "teacher.safetensors").output)
    model = make_net()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "teacher.safetensors"))
    assert_same_bits(bits_of(model.state_dict()), expected)
    torch.save(safetensors.torch.load_file(tmp_path / "teacher.safetensors"), tmp_path / "teacher.pth")
    model = make_net()
    load_checkpoint(model, str(tmp_path / "teacher.pth"), map_location="cpu", strict=True)
    assert_same_bits(bits_of(model.state_dict()), expected)
    quiet_fold([tmp_path / f"step_{step}.pt" for step in (1, 2, 3)], tmp_path / "teacher", output_format="dcp")
    model = make_net()
    dcp.load(model.state_dict(), checkpoint_id=tmp_path / "teacher", no_dist=True)
    assert_same_bits(bits_of(model.state_dict()), expected)
    run = tmp_path / "lightning"
    train_with_lightning(run, [ModelCheckpoint(run, every_n_train_steps=2, save_top_k=-1)], steps=6)
    module = lightning_module()
    module.load_state_dict(safetensors.torch.load_file(quiet_fold(run, tmp_path / "l.safetensors").output))
    assert_same_bits(bits_of(module.state_dict()), load_file(tmp_path / "l.safetensors"))
