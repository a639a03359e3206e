"""The online teacher inside real frameworks, from their own configuration to their own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckpt_ema
from ckpt_ema import CkptEmaError, MisuseError
from tests.conftest import (
    StateDict,
    assert_same_bits,
    fit_lightning,
    hook_teacher,
    lightning_trainer,
    quiet_fold,
    start_ranks,
)
from tests.test_frameworks import (
    _calm,  # noqa: F401  (a fixture for every test here as well)
    bert,
    bits_of,
    buffers_of,
    gpt2,
    lightning_module,
    load_lightning,
    load_transformers,
    make_net,
    mean_teacher_hook,
    mmengine_model,
    train_with_mmengine,
    train_with_transformers,
)

MOMENTUM = 0.1


# MMEngine ------------------------------------------------------------------------------------------------------------


def witness(seen: list[StateDict]) -> Any:
    """A hook that keeps the student after every iteration."""
    from mmengine.hooks import Hook

    class Witness(Hook):
        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            seen.append(bits_of(dict(runner.model.student.named_parameters())))

    return Witness()


def continued(teacher: StateDict, students: list[StateDict]) -> StateDict:
    """The hook's lines from a given teacher on."""
    for student in students:
        for name, tensor in teacher.items():
            tensor.mul_(1 - MOMENTUM).add_(student[name], alpha=MOMENTUM)
    return teacher


def part_of(state: StateDict, prefix: str) -> StateDict:
    """The parameters of the pair's `student.` or `teacher.`."""
    names = dict(make_net().named_parameters())
    return {name: state[f"{prefix}{name}"].clone() for name in names}


@pytest.mark.parametrize("skip_buffers", [True, False])
@pytest.mark.parametrize("interval", [1, 2])
def test_mmengine_by_mmdetections_configuration_has_the_upstream_teacher(
    tmp_path: Path, interval: int, skip_buffers: bool
) -> None:
    """A Runner with `dict(type="MeanTeacherHook", ...)` and one with the upstream rule end with the same bits."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine

    configuration = {"momentum": MOMENTUM, "interval": interval}
    hooks = [
        {"type": "MeanTeacherHook", **configuration, "skip_buffer": skip_buffers},
        {"type": "MeanTeacherHook", **configuration, "skip_buffers": skip_buffers},
        mean_teacher_hook(MOMENTUM, interval, skip_buffers=skip_buffers),
    ]
    teachers = []
    for number, hook in enumerate(hooks):
        torch.manual_seed(0)
        model = mmengine_model(pair=True)
        torch.manual_seed(0)
        runner = train_with_mmengine(model, tmp_path / str(number), [hook], randomness={"seed": 0})
        teachers.append(bits_of(runner.model.teacher.state_dict()))
    assert_same_bits(teachers[0], teachers[2])
    assert_same_bits(teachers[1], teachers[2])
    assert ckpt_ema.integrations.mmengine.STATE_KEY in torch.load(tmp_path / "0/iter_6.pth", weights_only=False)


def test_mmengine_writes_snapshots_from_which_another_teacher_is_made(tmp_path: Path) -> None:
    """By configuration alone; the run directory is then all that a reconstruction needs."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine

    snapshots = {"directory": str(tmp_path), "every": 3, "sigma_rel": 0.1}
    seen: list[StateDict] = []
    hooks = [{"type": "MeanTeacherHook", "momentum": MOMENTUM, "snapshots": snapshots}, witness(seen)]
    train_with_mmengine(mmengine_model(pair=True), tmp_path, hooks)
    plan = ckpt_ema.plan_reconstruction(tmp_path, momentum=0.3)
    assert {item.name for item in plan.averages} == {f"teacher_power_0.1_step_{step}.safetensors" for step in (3, 6)}
    assert plan.predictions[0].error < 0.5


def test_mmengine_resumes_in_the_middle_of_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher of the checkpoint goes on, nothing is copied again, and iterations count from where they stopped."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine  # noqa: F401

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # MMEngine's own resume needs it
    hook = {"type": "MeanTeacherHook", "momentum": MOMENTUM, "interval": 2}
    run = tmp_path / "run"
    train_with_mmengine(mmengine_model(pair=True), run, [hook], iterations=3)
    stored = torch.load(run / "iter_3.pth", weights_only=False)
    seen: list[StateDict] = []
    runner = train_with_mmengine(mmengine_model(pair=True), run, [hook, witness(seen)], iterations=7, resume=True)
    assert len(seen) == 4
    expected = continued(part_of(stored["state_dict"], "teacher."), [seen[0], seen[2]])  # iterations 4 and 6
    assert_same_bits(bits_of(dict(runner.model.teacher.named_parameters())), expected)
    final = torch.load(run / "iter_7.pth", weights_only=False)["mean_teacher"]
    assert (final["num_steps"], final["num_updates"]) == (7, 3)


