"""A step of training: as recorded, with CUDA graphs played by a function that is run again, and as it is."""

import json
import shutil
from functools import partial

import pytest
import torch
from played import play_graphs
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from avfkernels import capture, layer
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.tasks.pretrain import Pretrain, PretrainConfig
from avfusion.training import loop as train
from avfusion.training.optim import adamw, set_rate
from avfusion.training.run_folder import RunError
from avfusion.training.step import RecordedStep, Step

CPU = torch.device("cpu")
CONFIG = PretrainConfig.of(
    data="nowhere", dim=32, depth=2, num_heads=2, image_size=(64, 64), audio_size=(32, 64), fusion_tokens=2,
    image_agg_tokens=2, audio_agg_tokens=2, decoder_dim=16, decoder_depth=1, decoder_num_heads=2, batch_size=4,
)  # fmt: skip


class Host(TorchDispatchMode):
    """Refuses what reads a tensor on the host, or makes one of a shape that depends on another: a GPU would be waited
    for, and a CUDA graph cannot hold it."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.refused, f"{name} has the host wait for the device"
        if name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in (args[1] if len(args) > 1 else ()) or ()
        ):
            raise AssertionError("a boolean index has the host wait for the device")
        return func(*args, **kwargs or {})


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that were made. What they hold may not read anything on the host."""
    monkeypatch.setattr("avfkernels.pays", lambda device: True)
    return play_graphs(monkeypatch, replaying=Host)


def inputs(seed, batch=4):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, 3, 64, 64), (batch, 1, 32, 64))
    return [
        *(torch.randn(shape, generator=g) for shape in shapes),
        *(torch.rand(batch, n, generator=g) for n in (16, 8)),
    ]


def steps(kind, count=6, parts=1, poisoned=(), config=CONFIG):
    """What a few steps find, and the weights after them."""
    task = Pretrain(config)
    torch.manual_seed(0)
    model = task.build().train()
    optimizer = adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    taking = kind(partial(task.losses, model), model, optimizer, device=CPU, dtype=torch.float32, parts=parts)
    found = []
    torch.manual_seed(1)
    for step in range(count):
        set_rate(optimizer, 1e-3, step, count, 2)
        for part in range(parts):
            batch = inputs(10 * step + part)
            batch[0] = batch[0] * (torch.nan if (step, part) in poisoned else 1)
            taking.part(batch, part)
        found.append(taking.update()()[:3])
    state = {name: optimizer.state[p]["step"].item() for name, p in model.named_parameters() if p in optimizer.state}
    return torch.tensor(found), dict(model.named_parameters()), state


@pytest.mark.parametrize("parts", [1, 3])
def test_recorded_steps_are_the_steps(recorded, parts):
    """Rounding apart: here AdamW is fused."""
    (found, weights, _), (expected, others, _) = steps(RecordedStep, parts=parts), steps(Step, parts=parts)
    assert len(recorded) == (2 if parts == 1 else 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, weight in weights.items():
        if not name.endswith(
            "qkv.bias"
        ):  # the gradient of keys' biases is 0, and what AdamW makes of rounding is chance
            torch.testing.assert_close(weight, others[name], rtol=1e-2, atol=2e-4, msg=name)


def test_recording_draws_no_random_numbers(recorded):
    config = CONFIG.but(drop_path=0.5)
    found, expected = steps(RecordedStep, config=config)[0], steps(Step, config=config)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [Step, RecordedStep])
def test_a_step_that_is_not_finite_changes_nothing(recorded, kind):
    """Neither the first, which records, nor a later one; part of a step is enough."""
    found, weights, counts = steps(kind, parts=2, poisoned={(0, 1), (3, 0)})
    expected, *_ = steps(kind, parts=2)
    assert found.isfinite().all(1).tolist() == [False, True, True, False, True, True]
    assert set(counts.values()) == {4}
    assert all(weight.isfinite().all() for weight in weights.values())
    assert not torch.equal(found[2], expected[2])


