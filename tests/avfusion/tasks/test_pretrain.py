"""The parts of pre-training: rates, masks, probes, the choice of clips, presets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avfusion.cli import main
from avfusion.data import Row
from avfusion.tasks.pretrain import PRESETS, Pretrain, PretrainConfig, _labelled
from avfusion.training.config import leaves
from avfusion.training.optim import adamw, rate, rise, set_rate


@pytest.fixture
def config():
    return PretrainConfig.of(data="x", image_size=(64, 64), audio_size=(32, 64))


def test_rates_follow_the_papers_schedule():
    assert [rate(epoch, 200, 40) for epoch in (0, 20, 40, 120, 200)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [rise(epoch, 200) for epoch in (0, 50, 100, 200)] == pytest.approx([0, 0.5, 1, 1])
    model = Pretrain(PretrainConfig.of(data="x", dim=32, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1)).build()
    optimizer = adamw(model, weight_decay=0.05, betas=(0.9, 0.95), pretrained=["encoder.image."])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert set_rate(optimizer, 1.0, 50, 200, 40) == pytest.approx(rate(50, 200, 40))
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen.append(names[id(parameter)])
            assert group["weight_decay"] == (0.0 if seen[-1].endswith(".bias") or "norm" in seen[-1] else 0.05)
            assert group["lr"] == pytest.approx(rate(50, 200, 40) * (0.5 if "encoder.image" in seen[-1] else 1))
    assert sorted(seen) == sorted(names.values())
    assert not any(group["pretrained"] for group in adamw(model, weight_decay=0, betas=(0.9, 0.95)).param_groups)


def test_masks_are_a_function_of_seed_epoch_and_clip(config):
    image, audio = Pretrain(config).mask_noise(3, torch.tensor([5, 2, 9]))
    assert image.shape == (3, 16)
    assert audio.shape == (3, 8)
    again = Pretrain(config).mask_noise(3, torch.tensor([2]))
    assert torch.equal(again[0][0], image[1])
    assert torch.equal(again[1][0], audio[1])
    others = [(config, 4, [2]), (config, 3, [3]), (config.but(seed=1), 3, [2])]
    assert not any(torch.equal(Pretrain(c).mask_noise(e, torch.tensor(i))[0], again[0]) for c, e, i in others)
    many = Pretrain(config).mask_noise(0, torch.arange(2000))[0]
    assert abs(many.mean().item() - 0.5) < 0.01


def test_neighbours_are_looked_for_among_labelled_clips_evenly(config):
    class Source:
        rows = tuple(Row(f"{i}", Path(f"{i}.mp4"), labels=(i, 0)[: i % 4]) for i in range(12))
        classes, sha256 = tuple("abcdefghijkl"), "x"

        def name(self, index):
            return self.rows[index].path.name

    class Task(Pretrain):
        def read(self, where, split):
            return self.source

    task = Task(config.but(eval_clips=3))
    task.source = Source()
    chosen = task.open_evaluation()
    assert [chosen.name(i) for i in range(3)] == ["1.mp4", "5.mp4", "9.mp4"]  # of 1, 2, 3, 5, 6, 7, 9, 10, 11
    assert [row.label for row in chosen.rows] == [1, 5, 9]
    assert _labelled(chosen)
    task.source.rows = [replace(row, labels=()) for row in Source.rows]
    assert len(task.open_evaluation().rows) == 3
    assert not _labelled(task.open_evaluation())


def test_presets_and_help(capsys):
    for settings in PRESETS.values():
        PretrainConfig.of(**{"data": "somewhere"} | settings)
    paper = PretrainConfig.of(data="x", **PRESETS["paper-audioset"])
    optim, clips = paper.optim, paper.data
    assert (optim.epochs, optim.batch_size, optim.blr, optim.warmup_epochs) == (200, 2048, 1.5e-4, 40)
    assert (optim.weight_decay, optim.betas, clips.crop_min, clips.gain_db) == (0.05, (0.9, 0.95), 0.5, 6.0)
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, _, item in leaves(PretrainConfig):
        assert f"--{name.replace('_', '-')}" in text
        assert item.metadata["help"][:30] in text
    with pytest.raises(SystemExit):
        main(["pretrain", "paper-vggsound"])
    assert "data: give the folder of the data set" in capsys.readouterr().err
