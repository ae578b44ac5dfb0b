"""The study: what its world lets readers reach, what a cell measures, that rows survive, and the report."""

import json
from collections import Counter
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.svm import SVC

import avfkernels
from avfkernels import DenseFusion
from bench.study.__main__ import PAGE, RESULTS, rows_of
from bench.study.cell import Cell, run
from bench.study.grid import CHANCE, MEASURES, NONE, QUESTIONS, SYNCHRONY, UNIMODAL, order
from bench.study.report import clear, difference, filled, interval, report, tables
from bench.study.world import CLASSES, LOUDEST, QUIETEST, Moments, inputs, moment, moment_of, quantized, scene, world_of

pytestmark = pytest.mark.usefixtures("one_thread")


def accuracy(model, x, y, train=1400):
    return model.fit(x[:train], y[:train]).score(x[train:], y[train:])


@cache
def factors(kind, count=2400):
    """What an ideal reader gets of each modality, one column a value, and the label."""
    picture, sound, labels = [], [], []
    for index in range(count):
        drawn = scene(kind, 3, index)
        if kind == "synchrony":
            time = np.array([moment_of(drawn, 3, index)])
            left, right = sorted(drawn.actors, key=lambda actor: actor.centre[0])
            picture.append(left.drive(time)[0] > right.drive(time)[0])
            sound.append(next(actor for actor in drawn.actors if actor.sounding).drive(time)[0] > 0.5)
        else:
            picture.append(drawn.look)
            sound.append(drawn.timbre)
        labels.append(drawn.label)
    return *(np.eye(CLASSES[kind])[np.array(x, int)] for x in (picture, sound)), np.array(labels)


@pytest.mark.parametrize(("kind", "alone"), [("conjunction", (0.25, 0.25)), ("synchrony", (0.75, 0.5))])
def test_what_the_best_readers_reach(kind, alone):
    """Of ideal factors: of a picture, of a sound, and of the pair."""
    picture, sound, labels = factors(kind)
    found = [accuracy(LogisticRegression(), x, labels) for x in (picture, sound)]
    for reached, expected in zip(found, alone, strict=True):
        assert abs(reached - expected) < 0.05, found  # three and a half deviations of 1,000 clips
    assert accuracy(SVC(C=10), np.concatenate([picture, sound], 1), labels) == 1


def test_the_sum_that_fits_best_is_the_best_modality():
    """By its likelihood; of accuracy see the next test. Conjunction: chance; synchrony: the picture."""
    for kind, expected in (("conjunction", np.log(4)), ("synchrony", -0.75 * np.log(0.75) - 0.25 * np.log(0.25))):
        picture, sound, labels = factors(kind)
        joined = np.concatenate([picture, sound], 1)
        fitted = LogisticRegression(C=0.01).fit(joined[:1400], labels[:1400])
        assert log_loss(labels[1400:], fitted.predict_proba(joined[1400:])) > expected - 0.03


def test_a_sum_can_be_right_in_two_thirds_of_the_pairs():
    """What docs/science.md says of conjunction: chosen for accuracy, scores f[look] + g[timbre] beat chance."""
    torch.manual_seed(0)
    look, timbre = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    label = ((look + timbre) % 4).expand(40, 4, 4)[..., None]
    f, g = (torch.randn(40, 4, 4, requires_grad=True) for _ in range(2))
    optimizer, best = torch.optim.Adam([f, g], 0.05), 0
    for step in range(600):
        score = f[:, :, None] + g[:, None]
        others = score.scatter(3, label, -torch.inf).amax(3, keepdim=True)
        margin = score.gather(3, label) - others
        best = max(best, int((margin > 0).sum((1, 2, 3)).max()))
        optimizer.zero_grad()
        torch.sigmoid(-margin * (1 + step / 100)).sum().backward()
        optimizer.step()
    assert best >= 11


def test_three_moments_of_four_are_loud():
    _, sound, _ = factors("synchrony")
    assert abs(sound[:, 1].mean() - 0.75) < 0.04


def test_moments_of_each_kind():
    for kind in CLASSES:
        made = Moments(*(x[None] for x in moment(kind, 0, 5)))
        image, audio = inputs(made)
        assert (image.shape, audio.shape) == ((1, 3, 48, 48), (1, 1, 32, 64))
        assert QUIETEST <= audio.min() < audio.max() <= LOUDEST
        assert made.sounding.sum() > 0
        assert (made.silent.sum() > 0) == (kind != "conjunction")
        assert all(torch.equal(a, b[0]) for a, b in zip(moment(kind, 0, 5), made, strict=True))
    assert quantized(torch.tensor([-9.0, -7.0, 2.5, 9.0])).tolist() == [0, 0, 255, 255]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of("mixed", 0, tmp_path_factory.mktemp("worlds"), share=1 / 16)


