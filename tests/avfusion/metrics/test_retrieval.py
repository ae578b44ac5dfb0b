"""Cross-modal retrieval against ranks counted one by one."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avfusion.metrics import retrieval
from avfusion.metrics.neighbours import nearest
from avfusion.metrics.retrieval import paired_ranks, retrieval_scores


def ranks_one_by_one(queries, gallery):
    """1 + how many of the others are at least as similar; of whole numbers, so that ties are exact.

    cos(q, g) >= cos(q, h) for a fixed q compares q.g |h| with q.h |g|: by the signs and the squares.
    """

    def key(q, g):
        dot, norm = int(q @ g), int(g @ g)
        return 0.0 if norm == 0 else (1 if dot > 0 else -1) * dot * dot / norm

    ranks = []
    for i, q in enumerate(queries):
        own = key(q, gallery[i])
        ranks.append(1 + sum(key(q, g) >= own - 1e-12 for j, g in enumerate(gallery) if j != i))
    return ranks


def test_ranks_one_by_one_with_duplicates_and_zeros(monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 3)
    rng = np.random.default_rng(0)
    ties = 0
    for _ in range(1000):
        N, D = rng.integers(1, 9), rng.integers(1, 4)
        a, b = rng.integers(-2, 3, (2, N, D))
        if rng.random() < 0.2:
            a[:], b[:] = a[0], b[0]
        forward, backward = paired_ranks(torch.tensor(a).float(), torch.tensor(b).float())
        assert forward.dtype == torch.long
        assert forward.tolist() == ranks_one_by_one(a, b)
        assert backward.tolist() == ranks_one_by_one(b, a)
        found = retrieval_scores(torch.tensor(a).float(), torch.tensor(b).float())
        for name, ranks in (("audio_to_image", forward.numpy()), ("image_to_audio", backward.numpy())):
            assert [found[f"{name}_recall@{k}"] for k in (1, 5, 10)] == [
                pytest.approx((ranks <= k).mean()) for k in (1, 5, 10)
            ]
            assert found[f"{name}_median_rank"] == np.median(ranks)
        ties += N > 1 and (forward == N).all().item()
    assert ties > 50


def test_collapsed_features_score_as_badly_as_can_be():
    a, b = torch.randn(1, 768).repeat(700, 1), torch.randn(1, 768).repeat(700, 1)
    b *= 2.0 ** torch.randint(-3, 4, (700, 1))  # lengths do not matter
    assert all((ranks == 700).all() for ranks in paired_ranks(a, b))
    assert retrieval_scores(a, b)["audio_to_image_recall@10"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_pair_is_lost_among_close_neighbours(dtype):
    g = torch.Generator().manual_seed(0)
    features = (torch.randn(1, 64, generator=g) + 0.05 * torch.randn(600, 64, generator=g)).to(dtype)
    assert set(retrieval_scores(features, features).values()) == {1.0}
    noisy = features + 0.05 * torch.randn(600, 64, generator=g).to(dtype)
    _, rows = nearest(features.double(), noisy.double())
    recall = (rows[:, 0] == torch.arange(600)).double().mean().item()
    assert 0.1 < recall < 1
    assert retrieval_scores(features, noisy)["audio_to_image_recall@1"] == pytest.approx(recall)


def test_similarities_of_all_pairs_are_never_in_memory(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    monkeypatch.setattr(retrieval, "CHUNK", 16)
    with Largest() as seen:
        paired_ranks(torch.randn(1000, 4), torch.randn(1000, 4))
    assert seen.numel == 16 * 1000


def test_errors():
    a = torch.randn(3, 2)
    for bad in (torch.randn(2, 2), torch.randn(3), torch.randn(3, 3)):
        with pytest.raises(ValueError, match=r"must both be \[N, D\]"):
            paired_ranks(a, bad)
    with pytest.raises(ValueError, match="N at least 1"):
        paired_ranks(a[:0], a[:0])
    with pytest.raises(ValueError, match="gallery has rows that are not finite"):
        paired_ranks(a, a * torch.nan)
