"""The encoder and its masked auto-encoder in fused, compiled and recorded layers; CUDA graphs are played."""

import copy
import pickle
from functools import cache, partial

import pytest
import torch
from played import play_graphs
from small import SMALL, batch, build, golden_encoder, masks
from torch._dynamo.testing import CompileCounterWithBackend

from avfkernels import layer
from avfusion import AVMAE, DeepAVFusion


@pytest.fixture
def uncompiled(monkeypatch):
    """The fused layer where it would be compiled."""
    monkeypatch.setattr(layer, "_compiled", lambda function: function)


@pytest.fixture
def recorded(monkeypatch, uncompiled):
    """The shapes of what graphs give."""
    return play_graphs(monkeypatch, note=lambda outputs: [tuple(x.shape) for x in outputs])


@pytest.mark.parametrize("absorb_from", [0, 999])
@pytest.mark.parametrize("kind", ["token", "dense", "factorized"])
def test_golden_outputs_of_the_release_by_fused_layers(kind, absorb_from, uncompiled, monkeypatch):
    monkeypatch.setattr(layer, "ABSORB_FROM", absorb_from)
    model, golden = golden_encoder(kind)
    model.compiled = True
    with torch.no_grad():
        *out, embs = model(golden["image"], golden["audio"], return_embs=True)
    names = ("image", "audio", "fusion")
    pairs = [(got, golden[f"full_{name}"]) for got, name in zip(out, names, strict=True)]
    for number, layer_out in enumerate(embs):
        pairs += [(got, golden[f"emb{number}.{name}"]) for got, name in zip(layer_out, names, strict=True)]
    assert len(pairs) == 9
    for got, expected in pairs:  # which are kept in float32
        assert ((got - expected).norm() / expected.norm()).item() < 2e-7


@pytest.mark.parametrize("fusion", ["token", "dense", "factorized", "none"])
def test_losses_and_gradients_of_the_masked_auto_encoder_are_those_of_plain_layers(fusion, uncompiled):
    torch.manual_seed(0)
    model = AVMAE(build(torch.float64, fusion=fusion), decoder_dim=32, decoder_depth=2, decoder_num_heads=2).double()
    inputs = [*batch(dtype=torch.float64), torch.rand(2, 12), torch.rand(2, 6)]
    results = []
    for compiled in (False, True):
        model.encoder.compiled = compiled
        loss = sum(model(*inputs, predict=False)[:2])
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    largest = max(x.norm().item() for x in results[0] if x is not None)
    for expected, got in zip(*results, strict=True):
        assert (expected is None) == (got is None)
        if got is not None:
            assert (got - expected).norm() <= 1e-12 * max(expected.norm().item(), 1e-3 * largest)


def test_a_step_is_five_graphs_whatever_the_depth(monkeypatch):
    """One for the encoder's layers, and in the decoders one for each modality's blocks, and one for its last."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        layer, "_compiled", cache(partial(torch.compile, fullgraph=True, dynamic=False, backend=graphs))
    )
    model = AVMAE(build(fusion="factorized", depth=3), decoder_dim=32, decoder_depth=3, decoder_num_heads=2)
    model.encoder.compiled = True
    for _ in range(2):
        sum(model(*batch(), torch.rand(2, 12), torch.rand(2, 6), predict=False)[:2]).backward()
    assert graphs.frame_count == 5


@pytest.mark.parametrize("masked", [False, True])
def test_inference_is_recorded_after_200_clips_and_padded(masked, recorded):
    model = build().eval()
    plain = copy.deepcopy(model)
    plain.compiled = False
    with torch.no_grad():
        for _ in range(4):
            inputs = [*batch(B=50), *(masks(B=50) if masked else ())]
            torch.testing.assert_close(model(*inputs), plain(*inputs))
        assert len(recorded) == 1
        for size in (50, 30, 3):
            inputs = [x[:size].flip(0) for x in inputs]
            torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)
    assert len(recorded) == 1
    assert recorded[0][2] == (50, 12, 64)


def test_tokens_of_every_layer_are_recorded_apart(recorded):
    model = build().eval()
    model.compiled = True
    inputs = batch()
    with torch.no_grad():
        *out, embs = model(*inputs, return_embs=True)
        *again, embs_again = model(*inputs, return_embs=True)
        model.compiled = False
        *expected, embs_expected = model(*inputs, return_embs=True)
    assert [len(shapes) for shapes in recorded] == [3 + 2 * 3]
    torch.testing.assert_close((out, embs), (expected, [tuple(x) for x in embs_expected]))
    torch.testing.assert_close((again, embs_again), (out, embs))


def test_false_never_records_and_copies_hold_no_graph(recorded):
    model = build().eval()
    with torch.no_grad():
        model.compiled = False
        for _ in range(5):
            model(*batch(B=50))
        assert recorded == []
        model.compiled = True
        model(*batch())
    assert len(recorded) == 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin._captured.graphs
        with torch.no_grad():
            torch.testing.assert_close(twin(*batch()), model(*batch()))
    assert list(DeepAVFusion(SMALL).state_dict()) == list(model.state_dict())