@pytest.mark.long  # a world is drawn, and two encoders go all the way
def test_a_cell_measures_everything_and_repeats(world):
    first, again = (run(Cell(epochs=1), world, torch.device("cpu"))["scores"] for _ in range(2))
    assert first == again
    wanted = {*MEASURES, *(m for measures in UNIMODAL.values() for m in measures if m)}
    assert first.keys() >= wanted
    assert all(0 <= first[m] <= 1 for m in wanted)
    assert {"neighbour pair fusion, all tokens, scaled", "AUC negative off-screen", "loss audio"} <= first.keys()


def test_a_plain_residual_is_added_to_the_tokens_as_they_come():
    torch.manual_seed(0)
    (block,) = Cell(layers="0", residual="plain").encoder().fusion_blocks.values()
    x, visual, audio = torch.randn(2, 16, 64) * 3 + 1, torch.randn(2, 36, 64), torch.randn(2, 32, 64)
    out, alpha, beta = block(x, visual, audio, return_attention=True)
    with avfkernels.backend("reference"):
        released = DenseFusion.forward(block, x, visual, audio)
    # The released block is the same over tokens that are normalised already: LN is then the identity.
    normed = block.norm1_mm(x)
    torch.testing.assert_close(block(normed, visual, audio), released, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, released, atol=0.1)
    assert torch.equal(out, block(x, visual, audio))
    assert (alpha.shape, beta.shape) == ((2, 4, 16, 32), (2, 4, 16, 36))


def test_a_world_of_synchrony_alone(tmp_path):
    world = world_of("synchrony", 0, tmp_path, share=1 / 32)
    found = run(Cell(epochs=1, world="synchrony"), world, torch.device("cpu"))["scores"]
    assert found.keys() >= SYNCHRONY.keys()
    assert not any("class" in name for name in found)


def test_an_encoder_without_fusion_cannot_point_by_attention(world):
    found = run(Cell(fusion="none", layers="none", epochs=0), world, torch.device("cpu"))["scores"]
    assert "pointing contrast" in found
    assert "pointing attention" not in found
    assert "loss image" not in found  # from scratch


def test_order_has_every_cell_once_and_three_seeds_of_all_questions_first():
    cells = order()
    assert len(cells) == len(set(cells)) >= 120
    wanted = {replace(cell, seed=seed) for q in QUESTIONS.values() for cell in q.cells.values() for seed in range(3)}
    assert set(cells[: len(wanted)]) == wanted
    seeds = Counter(replace(cell, seed=0) for cell in cells)
    assert all(seeds[cell] >= q.seeds for q in QUESTIONS.values() for cell in q.cells.values())
    assert CHANCE.keys() == MEASURES.keys()
    assert all(len(measures) == len(MEASURES) for measures in UNIMODAL.values())


def test_a_row_that_was_cut_off_is_run_again(tmp_path):
    path = tmp_path / "study.jsonl"
    whole = json.dumps({"cell": asdict(Cell())})
    path.write_text(f"{whole}\n{whole[:20]}")
    assert rows_of(path) == [json.loads(whole)]
    assert rows_of(tmp_path / "none.jsonl") == []


def row(cell, **scores):
    machine = {"device": "CPU", "versions": {"torch": "2"}}
    return {"cell": asdict(cell), "scores": scores, "seconds": {"all": 1.0}, "machine": machine}


def test_report_pairs_by_seed(tmp_path):
    """Seeds differ by more than the cells do: only pairs tell."""
    rows, late = [], Cell(layers="3")
    for seed in range(4):
        rows.append(row(replace(NONE, seed=seed), **dict.fromkeys(MEASURES, 0.2 * seed)))
        rows.append(row(replace(late, seed=seed), **dict.fromkeys(MEASURES, 0.2 * seed + 0.05 + 0.001 * seed)))
    scores = {Cell(**r["cell"]): r["scores"] for r in rows}
    found = difference(scores, late, NONE, "recall@10")
    assert found == pytest.approx([0.05, 0.051, 0.052, 0.053])
    assert clear(found)
    assert not clear([0.1, -0.1, 0.2])
    assert not clear([0.3])
    assert interval([1.0, 3.0]) == (2.0, pytest.approx(12.706, abs=1e-3))  # t of one degree of freedom
    files = report(rows, tmp_path / "study")
    text = files[0].read_text()
    assert "| retrieval, recall@10 | 30.0 ± 41.1 | 35.2 ± 41.3<br>**+5.2 ± 0.2** | – | – |" in text
    assert "8 cells" in text
    assert files[1].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows"):
        report([], tmp_path / "none")


def test_the_page_has_the_tables_of_the_rows(tmp_path):
    """docs/science.md and study.md: what `python -m bench.study --report` would write is what stands there."""
    page, rows = PAGE.read_text(encoding="utf-8"), rows_of(RESULTS / "study.jsonl")
    assert page == filled(page, tables(rows))
    assert page.count("<!-- study: ") >= 10
    assert report(rows, tmp_path / "study")[0].read_text() == (RESULTS / "study.md").read_text()
