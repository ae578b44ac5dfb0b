"""Nearest neighbours, against scikit-learn's."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from avfusion.metrics import neighbours
from avfusion.metrics.neighbours import chance, leave_one_out_accuracy, nearest


def test_nearest_neighbours_and_chance():
    features = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3], [-1, 0]])
    similarity, rows = nearest(features, features, 2, leave_one_out=True)
    assert rows[:4, 0].tolist() == [1, 0, 3, 2]
    assert (similarity[:, 0] >= similarity[:, 1]).all()
    assert nearest(features[:2], features)[1].squeeze(1).tolist() == [0, 1]
    assert leave_one_out_accuracy(features, torch.tensor([0, 0, 1, 1, 1])) == pytest.approx(1.0)
    assert leave_one_out_accuracy(features, torch.tensor([0, 0, 1, 0, 2])) == pytest.approx(0.4)
    assert chance(torch.tensor([0, 0, 1, 1])) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="k=5: the gallery has 4 rows"):
        nearest(features, features, 5, leave_one_out=True)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_neighbours_are_scikit_learns(chunk, monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(50, 8, generator=generator), torch.randn(20, 8, generator=generator)
    oracle = NearestNeighbors(n_neighbors=4, metric="cosine").fit(gallery)
    distance, expected = oracle.kneighbors(queries)
    similarity, rows = nearest(queries, gallery, 4)
    assert rows.tolist() == expected.tolist()
    torch.testing.assert_close(similarity, 1 - torch.from_numpy(distance), check_dtype=False, rtol=0, atol=1e-5)
    assert nearest(gallery, gallery, 3, leave_one_out=True)[1].tolist() == oracle.kneighbors(gallery)[1][:, 1:].tolist()