def test_mmengine_goes_on_with_a_training_of_the_upstream_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints hold the teacher and no counters; iterations are the Runner's all the same."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine  # noqa: F401

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run = tmp_path / "run"
    upstream = mean_teacher_hook(MOMENTUM, 2, skip_buffers=True)
    train_with_mmengine(mmengine_model(pair=True), run, [upstream], iterations=3)
    stored = torch.load(run / "iter_3.pth", weights_only=False)
    hook = {"type": "MeanTeacherHook", "momentum": MOMENTUM, "interval": 2}
    seen: list[StateDict] = []
    runner = train_with_mmengine(mmengine_model(pair=True), run, [hook, witness(seen)], iterations=6, resume=True)
    expected = continued(part_of(stored["state_dict"], "teacher."), [seen[0], seen[2]])  # iterations 4 and 6
    assert_same_bits(bits_of(dict(runner.model.teacher.named_parameters())), expected)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_mmengine_load_from_keeps_a_teacher_that_it_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_teacher: bool
) -> None:
    """The upstream hook overwrites it at iteration 0; a checkpoint without one still has the student copied."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine  # noqa: F401

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    model = mmengine_model(pair=True)
    state = {
        name: tensor for name, tensor in model.state_dict().items() if has_teacher or not name.startswith("teacher.")
    }
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "start.pth")
    seen: list[StateDict] = []
    runner = train_with_mmengine(
        mmengine_model(pair=True),
        tmp_path / "run",
        [{"type": "MeanTeacherHook", "momentum": MOMENTUM}, witness(seen)],
        iterations=2,
        load_from=str(tmp_path / "start.pth"),
    )
    start = part_of(state, "teacher." if has_teacher else "student.")
    expected = continued(start, seen)
    assert_same_bits(bits_of(dict(runner.model.teacher.named_parameters())), expected)


def test_mmengine_misuse_is_told(tmp_path: Path) -> None:
    """Two words for one thing that disagree, and a model without a pair."""
    pytest.importorskip("mmengine")
    from ckpt_ema.integrations.mmengine import MeanTeacherHook

    with pytest.raises(MisuseError, match="device is 'cpu', and this hook's teacher is the model's"):
        MeanTeacherHook(device="cpu")
    with pytest.raises(MisuseError, match="skip_buffer is True and skip_buffers False"):
        MeanTeacherHook(skip_buffer=True, skip_buffers=False)
    with pytest.raises(MisuseError, match="must lie between 0 and 1"):
        MeanTeacherHook(momentum=5)
    assert MeanTeacherHook(half_life=100).options["half_life"] == 100
    with pytest.raises(CkptEmaError, match="a Plain has no `student`"):
        train_with_mmengine(mmengine_model(pair=False), tmp_path / "run", [MeanTeacherHook()], iterations=1)


# Lightning -----------------------------------------------------------------------------------------------------------


def lightning_pair(seen: list[StateDict], validated: list[StateDict], *, fail_at: int | None = None) -> Any:
    """The tests' LightningModule, which keeps its parameters after each step and at each validation."""
    module = lightning_module()

    class Watched(type(module)):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(bits_of(dict(self.named_parameters())))

        def validation_step(self, batch: list[torch.Tensor]) -> None:
            validated.append(bits_of(dict(self.named_parameters())))
            if fail_at == len(validated):
                raise ZeroDivisionError

        test_step = validation_step

    return Watched()


def labelled_batches() -> Any:
    """What the tiny net is trained with and validated on."""
    samples = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.arange(16) % 2)
    return torch.utils.data.DataLoader(samples, batch_size=4)


def teacher_of(students: list[StateDict]) -> StateDict:
    """The hook's lines from a copy of the first student on."""
    return continued({name: tensor.clone() for name, tensor in students[0].items()}, students[1:])


