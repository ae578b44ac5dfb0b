"""What the tasks of the synthetic data sets measure, by classifiers on simple features."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic import brightness, frames_of, levels, masks_of, sources_of, truths_of

from avfusion.media.transforms import LogMel
from avfusion.metrics.localization import consensus_iou, consensus_map, localization_scores
from avfusion.models.heads.localization import center_prior
from avfusion.synth import layouts
from avfusion.synth.make import synthesize
from avfusion.synth.render import boxes, render_frames, render_sources
from avfusion.synth.scene import Settings, draw_scene
from avfusion.synth.timbres import TIMBRES

pytestmark = pytest.mark.long


def simple_features(settings, count, frames=3):
    """Histograms of hue and of edge directions; means and deviations of mel bands; labels. Each [count, ...]."""
    times, mel = (np.arange(frames) + 0.5) / frames * settings.seconds, LogMel(n_mels=40)
    seen, heard, labels = [], [], []
    for index in range(count):
        scene = draw_scene(settings, index)
        pixels = render_frames(scene, settings.size, times)[0].reshape(-1, settings.size, 3)
        hsv = np.asarray(Image.fromarray(pixels).convert("HSV")) / 255
        hue = np.histogram(hsv[..., 0], 24, (0, 1), weights=hsv[..., 1] * hsv[..., 2])[0]
        down, right = np.gradient(pixels.mean(-1))
        edges = np.histogram(np.arctan2(down, right), 12, (-np.pi, np.pi), weights=np.hypot(down, right))[0]
        seen.append(np.sqrt(np.concatenate([hue / hue.sum(), edges / edges.sum()])))
        bands = mel(torch.from_numpy(render_sources(scene).sum(0) / 32768).float())
        heard.append(torch.cat([bands.mean(1), bands.std(1)]).numpy())
        labels.append(scene.label)
    return np.array(seen), np.array(heard), np.array(labels)


def accuracy(x, labels, train):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return model.fit(x[:train], labels[:train]).score(x[train:], labels[train:])


def product(seen, heard, train):
    """All products of the main components of the two."""
    parts = []
    for x, components in ((seen, 24), (heard, 6)):
        reduce = make_pipeline(StandardScaler(), PCA(components, whiten=True, random_state=0))
        parts.append(reduce.fit(x[:train]).transform(x))
    return np.einsum("na,nb->nab", *parts).reshape(len(seen), -1)


# Fifteen hundred scenes are drawn: fewer could not tell 0.25 from a little more.
@pytest.mark.slow
def test_only_the_pair_tells_the_label_of_the_conjunction_task():
    """Chance is 0.25; three standard deviations of it on 400 clips are 0.065."""
    small = Settings(classes=4, size=48, seconds=1.5)
    train, count = 800, 1200
    seen, heard, labels = simple_features(replace(small, task="conjunction"), count)
    both = np.concatenate([seen, heard], 1)
    found = {"seen": accuracy(seen, labels, train), "heard": accuracy(heard, labels, train),
             "sum": accuracy(both, labels, train)}  # fmt: skip
    assert max(found.values()) < 0.25 + 0.065, found
    assert accuracy(product(seen, heard, train), labels, train) > 0.85

    seen, heard, labels = simple_features(small, 300)
    assert accuracy(seen, labels, 200) > 0.5
    assert accuracy(heard, labels, 200) > 0.85


@pytest.mark.parametrize("task", ["classes", "conjunction", "synchrony"])
def test_labels_are_balanced(task):
    settings = Settings(task=task, classes=4)
    cells = Counter()
    for index in range(64):
        scene = draw_scene(settings, index)
        cells[scene.look, scene.timbre if task != "synchrony" else scene.side, scene.label] += 1
    assert set(cells.values()) == {64 // {"classes": 4, "conjunction": 16, "synchrony": 8}[task]}
    if task == "conjunction":
        assert all(label == (look + timbre) % 4 for look, timbre, label in cells)


def test_rhythm_says_nothing_in_the_conjunction_task():
    """What brightness follows is seen too: it must not tell struck timbres from others."""
    struck = {True: [], False: []}
    for index in range(400):
        (actor,) = draw_scene(Settings(task="conjunction", classes=4), index).actors
        struck[TIMBRES[actor.timbre].struck].append(actor.struck)
    assert abs(np.mean(struck[True]) - np.mean(struck[False])) < 0.17  # three standard deviations


def test_synchrony_is_told_by_picture_and_sound_together(tmp_path):
    """In the decoded files: the twin that is bright when it is loud is the one that sounds, and both look the same."""
    synthesize(tmp_path, Settings(task="synchrony", clips=24, size=96, seconds=4.0, seed=2), workers=2)
    labels, right = [], []
    for truth in truths_of(tmp_path):
        frames, masks = frames_of(tmp_path / truth["path"]), masks_of(tmp_path, truth)
        loud = levels(sources_of(tmp_path, truth), truth)[0]
        twins = sorted(truth["objects"], key=lambda item: item["boxes"][0][0])
        assert len({item["look"] for item in twins}) == 1
        in_step = [np.corrcoef(brightness(frames, masks == item["mask"]), loud)[0, 1] for item in twins]
        assert [item["sounding"] for item in twins] == [truth["label"] == 0, truth["label"] == 1]
        labels.append(truth["label"])
        right.append(int(np.argmax(in_step)) == truth["label"])
        assert max(in_step) > 0.6
        assert min(in_step) < -0.4
    assert all(right)
    assert Counter(labels) == {0: 12, 1: 12}


def test_twins_are_equally_likely_to_be_lit_at_any_time():
    """The rhythm and its inverse have one distribution: no moment of the picture tells which of them is heard."""
    times = np.arange(32) / 8
    lit = []
    for index in range(1500):
        scene = draw_scene(Settings(task="synchrony"), index)
        heard, silent = sorted(scene.actors, key=lambda actor: not actor.sounding)
        lit.append(heard.drive(times) - silent.drive(times))
    lit = np.array(lit)
    assert np.abs(lit.mean(0)).max() < 3.5 / np.sqrt(len(lit))
    assert abs((lit[:, 1:] > lit[:, :-1]).mean() - (lit[:, 1:] < lit[:, :-1]).mean()) < 0.01


@pytest.mark.parametrize("layout", ["flickr-soundnet", "vggss"])
def test_localisation_has_two_objects_anywhere_and_hears_one(layout):
    """The silent one is as large, and never at the same place. Bounds are four standard deviations."""
    settings, count, centres, radii = Settings(layout, classes=6), 3000, [], []
    for index in range(count):
        scene = layouts.scene(settings, index)
        silent, heard = sorted((actor for actor in scene.actors if actor.onscreen), key=lambda actor: actor.sounding)
        assert (silent.sounding, heard.sounding) == (False, True)
        assert heard.label == scene.label != silent.label
        assert np.hypot(*np.subtract(heard.centre, silent.centre)) > 0.4 - 1e-9
        centres.append(heard.centre)
        radii.append((heard.radius, silent.radius))
    ninths = np.histogram2d(*np.transpose(centres), bins=3, range=[(0.15, 0.85)] * 2)[0] / count
    assert ninths.sum() == pytest.approx(1)
    assert np.abs(ninths - 1 / 9).max() < 4 * np.sqrt(1 / 9 * 8 / 9 / count)
    first, second = np.transpose(radii)
    assert abs(first.mean() - second.mean()) < 4 * np.hypot(first.std(), second.std()) / np.sqrt(count)


def test_localisation_has_boxes_large_enough_for_the_metric():
    """It marks half of the picture: a map that knows the box must be far better than the centre."""
    settings, count, truth = Settings("flickr-soundnet", classes=6, size=64), 150, []
    for index in range(count):
        scene = layouts.scene(settings, index)
        _, masks = render_frames(scene, settings.size, np.array([2.0]))
        (number,) = (n for n, actor in enumerate(scene.actors, 1) if actor.sounding and actor.onscreen)
        (box,) = boxes(masks, number)
        truth.append(consensus_map([[side / settings.size for side in box]], consensus=1))
    truth = torch.stack(truth)
    assert 1 / 4 < truth.mean() < 1 / 3
    maps = {"box": torch.nn.functional.adaptive_avg_pool2d(truth, 14), "center": center_prior().expand(count, -1, -1)}
    found = {name: localization_scores(consensus_iou(x, truth)) for name, x in maps.items()}
    assert found["box"]["cIoU@0.5"] > 0.75
    assert found["center"]["cIoU@0.5"] < 0.25
    assert found["box"]["AUC"] > found["center"]["AUC"] + 0.2


@pytest.mark.parametrize("layout", ["vggsound-music", "vggsound-instruments", "music"])
def test_music_is_close_up_and_nothing_else_is_seen_or_heard(layout):
    settings, counts = Settings(layout, classes=6), set()
    for index in range(200):
        scene = layouts.scene(settings, index)
        assert all(actor.sounding and actor.onscreen and 0.24 <= actor.radius <= 0.34 for actor in scene.actors)
        counts.add(len(scene.actors))
    assert counts == ({1, 2} if layout == "music" else {1})