@pytest.mark.parametrize("kind", [Step, RecordedStep])
def test_batch_norms_keep_nothing_of_a_step_that_is_not_taken(recorded, kind):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    taking = kind(
        lambda x: {"sum": model(x).square().sum()}, model, optimizer, device=CPU, dtype=torch.float32
    )  # fmt: skip
    states = []
    for bad in (False, True, False):
        taking.part([torch.randn(5, 3) * (torch.nan if bad else 1)], 0)
        taking.update()
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[1]["1.running_mean"], states[2]["1.running_mean"])
    assert states[2]["1.num_batches_tracked"] == 2


def test_the_rate_is_a_tensor_that_the_schedule_writes_to(recorded):
    task = Pretrain(CONFIG)
    optimizer = adamw(model := task.build(), weight_decay=0.05, betas=(0.9, 0.95))
    RecordedStep(partial(task.losses, model), model, optimizer, device=CPU, dtype=torch.float32)
    rates = [group["lr"] for group in optimizer.param_groups]
    set_rate(optimizer, 0.5, 1, 10, 2)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [rate.item() for rate in rates] == [0.25, 0.25]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_to_record_is_reported_once_and_training_goes_on(monkeypatch, recorded, failing):
    made, record = iter(range(9)), capture.record

    def fails(function, device):
        if next(made) == failing:
            function()
            raise RuntimeError("the capture was invalidated")
        return record(function, device)

    monkeypatch.setattr("avfkernels.record", fails)
    with pytest.warns(UserWarning, match="training runs uncompiled: RuntimeError: the capture") as warned:
        found, _, counts = steps(RecordedStep)
    assert sum("uncompiled" in str(w.message) for w in warned) == 1
    torch.testing.assert_close(found, steps(Step)[0], rtol=1e-4, atol=1e-5)
    assert set(counts.values()) == {6}


# Runs with recorded steps.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "set"
    synthesize(folder, Settings(clips=15, classes=2, size=64, seconds=1.5, fps=4))
    changes = {"data": str(folder), "workers": 0, "epochs": 2, "blr": 0.1, "warmup_epochs": 1, "eval_clips": 0}
    return CONFIG.but(**changes, log_steps=2, tracker="none")


@pytest.fixture
def uncompiled(monkeypatch):
    """The fused layer, as it is."""
    monkeypatch.setattr(layer, "_compiled", lambda function: function)
    monkeypatch.setattr("avfkernels.CLIPS", 20)


def weights_of(out):
    return load_file(max(out.glob("checkpoints/step-*")) / "model.safetensors")


def test_a_recorded_run_is_resumed_bit_for_bit_by_one_of_its_kind_and_by_a_plain_one(
    config, tmp_path, recorded, uncompiled, monkeypatch
):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train.train(Pretrain(config), whole)
    assert len(recorded) == 2

    count, before = iter(range(1, 99)), set_rate

    def crash(*args):
        if next(count) == 5:
            raise KeyboardInterrupt
        return before(*args)

    monkeypatch.setattr(train, "set_rate", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(Pretrain(config), out)
    monkeypatch.setattr(train, "set_rate", before)
    assert train.train(Pretrain(config), out, resume=True)
    first, second = weights_of(whole), weights_of(out)
    assert all(torch.equal(first[key], second[key]) for key in first)

    for name, begun, ended in (("there", False, None), ("back", None, False)):  # the second epoch in another way
        out = tmp_path / name
        assert train.train(Pretrain(config.but(compile=begun)), out)
        shutil.rmtree(out / "checkpoints" / "step-00000006")
        assert train.train(Pretrain(config.but(compile=ended)), out, resume=True)
        other = weights_of(out)
        assert max((first[key] - other[key]).abs().max() for key in first if not key.endswith("qkv.bias")) < 2e-2


def test_steps_that_are_not_finite_end_a_recorded_run(config, tmp_path, recorded, uncompiled, monkeypatch):
    prepare = Pretrain.prepare
    monkeypatch.setattr(
        Pretrain, "prepare", lambda *a: [x * torch.nan if i == 0 else x for i, x in enumerate(prepare(*a))]
    )
    with pytest.raises(RunError, match=r"step 2, in epoch 0: .* the 3\. step in a row that is not finite"):
        train.train(Pretrain(config), tmp_path / "run")
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [0, 1, 2]