def test_lightning_validates_with_the_teacher_and_trains_the_student(tmp_path: Path) -> None:
    """At every validation the module holds the teacher, in every checkpoint the student; the fold finds the student."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    seen: list[StateDict] = []
    validated: list[StateDict] = []
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    run = tmp_path / "run"
    saver = ModelCheckpoint(run, save_top_k=-1, every_n_train_steps=2)
    fit_lightning(lightning_pair(seen, validated), labelled_batches(), tmp_path, [callback, saver], steps=6)
    assert len(seen) == 6
    assert len(validated) == 3
    for number, held in enumerate(validated, start=1):
        assert_same_bits(held, teacher_of(seen[: 2 * number]))
    assert callback.teacher is not None
    assert_same_bits(callback.teacher.tensors(), teacher_of(seen))
    stored = load_lightning(run)
    for number, student in enumerate(stored, start=1):
        assert_same_bits({name: student[name] for name in seen[0]}, seen[2 * number - 1])
    folded = quiet_fold(run, tmp_path / "folded.safetensors", momentum=MOMENTUM)
    assert_same_bits(load_file(folded.output), hook_teacher(stored, MOMENTUM, buffers_of(stored[0])))


def test_lightning_resumes_and_counts_optimizer_steps(tmp_path: Path) -> None:
    """Accumulated batches are one step; after a resume the teacher goes on from the checkpoint's."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    run = tmp_path / "run"
    saver = ModelCheckpoint(run, save_top_k=-1, every_n_train_steps=1)
    first = MeanTeacherCallback(momentum=MOMENTUM)
    seen: list[StateDict] = []
    fit_lightning(
        lightning_pair(seen, []), labelled_batches(), tmp_path, [first, saver], steps=3, accumulate_grad_batches=2
    )
    assert first.teacher is not None
    assert first.teacher.num_steps == 3
    students = seen[1::2][:3]
    assert_same_bits(first.teacher.tensors(), teacher_of(students))
    resumed = MeanTeacherCallback(momentum=MOMENTUM)
    more: list[StateDict] = []
    last = max(run.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=False)["global_step"])
    fit_lightning(
        lightning_pair(more, []), labelled_batches(), tmp_path, [resumed], steps=5, path=last, accumulate_grad_batches=2
    )
    assert resumed.teacher is not None
    assert resumed.teacher.num_steps == 5
    steps = [
        more[k] for k in range(1, len(more)) if not torch.equal(more[k]["net.0.weight"], more[k - 1]["net.0.weight"])
    ]
    assert_same_bits(resumed.teacher.tensors(), teacher_of([*students, *steps[-2:]]))


def test_lightning_tests_with_the_teacher_of_the_checkpoint(tmp_path: Path) -> None:
    """`trainer.test` of a checkpoint evaluates that checkpoint's teacher; `validate=False` leaves it to the student."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    seen: list[StateDict] = []
    run = tmp_path / "run"
    saver = ModelCheckpoint(run, save_top_k=-1, every_n_train_steps=2)
    fit_lightning(
        lightning_pair(seen, []), labelled_batches(), tmp_path, [MeanTeacherCallback(momentum=MOMENTUM), saver], steps=6
    )
    early = next(path for path in run.glob("*.ckpt") if torch.load(path, weights_only=False)["global_step"] == 4)
    samples = torch.utils.data.TensorDataset(torch.randn(4, 6), torch.arange(4) % 2)
    for validate, expected in ((True, teacher_of(seen[:4])), (False, seen[3])):
        tested: list[StateDict] = []
        module = lightning_pair([], tested)
        trainer = lightning_trainer(tmp_path, [MeanTeacherCallback(momentum=MOMENTUM, validate=validate)])
        trainer.test(module, torch.utils.data.DataLoader(samples, batch_size=4), ckpt_path=early, verbose=False)
        assert_same_bits(tested[0], expected)
        assert_same_bits(bits_of(dict(module.named_parameters())), seen[3])


def test_lightning_evaluates_as_it_is_what_the_teacher_does_not_follow(tmp_path: Path) -> None:
    """Another module, and a checkpoint that brings no teacher: never the numbers of the last one."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    seen: list[StateDict] = []
    tested: list[StateDict] = []
    module = lightning_pair(seen, tested)
    saver = ModelCheckpoint(tmp_path / "run", save_top_k=-1, every_n_train_steps=2, save_weights_only=True)
    trainer = lightning_trainer(tmp_path, [MeanTeacherCallback(momentum=MOMENTUM), saver], max_steps=6)
    trainer.fit(module, labelled_batches())
    other_tested: list[StateDict] = []
    other = lightning_pair([], other_tested)
    with pytest.warns(UserWarning, match="it is not the module that was trained"):
        trainer.test(other, labelled_batches(), verbose=False)
    assert_same_bits(other_tested[0], bits_of(dict(other.named_parameters())))
    early = next((tmp_path / "run").glob("*step=2.ckpt"))
    with pytest.warns(UserWarning, match="its checkpoint holds no teacher"):
        trainer.test(module, labelled_batches(), ckpt_path=early, verbose=False)
    assert_same_bits(tested[0], seen[1])


