"""Recognition metrics against scikit-learn and against their definitions, counted pair by pair."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, top_k_accuracy_score

from avfusion.metrics.recognition import multilabel_scores, top_k_accuracy

INPUTS = 1000


def scores_of(rng, *shape):
    """Half of the inputs have ties: scores are small integers."""
    return rng.integers(0, 4, shape).astype(float) if rng.random() < 0.5 else rng.standard_normal(shape)


def test_top_k_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(INPUTS):
        clips, classes = rng.integers(1, 12), rng.integers(3, 9)
        scores, labels = scores_of(rng, clips, classes), rng.integers(0, classes, clips)
        k = int(rng.integers(1, classes))
        expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(classes))
        found = top_k_accuracy(torch.tensor(scores), torch.tensor(labels), (k,))
        assert found == {f"top-{k}": pytest.approx(expected, abs=1e-12)}


def test_top_k_where_there_are_few_classes_and_in_half_precision():
    labels = torch.tensor([0, 1, 1])
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert top_k_accuracy(scores.to(dtype), labels) == {"top-1": pytest.approx(2 / 3), "top-5": 1.0}
    assert top_k_accuracy(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)) == {"top-1": 1.0, "top-5": 1.0}
    constant = torch.zeros(3, 8)
    assert top_k_accuracy(constant, torch.tensor([0, 3, 7])) == {"top-1": pytest.approx(1 / 3), "top-5": 2 / 3}


def average_precision(y, s):
    """sum_n (R_n - R_{n-1}) P_n over distinct scores, the highest first."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(s), reverse=True):
        found = s >= threshold
        hits = (found & y).sum()
        total += (hits / y.sum() - recall) * hits / found.sum()
        recall = hits / y.sum()
    return total


def area_under_roc(y, s):
    """How often a positive scores above a negative; a tie counts one half."""
    wins = [(p > n) + 0.5 * (p == n) for p in s[y] for n in s[~y]]
    return sum(wins) / len(wins)


def test_multilabel_scores_are_their_definitions():
    rng = np.random.default_rng(0)
    left_out = 0
    for _ in range(INPUTS):
        clips, classes = rng.integers(1, 9), rng.integers(1, 4)
        s, y = scores_of(rng, clips, classes), rng.random((clips, classes)) < rng.choice([0.1, 0.5, 0.9])
        found = multilabel_scores(torch.tensor(s), torch.tensor(y))
        positive, both = y.any(0), y.any(0) & (~y).any(0)
        ap = [average_precision(y[:, c], s[:, c]) for c in range(classes) if positive[c]]
        auc = [area_under_roc(y[:, c], s[:, c]) for c in range(classes) if both[c]]
        assert found["left_out_mAP"] == classes - len(ap)
        assert found["left_out_AUC"] == classes - len(auc)
        left_out += found["left_out_AUC"]
        assert found["mAP"] == pytest.approx(np.mean(ap) if ap else math.nan, abs=1e-12, nan_ok=True)
        expected = np.mean(auc) if auc else math.nan
        assert found["AUC"] == pytest.approx(expected, abs=1e-12, nan_ok=True)
        d_prime = math.sqrt(2) * norm.ppf(found["AUC"])
        assert found["d_prime"] == pytest.approx(d_prime, rel=1e-9, abs=1e-12, nan_ok=True)
    assert left_out > INPUTS / 10


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_multilabel_scores_are_scikit_learns_at_size(dtype):
    rng = np.random.default_rng(1)
    scores = torch.tensor(rng.standard_normal((500, 30)), dtype=torch.float16)  # half precision has ties
    labels = torch.tensor(rng.random((500, 30)) < 0.05)
    found = multilabel_scores(scores, labels.to(dtype))
    assert found["mAP"] == pytest.approx(average_precision_score(labels.numpy(), scores.numpy()), abs=1e-12)
    assert found["AUC"] == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()), abs=1e-12)


def test_multilabel_edges():
    perfect = multilabel_scores(torch.tensor([[2.0], [1.0]]), torch.tensor([[1], [0]]))
    assert perfect == {"mAP": 1.0, "AUC": 1.0, "d_prime": math.inf, "left_out_mAP": 0, "left_out_AUC": 0}
    assert multilabel_scores(torch.zeros(4, 1), torch.tensor([[1], [0], [0], [0]]))["d_prime"] == 0.0
    one_class = multilabel_scores(torch.randn(3, 2), torch.tensor([[1, 0]]).repeat(3, 1))
    assert one_class["mAP"] == 1.0
    assert all(math.isnan(one_class[name]) for name in ("AUC", "d_prime"))
    assert (one_class["left_out_mAP"], one_class["left_out_AUC"]) == (1, 2)
    nothing = multilabel_scores(torch.randn(3, 2), torch.zeros(3, 2))
    assert math.isnan(nothing["mAP"])
    assert nothing["left_out_mAP"] == 2


def test_errors():
    scores, labels = torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
    for bad in (torch.randn(3), torch.randn(0, 2), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="scores must be floating-point"):
            top_k_accuracy(bad, labels)
        with pytest.raises(ValueError, match="scores must be floating-point"):
            multilabel_scores(bad, bad)
    for value in (math.nan, math.inf):
        bad = scores.clone()
        bad[1, 1] = value
        with pytest.raises(ValueError, match="1 of the scores are not finite"):
            top_k_accuracy(bad, labels)
        with pytest.raises(ValueError, match="1 of the scores are not finite"):
            multilabel_scores(bad, torch.zeros(3, 2))
    for bad in (labels[:2], labels.float(), labels[:, None]):
        with pytest.raises(ValueError, match=r"labels must be integers \[3\]"):
            top_k_accuracy(scores, bad)
    for bad in (-1, 2):
        with pytest.raises(ValueError, match="labels must be classes 0 to 1"):
            top_k_accuracy(scores, labels + bad)
    with pytest.raises(ValueError, match=r"labels must have the shape \[3, 2\]"):
        multilabel_scores(scores, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        multilabel_scores(scores, torch.full((3, 2), 0.5))
