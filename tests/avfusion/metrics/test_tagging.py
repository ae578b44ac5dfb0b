"""Tagging against the code and the labels of the `vggsounder` package."""

import pytest
import torch

from avfusion.data.table import LayoutError, Row
from avfusion.data.tags import COLUMNS, read_tags, tag_matrix
from avfusion.metrics.tagging import SUBSETS, modality_confusion, tagging_scores, top_k

CLIPS = 400
OURS = {"f1": "F1", "f1_macro": "macro F1", "hit_rate": "hits", "precision": "precision", "recall": "recall",
        "jaccard": "Jaccard", "accuracy": "accuracy"}  # fmt: skip


@pytest.fixture(scope="module")
def published():
    """Its labels, some clips, and scores of three models that are right now and then."""
    package = pytest.importorskip("vggsounder.benchmark", reason="pip install vggsounder")
    labels = package.VGGSounder(background_music=None, voice_over=None, static_image=None)
    tags, classes = read_tags("vggsounder"), labels.get_all_labels()
    rows = [Row(id=name, path=None) for name in sorted(tags)[:: len(tags) // CLIPS][:CLIPS]]
    truth = tag_matrix(tags, rows, classes, SUBSETS["all"])
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(truth.shape, generator=generator, dtype=torch.float64) + lift * truth
              for name, lift in {"both": 3.0, "audio": 2.5, "image": 2.0}.items()}  # fmt: skip
    return package, labels, tags, classes, rows, scores


def frame(rows, scores):
    import pandas

    return pandas.DataFrame({"id": [row.id for row in rows], "logits": scores.tolist()})


@pytest.mark.parametrize("modality", ["all", "a", "v", "av"])
def test_scores_are_those_of_the_package(published, modality):
    package, labels, tags, classes, rows, scores = published
    theirs = package.get_gt_for_modality(labels, modality, {row.id for row in rows})
    expected = package.compare_labels_logits(theirs, frame(rows, scores["both"]), classes)
    subset = modality if modality == "all" else modality.upper()
    truth = tag_matrix(tags, rows, classes, SUBSETS[subset])
    told = truth.sum(1) > 0
    assert told.sum() == len(theirs)
    found = tagging_scores(scores["both"][told], truth[told])
    for k in (1, 3, 5, 10):
        for name, own in OURS.items():
            assert found[f"{own}@{k}"] == pytest.approx(expected[f"{name}@{k}"], abs=1e-12), (name, k)
    assert 0.05 < found["F1@1"] < 0.95


def test_confusion_is_that_of_the_package(published):
    package, labels, tags, classes, rows, scores = published
    theirs = package.get_gt_for_modality(labels, "all", {row.id for row in rows})
    frames = [frame(rows, scores[name]) for name in ("both", "audio", "image")]
    expected = package.compute_modality_confusion_logits(theirs, *frames, classes)
    found = modality_confusion(tag_matrix(tags, rows, classes, SUBSETS["all"]), scores)
    assert found == pytest.approx({"mu audio": expected["a"], "mu image": expected["v"], "mu either": expected["av"]})
    assert 0 < found["mu either"] < min(found["mu audio"], found["mu image"])


def test_by_hand():
    """Three clips: right by both; right by sound alone; wrong by both, right by sound and by picture."""
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]])
    scores = {"both": [[3, 1, 2], [3, 1, 2], [3.0, 1, 2]], "audio": [[1, 2, 3], [1, 3, 2], [1.0, 3, 2]],
              "image": [[1, 2, 3], [3, 1, 2], [1.0, 2, 3]]}  # fmt: skip
    scores = {name: torch.tensor(rows) for name, rows in scores.items()}
    third = pytest.approx(1 / 3)
    assert modality_confusion(labels, scores) == {
        "mu audio": pytest.approx(2 / 3),
        "mu image": third,
        "mu either": third,
    }
    found = tagging_scores(scores["both"], labels, ks=(1, 2, 5))
    assert "F1@5" not in found
    assert found["hits@1"] == third
    assert found["F1@1"] == pytest.approx(2 / 7)  # one of three named, one of four labels
    assert found["accuracy@1"] == third
    assert found["hits@2"] == pytest.approx(2 / 3)
    assert top_k(scores["both"], 2).tolist() == [[1, 0, 1]] * 3


@pytest.mark.parametrize(("scores", "labels"), [
    (torch.zeros(2, 3), torch.zeros(2, 4)), (torch.full((2, 3), torch.nan), torch.zeros(2, 3)),
    (torch.zeros(2, 3), torch.full((2, 3), 0.5)), (torch.zeros(0, 3), torch.zeros(0, 3)),
])  # fmt: skip
def test_bad_arguments_are_named(scores, labels):
    with pytest.raises(ValueError, match=r"expected|labels must"):
        tagging_scores(scores, labels)


def test_files_are_read_and_bad_lines_named(tmp_path):
    path = tmp_path / "tags.csv"
    rows = ["x_000001,cat,AV,False,False,False", "x_000001,dog,A,False,False,False", "y_000002,dog,V,True,False,False"]
    path.write_text("\n".join([COLUMNS, *rows]))
    tags = read_tags(str(path))
    assert tags == {"x_000001": {"cat": "AV", "dog": "A"}, "y_000002": {"dog": "V"}}
    table = [Row(id="y_000002", path=None), Row(id="x_000001", path=None)]
    found = {name: tag_matrix(tags, table, ["cat", "dog"], marks).tolist() for name, marks in SUBSETS.items()}
    assert found == {"all": [[0, 1], [1, 1]], "A": [[0, 0], [1, 1]], "V": [[0, 1], [1, 0]], "AV": [[0, 0], [1, 0]]}
    with pytest.raises(LayoutError, match=r"x_000001: the tag 'dog' is none of the 1 classes"):
        tag_matrix(tags, table[1:], ["cat"], SUBSETS["all"])
    path.write_text("\n".join([COLUMNS, "x_000001,cat,B,False,False,False"]))
    with pytest.raises(LayoutError, match=r"tags\.csv:2"):
        read_tags(str(path))
    path.write_text("\n".join([COLUMNS, rows[0], rows[0].replace("AV", "V")]))
    with pytest.raises(LayoutError, match=r"tags\.csv:3: 'cat' of x_000001 is V, and AV above"):
        read_tags(str(path))
    with pytest.raises(LayoutError, match="no such file"):
        read_tags(str(tmp_path / "none.csv"))