def test_lightning_says_when_there_is_no_teacher_to_evaluate(tmp_path: Path) -> None:
    """Before any training, or behind one in processes of its own: the student is evaluated, and that is told."""
    pytest.importorskip("lightning")
    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    trainer = lightning_trainer(tmp_path, [MeanTeacherCallback()], max_steps=1)
    with pytest.warns(UserWarning, match="without the mean teacher: there is none in this process"):
        trainer.test(lightning_pair([], []), labelled_batches(), verbose=False)


def test_lightning_predicts_with_the_teacher_and_goes_on_with_it(tmp_path: Path) -> None:
    """What a monitor chose is what predicts; a `fit` that trains on has the teacher of all steps."""
    pytest.importorskip("lightning")
    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    seen: list[StateDict] = []
    predicted: list[StateDict] = []
    module = lightning_pair(seen, [])
    module.predict_step = lambda batch: predicted.append(bits_of(dict(module.named_parameters())))
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    trainer = lightning_trainer(tmp_path, [callback], max_steps=6)
    trainer.fit(module, labelled_batches())
    trainer.predict(module, labelled_batches())
    assert_same_bits(predicted[0], teacher_of(seen))
    assert_same_bits(bits_of(dict(module.named_parameters())), seen[-1])
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(module, labelled_batches())
    assert callback.teacher is not None
    assert (len(seen), callback.teacher.num_updates) == (9, 9)
    assert_same_bits(callback.teacher.tensors(), teacher_of(seen))
    # Another training of the same module begins anew.
    lightning_trainer(tmp_path, [callback], max_steps=1).fit(module, labelled_batches())
    assert callback.teacher.num_updates == 1


@pytest.mark.parametrize("num_stepped", [1, 2])
def test_lightning_refuses_snapshots_where_a_batch_has_several_steps(tmp_path: Path, num_stepped: int) -> None:
    """Its checkpoints are called by optimizer steps, and the teacher counts batches; one step in each is fine."""
    pytest.importorskip("lightning")
    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    module = lightning_pair([], [])
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]
    plain_step = module.training_step

    def training_step(batch: Any) -> None:
        module.manual_backward(plain_step(batch))
        for optimizer in module.optimizers()[:num_stepped]:
            optimizer.step()

    module.training_step = training_step
    callback = MeanTeacherCallback(snapshots=ckpt_ema.Snapshots(tmp_path / "tracks", every=2))
    trainer = lightning_trainer(tmp_path, [callback], max_steps=6)
    if num_stepped == 1:
        trainer.fit(module, labelled_batches())
        assert len(list((tmp_path / "tracks").iterdir())) == 6
        return
    with pytest.raises(MisuseError, match="several optimizer steps in each"):
        trainer.fit(module, labelled_batches())


