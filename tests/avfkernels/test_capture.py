"""When an encoder is compiled and recorded, with CUDA graphs played by a function that is run again."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from played import play_graphs
from torch import nn

import avfkernels
from avfkernels import layer
from avfkernels.capture import CLIPS, GRAPHS, Captured


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)
        self.ways = []

    def run(self, x, y, *, compiled=False):
        self.ways.append(compiled)
        return self.first(x), self.second(y)


@pytest.fixture
def recorded(monkeypatch):
    """The batches that graphs were made for."""
    return play_graphs(monkeypatch)


def batch(size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, n, 3, generator=g) for n in (5, 2)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def check(captured, model, size, **options):
    for seed in (0, 1):
        inputs = batch(size, seed)
        with torch.no_grad():
            torch.testing.assert_close(captured(model, model.run, *inputs, **options), model.run(*inputs))


@torch.no_grad()
def warm(captured, model, size=16):
    for _ in range(-(-CLIPS // size)):
        captured(model, model.run, *batch(size))


def test_a_shape_is_recorded_once_200_clips_have_been_seen(model, recorded):
    captured, inputs = Captured(), batch(60)
    with torch.no_grad():
        for _ in range(3):
            captured(model, model.run, *inputs)
        assert model.ways == [False] * 3
        assert recorded == []
        captured(model, model.run, *inputs)
    assert recorded == [60]
    assert all(model.ways[3:])
    check(captured, model, 60)
    assert recorded == [60]


def test_results_are_not_overwritten_by_the_next_call(model, recorded):
    captured = Captured()
    warm(captured, model)
    with torch.no_grad():
        first = captured(model, model.run, *batch(16))
        captured(model, model.run, *batch(16, seed=1))
        torch.testing.assert_close(first, model.run(*batch(16)))


def test_a_smaller_batch_is_padded_and_much_smaller_ones_run_as_they_are(model, recorded):
    captured = Captured()
    warm(captured, model)
    for size in (15, 9, 8):
        model.ways.clear()
        check(captured, model, size)
        assert model.ways.count(True) == 2
    for size in (7, 1, 17, 0):
        model.ways.clear()
        check(captured, model, size)
        assert True not in model.ways
    assert recorded == [16]


def test_no_more_than_a_few_graphs_are_made(model, recorded):
    captured = Captured()
    for power in range(GRAPHS + 2):
        check(captured, model, 3**power, after=0)
    assert recorded == [3**power for power in range(GRAPHS)]


@pytest.mark.parametrize("write", ["in place", "load_state_dict", "fused AdamW", "through .data"])
def test_weights_that_are_written_to_count_from_the_next_call(model, recorded, write):
    captured = Captured()
    warm(captured, model)
    for _ in range(2):
        if write == "in place":
            with torch.no_grad():
                model.first.weight.add_(1)
        elif write == "load_state_dict":
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        elif write == "fused AdamW":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            model.run(*batch(2))[0].sum().backward()
            optimizer.step()
        else:
            model.first.weight.data.add_(1)
            avfkernels.weights_changed()
        versions = captured.graphs[next(iter(captured.graphs))].versions
        check(captured, model, 16)
        assert captured.graphs[next(iter(captured.graphs))].versions != versions
    assert recorded == [16]


CHANGES = {
    "other data": lambda m: setattr(m.first.weight, "data", torch.ones(4, 3)),
    "another parameter": lambda m: setattr(m.first, "weight", nn.Parameter(m.first.weight.data)),
    "another module": lambda m: setattr(m, "first", nn.Linear(3, 4)),
    "a mode": lambda m: m.second.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_not_what_was_recorded(model, recorded, change):
    captured = Captured()
    warm(captured, model)
    CHANGES[change](model)
    check(captured, model, 16)
    assert recorded == [16]  # not at once: a model that changes with every call would be recorded with every call
    warm(captured, model)
    assert recorded == [16, 16]
    check(captured, model, 16)


def test_hooks_run_before_and_after_recording(model, recorded):
    captured, seen = Captured(), []
    for made in ([], [16]):
        hook = model.second.register_forward_hook(lambda *_: seen.append(1))
        warm(captured, model)
        assert len(seen) == -(-CLIPS // 16)
        assert recorded == made
        hook.remove()
        seen.clear()
        warm(captured, model)
    assert recorded == [16, 16]
    check(captured, model, 16)


def test_a_failure_is_reported_once_and_all_runs_as_it_is(model, recorded, monkeypatch):
    captured = Captured()

    def fails(*inputs, compiled=False):
        if compiled:
            raise RuntimeError("no compiler")
        return model.run(*inputs)

    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="runs uncompiled: RuntimeError: no compiler"):
        got = captured(model, fails, *batch(8), after=0)
    torch.testing.assert_close(got, model.run(*batch(8)))
    with warnings.catch_warnings(action="error"):
        torch.testing.assert_close(captured(model, fails, *batch(8), after=0), model.run(*batch(8)))
    assert str(captured.failure) == "no compiler"


def test_training_is_compiled_and_not_recorded(model, recorded):
    captured = Captured()
    model.train()
    for _ in range(4):
        out = captured(model, model.run, *batch(60))
    assert model.ways == [False] * 3 + [True]
    assert out[0].requires_grad
    assert recorded == []


def test_what_is_not_recorded(model, recorded):
    captured = Captured()
    with torch.no_grad(), avfkernels.backend("eager"):
        captured(model, model.run, *batch(8), after=0)
    torch.func.vmap(partial(captured, model, model.run, after=0))(*(x[None] for x in batch(8)))
    with torch.no_grad():
        torch.compile(partial(captured, model, model.run, after=0), backend="eager", fullgraph=True)(*batch(8))
        graphs = Captured()
        graphs(model.train(), model.run, *batch(8), after=0)
        assert not graphs.graphs
    assert recorded == []


def test_autocast_and_inference_mode_are_recorded_apart(model, recorded):
    captured = Captured()
    check(captured, model, 8, after=0)
    with torch.autocast("cpu", torch.bfloat16):
        check(captured, model, 8, after=0)
        with torch.no_grad():
            assert captured(model, model.run, *batch(8))[0].dtype == torch.bfloat16
    with torch.inference_mode():
        captured(model, model.run, *batch(8), after=0)
        captured(model, model.run, *batch(8))
    check(captured, model, 8)
    assert recorded == [8, 8, 8]


def test_copies_and_files_hold_no_graphs(model, recorded):
    captured = Captured()
    warm(captured, model)
    for twin in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        assert twin.graphs == twin.seen == {}


def test_a_graph_is_made_with_the_fusion_branch_beside(model, recorded):
    seen = []

    def run(*inputs, compiled=False):
        seen.append(layer._beside)
        return model.run(*inputs)

    with torch.no_grad():
        captured = Captured()
        captured(model, run, *batch(8), after=0)
    assert all(seen)
    assert not layer._beside
