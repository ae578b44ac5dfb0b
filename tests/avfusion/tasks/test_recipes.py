"""What tasks do in training and evaluation as the release does, and where they have a choice: without training them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from made_clips import write_clip
from PIL import Image

from avfusion import EncoderConfig, data
from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.samples import Masked, Mixed, Selection, Tensors, Views, Windows
from avfusion.data.table import Row, Table
from avfusion.media.clip import Clip
from avfusion.media.windows import View
from avfusion.metrics.neighbours import nearest, neighbour_scores
from avfusion.metrics.recognition import multilabel_scores
from avfusion.models.heads.classifier import MODALITIES, log_prior
from avfusion.tasks.localization import Localize
from avfusion.tasks.pretrain import Pretrain, PretrainConfig
from avfusion.tasks.recognition import Finetune, Probe, class_share
from avfusion.tasks.segmentation import Frames, Segment
from avfusion.tasks.separation import Separate

SHAPE = {"dim": 32, "depth": 2, "num_heads": 2, "image_size": (64, 64), "audio_size": (32, 64), "fusion_tokens": 2,
         "image_agg_tokens": 2, "audio_agg_tokens": 2}  # fmt: skip
ENCODER = EncoderConfig(**SHAPE)


def task(cls, classes=("a", "b", "c"), **settings):
    return cls(cls.settings.of(**{"data": "x", "from_scratch": True, "workers": 0} | settings), ENCODER, classes)


class Source:
    """Clips that decode nothing: the sound of clip i is constant, (i + 1) / 100."""

    sha256 = "x"

    def __init__(self, labels, classes=("a", "b", "c")):
        self.classes = classes
        self.rows = [
            Row(str(i), f"{i}", label=label if isinstance(label, int) else None,
                labels=label if isinstance(label, tuple) else ())
            for i, label in enumerate(labels)
        ]  # fmt: skip

    def name(self, index):
        return str(index)

    def read(self, index, *, start=None, duration=1.0, sample_rate=16000, **window):
        at = start.start(0.0, 12.0, duration) if isinstance(start, View) else 0.0
        wave = torch.full((1, round(duration * sample_rate)), (index + 1) / 100)
        return Clip(Image.new("RGB", (64, 64), (10 * round(at), index, 0)), wave, at, at, str(index))


# --- recognition ------------------------------------------------------------------------------------------------------


def test_every_clip_is_mixed_by_a_share_of_its_own():
    finetune = task(Finetune, ("a", "b", "c", "d"), mixup=0.5)
    image, audio, target = torch.randn(4, 3, 2, 2), torch.randn(4, 1, 2, 2), torch.eye(4)
    index = torch.tensor([3, 8, 5, 1])
    mixed, again = (finetune.mix(image, audio, target, index, 0, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(mixed, again, strict=True))
    share = (mixed[0] - image.flip(0))[:, 0, 0, 0] / (image - image.flip(0))[:, 0, 0, 0]
    assert len(set(share.tolist())) == 4
    smooth = 0.9 * target + 0.1 / 4
    for x, got in ((image, mixed[0]), (audio, mixed[1]), (smooth, mixed[2])):
        own = share.view(-1, *[1] * (x.ndim - 1))
        torch.testing.assert_close(got, own * x + (1 - own) * x.flip(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mixed[2].sum(1), torch.ones(4))
    other = finetune.mix(image, audio, target, index.flip(0), 0, True)[0]  # a share goes with its clip
    own = (other - image.flip(0))[:, 0, 0, 0] / (image - image.flip(0))[:, 0, 0, 0]
    torch.testing.assert_close(own, share.flip(0), rtol=1e-3, atol=1e-4)


def test_multi_label_targets_are_smoothed_too():
    finetune = task(Finetune, mixup=0.0)
    labels = torch.tensor([[1.0, 1.0, 0.0]])
    *_, target = finetune.mix(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2), labels, torch.tensor([0]), 0, False)
    assert target[0].tolist() == pytest.approx([0.9 + 0.1 / 3] * 2 + [0.1 / 3])


@pytest.mark.parametrize("labels", [(0, 0, 0, 1), ((0,), (0, 1), (0,))])
def test_finetuning_begins_at_log_priors_and_leaves_out_classes_that_are_never_shown(labels, monkeypatch):
    finetune, source = task(Finetune), Source(labels)
    monkeypatch.setattr("avfusion.tasks.downstream.Downstream.open", lambda self, make: source)
    finetune.open()
    share = torch.tensor([0.75, 0.25, 0.0])
    torch.testing.assert_close(class_share(source), share)
    model = finetune.build()
    for name in MODALITIES:
        torch.testing.assert_close(getattr(model, f"{name}_head").bias.data, log_prior(share))
    single = isinstance(labels[0], int)
    batch = Batch(torch.randn(2, 3, 64, 64), torch.randn(2, 1, 16000), torch.tensor([0, 1]),
                  None if single else torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]]), torch.tensor([0, 1]),
                  torch.zeros(2))  # fmt: skip
    inputs = finetune.prepare(batch, 0, torch.device("cpu"))
    losses = finetune.losses(model, *inputs)
    losses["class"].backward()
    for name in MODALITIES:
        gradient = getattr(model, f"{name}_head").weight.grad
        assert gradient[:2].norm() > 0
        assert gradient[2].norm() == 0


def test_views_are_spread_over_ten_seconds_and_their_logits_averaged(monkeypatch):
    """Of a clip of 12 s: from 1 s on, to 11 s."""
    view = [View(i, 10).start(0.0, 12.0, 3.0) for i in range(10)]
    assert view == pytest.approx([1 + i * 7 / 9 for i in range(10)])
    assert [View(i, 3).start(0.0, 4.0, 3.0) for i in range(3)] == [0.0, 0.5, 1.0]  # a short clip: inside of it
    assert [View(i, 2).start(0.5, 2.0, 3.0) for i in range(2)] == [0.5, 0.5]

    probe, source = task(Probe), Source((0, 1, 2, 0, 1))
    model = probe.build().eval()
    monkeypatch.setattr(probe, "views", 4)
    windows = Tensors(Windows(source, **probe.window), probe.frame_transform)
    found = probe.evaluate(model, ClipLoader(windows, 3, train=False), torch.float32)
    views = [Windows(source, **probe.window | {"start": View(i, 4)}) for i in range(4)]
    each = [probe.logits(model, ClipLoader(Tensors(x, probe.frame_transform), 5, train=False), torch.float32)[1]
            for x in views]  # fmt: skip
    mean = torch.stack(each).mean(0)
    assert not torch.allclose(each[0], each[3])
    loader = ClipLoader(Tensors(Views(Windows(source, **probe.window), 4), probe.frame_transform), 2, train=False)
    torch.testing.assert_close(probe.logits(model, loader, torch.float32)[1], mean, rtol=1e-4, atol=1e-5)
    truth = torch.tensor([0, 1, 2, 0, 1])
    assert found.summary["top-1 (4 views)"] == pytest.approx((mean.mean(1).argmax(1) == truth).float().mean().item())
    for number, name in enumerate(MODALITIES):
        share = (mean[:, number].argmax(1) == truth).float().mean().item()
        assert found.summary[f"top-1 {name} (4 views)"] == pytest.approx(share)
    assert [row["predicted"] for row in found.samples] == ["abc"[i] for i in mean.mean(1).argmax(1).tolist()]


def test_views_of_a_video_file_are_its_moments(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", seconds=6.0, fps=10, rate=16000, layout="mono")
    table = Table("files", tmp_path, (Row("a", Path(path)),))
    sample = Views(Windows(table, duration=2.0, sample_rate=16000), 3)[0]
    clips = (sample.clip, *sample.others)
    assert [clip.start for clip in clips] == pytest.approx([0.0, 2.0, 4.0], abs=0.05)
    assert [clip.frame_time for clip in clips] == pytest.approx([1.0, 3.0, 5.0], abs=0.1)
    data.pack(table, tmp_path / "shards")
    sample = Views(Windows(data.Shards(tmp_path / "shards"), duration=2.0, sample_rate=16000), 3)[0]
    assert [clip.start for clip in (sample.clip, *sample.others)] == pytest.approx([0.0, 2.0, 4.0], abs=0.05)


def test_shards_that_are_packed_in_another_order_of_classes_are_refused(monkeypatch):
    packed = Source([0, 1], classes=("cattle mooing", "cattle, bovinae cowbell"))
    monkeypatch.setattr(data, "Shards", lambda *given, **options: packed)
    with pytest.raises(ValueError, match="x: classes are in another order than --label-order folders: pack the shards"):
        task(Probe, layout="shards", label_order="folders").read("x", "train")
    packed.classes = packed.classes[::-1]
    assert task(Probe, packed.classes, layout="shards", label_order="folders").read("x", "train") is packed


# --- separation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_mixtures_of_several_clips_are_of_different_ones(count):
    torch.manual_seed(0)
    source = Source([i % 5 for i in range(40)], classes=tuple("abcde"))
    for index in range(10):
        sample = Mixed(Windows(source, duration=0.1), count)[index]
        names = [clip.path for clip in (sample.clip, *sample.others)]
        assert len(names) == len({source.rows[int(name)].label for name in names}) == count
    few = Mixed(Windows(Source([0, 0]), duration=0.1), 2)[1]  # no other class is there
    assert few.others[0].path == "0"
    assert task(Separate, sources=count).flop() == count * super(Separate, task(Separate, sources=count)).flop()
    with pytest.raises(ValueError, match="sources=5: expected 2 to 4"):
        task(Separate, sources=5)


def tones(task, *frequencies):
    """[1, K, samples] of tones that do not overlap, each louder than the one before."""
    time = torch.arange(round(task.window["duration"] * 16000)) / 16000
    return torch.stack([(i + 1) * 0.1 * torch.sin(2 * torch.pi * f * time) for i, f in enumerate(frequencies)])[None]


def batch_of(waveforms):
    K = waveforms.shape[1]
    return Batch(torch.randn(1, K, 3, 64, 64), waveforms, torch.tensor([-1]), None, torch.tensor([0]), torch.zeros(1))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("mask", ["ratio", "binary"])
@pytest.mark.parametrize("target", ["shares", "released"])
def test_true_masks_by_their_definitions(target, mask, count):
    separate = task(Separate, sources=count, target=target, mask=mask)
    waveforms = tones(separate, 500, 1500, 3000)[:, :count]
    image, mel, masks = separate.prepare(batch_of(waveforms), 0, torch.device("cpu"))
    assert image.shape == (count, 3, 64, 64)
    assert mel.shape == masks.shape == (count, 1, 32, 64)
    power, whole = 10 ** separate.mel(waveforms[0][:, None]), 10 ** separate.mel(waveforms.sum(1))
    if target == "released":
        expected = (power > whole).float() if mask == "binary" else power / (power + whole + 1e-5)
    else:
        share = power / power.sum(0)
        expected = (share == share.amax(0)).float() if mask == "binary" else share
    torch.testing.assert_close(masks, expected, rtol=1e-3, atol=1e-3)
    both = [task(Separate, sources=count, weighted_loss=weighted) for weighted in (True, False)]
    losses = [x.losses(lambda _, mel: torch.zeros_like(mel), image, mel, masks)["mask"].item() for x in both]
    assert losses[1] == pytest.approx(np.log(2), rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("count", [2, 3])
def test_our_masks_give_sources_back_and_released_ones_half_of_them(count):
    """Where sources do not overlap, p / (p + power of the mixture) is 1/2: SDR does not see that, an ear does."""
    for target, gain in (("shares", 1.0), ("released", 0.5)):
        separate = task(Separate, sources=count, target=target)
        waveforms = tones(separate, 500, 1500, 3000)[:, :count]
        *_, masks = separate.prepare(batch_of(waveforms), 0, torch.device("cpu"))
        found = separate.filtered(waveforms.sum(1).expand(count, -1), masks[:, 0])
        loudness = found[:, 2000:-2000].norm(dim=1) / waveforms[0, :, 2000:-2000].norm(dim=1)
        assert loudness.tolist() == pytest.approx([gain] * count, abs=0.12)
        model = separate.build().eval()
        loader = [batch_of(waveforms)]
        source = type("Source", (list,), {"source": Source([0])})(loader)
        summary = separate.evaluate(model, source, torch.float32).summary
        assert summary["SDR oracle"] > 10


# --- segmentation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def avsbench(tmp_path):
    """A clip of 5 s whose sound tells the second, and of whose masks class 2 is not in its list."""
    folder = tmp_path / "v1m" / "u"
    for name in ("frames", "labels_semantic"):
        (folder / name).mkdir(parents=True)
    soundfile.write(folder / "audio.wav", np.repeat(np.arange(5) / 10, 16000), 16000, subtype="FLOAT")
    for second in range(5):
        Image.new("RGB", (8, 8)).save(folder / "frames" / f"{second}.jpg")
        Image.fromarray(np.array([[0, 1, 2, second % 3]], np.uint8)).save(folder / "labels_semantic" / f"{second}.png")
    (tmp_path / "metadata.csv").write_text("vid,uid,s_min,s_sec,a_obj,split,label\nv,u,0,0,cat,train,v1m\n")
    (tmp_path / "label2idx.json").write_text(json.dumps({"background": 1, "cat": 2, "dog": 3}))
    return data.read("avsbench", tmp_path)


def test_windows_of_segmentation_stay_inside_the_clip(avsbench):
    """The window of the last frame of a 5 s clip ends with it: past its end the sound was mirrored."""
    frames = Frames(avsbench, "all")
    starts = [frames.read(i, duration=3.0).start for i in range(5)]
    assert starts == [0.0, 0.0, 1.0, 2.0, 2.0]
    last = frames.read(4, duration=3.0).waveform[0]
    torch.testing.assert_close(last[[0, 24000, 47999]], torch.tensor([0.2, 0.3, 0.4]))
    assert [frames.read(i, duration=9.0).start for i in (0, 4)] == [0.0, 0.0]  # longer than the clip


def test_windows_of_segmentation_move_by_a_third_in_training(avsbench):
    torch.manual_seed(0)
    starts = [Frames(avsbench, "v1m").read(2, duration=3.0, start="random", frame="random").start for _ in range(200)]
    assert 0.0 <= min(starts) < 0.15
    assert 1.85 < max(starts) <= 2.0
    assert len(set(starts)) > 100


def test_pixels_of_classes_that_the_clip_does_not_list(avsbench):
    windows = Windows(Frames(avsbench, "all"), duration=1.0)
    assert Masked(windows)[2].mask.tolist() == [[0, 1, 2, 2]]
    assert Masked(windows, listed=True)[2].mask.tolist() == [[0, 1, 0, 0]]


def test_an_epoch_may_go_over_the_frames_several_times(avsbench, monkeypatch):
    segment = task(Segment, layout="avsbench", repeat=3, subset="v1m")
    monkeypatch.setattr(segment, "read", lambda where, split: Frames(avsbench, "v1m"))
    assert len(segment.open().rows) == 15
    assert len(segment.open_evaluation().rows) == 5
    with pytest.raises(ValueError, match="no annotated frame of the subset v2"):
        Frames(avsbench, "v2")


# --- neighbours, boxes ------------------------------------------------------------------------------------------------


def test_neighbours_of_clips_with_several_labels_are_scored_by_their_cosine():
    torch.manual_seed(0)
    features = {"fusion": torch.randn(40, 6)}
    labels = (torch.rand(40, 4) < 0.4).double()
    labels[:, 3] = 0  # a class that is never there
    cosine, neighbour = nearest(features["fusion"], features["fusion"], leave_one_out=True)
    expected = multilabel_scores(cosine.double() * labels[neighbour[:, 0]], labels)
    found = neighbour_scores(features, labels)
    assert found == pytest.approx({"fusion AP": expected["mAP"], "fusion AUC": expected["AUC"],
                                   "chance AP": labels[:, :3].mean().item()})  # fmt: skip
    with pytest.raises(ValueError, match="1 labelled clips: a nearest-neighbour probe needs two or more"):
        neighbour_scores({"fusion": torch.ones(1, 2)}, torch.tensor([0]))


def test_pretraining_on_clips_with_several_labels_is_probed_by_average_precision():
    pretrain = Pretrain(PretrainConfig.of(data="x", decoder_dim=16, decoder_depth=1, decoder_num_heads=2, **SHAPE))
    source = Source([(0,), (0, 1), (1,), (1, 2), (), (2,)])
    assert list(pretrain.evaluated(source)) == [0, 1, 2, 3, 5]
    items = Tensors(Windows(source, **pretrain.window), pretrain.frame_transform)
    found = pretrain.evaluate(pretrain.build().eval(), ClipLoader(items, 4, train=False), torch.float32).summary
    assert found.keys() == {f"{name} {score}" for name in ("image", "audio", "fusion", "joint")
                            for score in ("AP", "AUC")} | {"chance AP"}  # fmt: skip


@pytest.mark.parametrize(("layout", "value"), [("flickr-soundnet", 0.5), ("vggss", 1.0), ("stills", 1.0)])
def test_an_annotator_alone_counts_half_on_flickr(layout, value):
    row = Row("a", "a", extra={"boxes": ((0, 0, 1, 1),)})
    source = Selection(_Boxed(layout, row), [0])
    assert task(Localize).truth(source, [0]).unique().tolist() == [value]


class _Boxed:
    classes, sha256 = (), "x"

    def __init__(self, layout, row):
        self.layout, self.rows = layout, [row]