def test_lightning_says_when_a_resumed_training_has_no_teacher(tmp_path: Path) -> None:
    """The checkpoint was written without the callback."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    saver = ModelCheckpoint(tmp_path / "run", save_top_k=-1, every_n_train_steps=2)
    lightning_trainer(tmp_path, [saver], max_steps=6).fit(lightning_pair([], []), labelled_batches())
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    early = next((tmp_path / "run").glob("*step=2.ckpt"))
    module = lightning_pair([], [])
    trainer = lightning_trainer(tmp_path, [callback], max_steps=6)
    for _ in range(2):  # the second time another future's teacher is there
        with pytest.warns(UserWarning, match="from step 2 without a teacher's state"):
            trainer.fit(module, labelled_batches(), ckpt_path=early)
        assert callback.teacher is not None
        assert (callback.teacher.num_steps, callback.teacher.num_updates) == (6, 4)


def test_lightning_does_not_go_on_with_the_teacher_of_a_checkpoint_that_was_tested(tmp_path: Path) -> None:
    """Its step is not the one that training goes on from."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    callback, module = MeanTeacherCallback(momentum=MOMENTUM), lightning_pair([], [])
    saver = ModelCheckpoint(tmp_path / "run", save_top_k=-1, every_n_train_steps=2)
    trainer = lightning_trainer(tmp_path, [callback, saver], max_steps=6)
    trainer.fit(module, labelled_batches())
    early = next((tmp_path / "run").glob("*step=2.ckpt"))
    trainer.test(module, labelled_batches(), ckpt_path=early, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 8
    with pytest.warns(UserWarning, match="from step 6 without a teacher's state"):
        trainer.fit(module, labelled_batches())
    assert callback.teacher is not None
    assert (callback.teacher.num_steps, callback.teacher.num_updates) == (8, 2)


def test_lightning_gives_the_student_back_when_validation_fails(tmp_path: Path) -> None:
    """What a handler of the exception saves is the student."""
    pytest.importorskip("lightning")
    from ckpt_ema.integrations.lightning import MeanTeacherCallback

    seen: list[StateDict] = []
    module = lightning_pair(seen, [], fail_at=2)
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    with pytest.raises(ZeroDivisionError):
        fit_lightning(module, labelled_batches(), tmp_path, [callback], steps=6)
    assert_same_bits(bits_of(dict(module.named_parameters())), seen[-1])
    assert callback.teacher is not None
    assert_same_bits(callback.teacher.tensors(), teacher_of(seen))


def test_lightning_resumes_a_sharded_teacher_on_every_rank(tmp_path: Path) -> None:
    """Lightning keeps what the first rank's callbacks say, and gives that to all of them."""
    pytest.importorskip("lightning")
    start_ranks("lightning_ranks.py", 2, tmp_path)


# accelerate ----------------------------------------------------------------------------------------------------------


def test_attached_to_accelerates_optimizer_it_counts_steps_and_not_batches() -> None:
    """The wrapper has no hooks of its own, and does not step for accumulated batches."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    teacher = ckpt_ema.MeanTeacher(model, momentum=MOMENTUM)
    handle = teacher.attach(optimizer)
    students: list[StateDict] = []
    for number in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(4, 3)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if number % 2:
            students.append(bits_of(model.state_dict()))
    assert teacher.num_steps == 3
    assert_same_bits(teacher.tensors(), teacher_of(students))
    handle.remove()
    optimizer.step()
    assert teacher.num_steps == 3


# Transformers --------------------------------------------------------------------------------------------------------


def test_transformers_saves_the_teacher_of_a_plain_module_like_its_student(tmp_path: Path) -> None:
    """The Trainer trains any module, and writes its state dict; training resumes with that teacher."""
    pytest.importorskip("transformers")
    from ckpt_ema.integrations.transformers import MeanTeacherCallback

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    run = tmp_path / "run"
    seen: list[StateDict] = []
    train_with_transformers(Plain(), run, steps=4, callbacks=[MeanTeacherCallback(momentum=MOMENTUM), watcher(seen)])
    for step in (2, 4):
        folder = run / f"checkpoint-{step}"
        assert_same_bits(load_file(folder / "teacher/model.safetensors"), hook_teacher(seen[:step], MOMENTUM))
        assert_same_bits(load_file(folder / "model.safetensors"), seen[step - 1])
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    train_with_transformers(Plain(), run, steps=6, callbacks=[callback, watcher(seen)], resume=run / "checkpoint-4")
    assert callback.teacher is not None
    assert_same_bits(load_file(run / "checkpoint-6/teacher/model.safetensors"), hook_teacher(seen, MOMENTUM))


def watcher(seen: list[StateDict]) -> Any:
    """A callback that keeps the student after every step."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append(bits_of(model.state_dict()))

    return Watcher()


@pytest.mark.parametrize("make", [bert, gpt2])
def test_transformers_checkpoints_hold_a_teacher_that_loads(tmp_path: Path, make: Any) -> None:
    """`checkpoint-N/teacher` loads by `from_pretrained`, tied weights and tokenizer included; the run still folds."""
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    from ckpt_ema.integrations.transformers import MeanTeacherCallback

    seen: list[StateDict] = []
    run = tmp_path / "run"
    model = make()
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    train_with_transformers(model, run, steps=6, callbacks=[callback, watcher(seen)])
    assert len(seen) == 6
    for step in (2, 4, 6):
        folder = run / f"checkpoint-{step}"
        assert_same_bits(load_transformers(folder / "teacher", model), hook_teacher(seen[:step], MOMENTUM))
        assert_same_bits(load_transformers(folder, model), seen[step - 1])
        assert AutoTokenizer.from_pretrained(folder / "teacher")("mean teacher")["input_ids"] == [2, 3]
        # The model has no record to write; that ckpt-ema had no part in it would be a lie.
        found = ckpt_ema.verify(folder / "teacher")
        assert found.is_ok
        assert found.checks[-1].text.startswith("none: nothing in it says how it was made")
    assert_same_bits(bits_of(model.state_dict()), seen[-1])
    students = [seen[1], seen[3], seen[5]]
    report = quiet_fold(run, tmp_path / "folded", momentum=MOMENTUM)
    assert_same_bits(load_transformers(report.output, model), hook_teacher(students, MOMENTUM))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_resumes_with_the_teacher_it_stopped_with(tmp_path: Path, dtype: torch.dtype) -> None:
    """In the teacher's own precision, which is more than that of the saved bfloat16 model."""
    pytest.importorskip("transformers")
    from ckpt_ema.integrations.transformers import MeanTeacherCallback

    run = tmp_path / "run"
    seen: list[StateDict] = []
    train_with_transformers(
        bert().to(dtype), run, steps=4, callbacks=[MeanTeacherCallback(momentum=MOMENTUM), watcher(seen)]
    )
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    train_with_transformers(
        bert().to(dtype), run, steps=6, callbacks=[callback, watcher(seen)], resume=run / "checkpoint-4"
    )
    assert callback.teacher is not None
    assert (callback.teacher.num_steps, len(seen)) == (6, 6)
    wide = [{name: tensor.float() for name, tensor in student.items()} for student in seen]
    expected = hook_teacher(wide, MOMENTUM)
    found = callback.teacher.tensors()
    assert_same_bits(found, {name: expected[name] for name in found})
    # Another training's checkpoint of the same step lies where the Trainer saves: its teacher is not taken.
    other = tmp_path / "other"
    train_with_transformers(bert().to(dtype), other, steps=4, callbacks=[MeanTeacherCallback(momentum=MOMENTUM)])
    with pytest.raises(ckpt_ema.CkptEmaError, match="is the teacher of another student"):
        train_with_transformers(
            bert().to(dtype), other, steps=5, callbacks=[MeanTeacherCallback()], resume=run / "checkpoint-4"
        )
    told = MeanTeacherCallback(momentum=MOMENTUM, resume_from=run / "checkpoint-4")
    train_with_transformers(bert().to(dtype), other, steps=5, callbacks=[told], resume=run / "checkpoint-4")
    assert told.teacher is not None
    assert told.teacher.num_steps == 5
    (run / "checkpoint-6" / "mean_teacher.safetensors").unlink()
    with pytest.warns(UserWarning, match="the teacher begins anew"):
        train_with_transformers(
            bert().to(dtype), run, steps=8, callbacks=[MeanTeacherCallback()], resume=run / "checkpoint-6"
        )


def test_transformers_snapshots_of_a_tied_model_fit_its_checkpoints(tmp_path: Path) -> None:
    """The Trainer leaves one name of a tied tensor out: snapshots, and what `save` writes, fit all the same."""
    pytest.importorskip("transformers")
    from ckpt_ema.integrations.transformers import MeanTeacherCallback

    run, model = tmp_path / "run", gpt2()
    seen: list[StateDict] = []
    callback = MeanTeacherCallback(momentum=MOMENTUM, snapshots=ckpt_ema.Snapshots(run, every=2, momentum=0.3))
    train_with_transformers(model, run, steps=6, callbacks=[callback, watcher(seen)])
    assert callback.teacher is not None
    saved = load_file(callback.teacher.save(tmp_path / "t.safetensors"))
    stored = load_file(run / "checkpoint-6" / "model.safetensors")
    assert saved.keys() - stored.keys() == {"lm_head.weight"}
    # The track itself is asked for: the coefficients name one file.
    report = ckpt_ema.reconstruct(run, tmp_path / "again", momentum=0.3, announce=lambda plan: None)
    assert report.plan.predictions[0].error < 1e-3
    again = load_transformers(report.output, model)
    lerped = {name: tensor.clone() for name, tensor in seen[0].items()}
    for student in seen[1:]:
        for name, tensor in lerped.items():
            tensor.lerp_(student[name], 0.3)
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, lerped[name])
    gone_on = quiet_fold(run, tmp_path / "on", init=tmp_path / "t.safetensors", momentum=0.5, from_step=6)
    folded = load_file(gone_on.output / "model.safetensors")
    assert folded.keys() == stored.keys()
    for name, tensor in folded.items():
        assert torch.equal(tensor, saved[name].mul(0.5).add(stored[name], alpha=0.5)), name


def lora() -> Any:
    """The tiny BERT, each time the same, with adapters on its queries, which alone are trained and saved."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))


def test_transformers_resumes_adapters_with_their_teacher(tmp_path: Path) -> None:
    """The Trainer takes every folder with an adapter in a checkpoint for one of the model's: the teacher is none."""
    peft = pytest.importorskip("peft")
    from ckpt_ema.integrations.transformers import MeanTeacherCallback

    run = tmp_path / "run"
    seen: list[StateDict] = []
    train_with_transformers(lora(), run, steps=4, callbacks=[MeanTeacherCallback(momentum=MOMENTUM), watcher(seen)])
    callback, model = MeanTeacherCallback(momentum=MOMENTUM), lora()
    train_with_transformers(model, run, steps=6, callbacks=[callback, watcher(seen)], resume=run / "checkpoint-4")
    assert list(model.peft_config) == ["default"]
    assert callback.teacher is not None
    found = callback.teacher.tensors()
    expected = hook_teacher(seen, MOMENTUM)
    assert_same_bits(found, {name: expected[name] for name in found})
    loaded = peft.PeftModel.from_pretrained(bert(), run / "checkpoint-6" / "teacher" / "adapter")
    adapters = {name: tensor for name, tensor in bits_of(loaded.state_dict()).items() if "lora" in name}
    assert_same_bits(adapters, {name: expected[name] for name in adapters})
    assert len(adapters) == 4
    assert [item.step for item in ckpt_ema.plan(run, momentum=MOMENTUM).checkpoints] == [2, 4, 6]


def test_transformers_writes_into_the_folder_of_a_trial(tmp_path: Path) -> None:
    """A hyperparameter search saves each trial in a folder of its own, and tells callbacks another one."""
    pytest.importorskip("transformers")
    pytest.importorskip("optuna")
    from transformers import Trainer, TrainingArguments

    from ckpt_ema.integrations.transformers import MeanTeacherCallback

    samples = [{"input_ids": torch.arange(8), "attention_mask": torch.ones(8).long(), "labels": k % 2} for k in (0, 1)]
    callback = MeanTeacherCallback(momentum=MOMENTUM)
    trainer = Trainer(
        model_init=bert,
        args=TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True),
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=[callback],
    )
    teachers: list[StateDict] = []

    def keep_teacher(metrics: dict[str, float]) -> float:
        assert callback.teacher is not None
        teachers.append({name: tensor.clone() for name, tensor in callback.teacher.tensors().items()})
        return metrics["eval_loss"]

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        compute_objective=keep_teacher,
        hp_name=lambda trial: f"trials/{trial.number}",
        n_trials=2,
        backend="optuna",
    )
    for number, teacher in enumerate(teachers):
        loaded = load_transformers(tmp_path / "trials" / str(number) / "checkpoint-2" / "teacher", bert())
        assert_same_bits({name: loaded[name] for name in teacher}, teacher)


def test_transformers_refuses_two_teachers_of_one_training(tmp_path: Path) -> None:
    """Both would write the same files; one after the other is fine."""
    pytest.importorskip("transformers")
    from ckpt_ema.integrations.transformers import MeanTeacherCallback

    callbacks = [MeanTeacherCallback(momentum=0.1), MeanTeacherCallback(momentum=0.2)]
    with pytest.raises(MisuseError, match="two MeanTeacherCallbacks"):
        train_with_transformers(bert(), tmp_path / "both", steps=2, callbacks=callbacks)
    with pytest.raises(MisuseError, match="two MeanTeacherCallbacks"):
        train_with_transformers(bert(), tmp_path / "twice", steps=2, callbacks=[callbacks[0], callbacks[0]])
    for callback in callbacks:
        train_with_transformers(bert(), tmp_path / "each", steps=2, callbacks=[callback])
