"""Pair dropout: the generator, the statistics of the mask, its reproducibility, and that no pair is stored."""

import pytest
import torch
from oracle import pair_inputs

import avfkernels
from avfkernels import pair_attention
from avfkernels.native import why_unavailable
from avfkernels.ops.dropout import keep_factor, pair_dropout, philox, threshold

needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
INTERACTIONS = ["sum", "product"]


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, seed, expected):
    words = philox([torch.tensor(counter)] * 4, torch.tensor(seed))
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_the_mask_has_the_promised_rate_and_no_structure():
    mask = pair_dropout(torch.tensor(1), 0.3, 2, 3, 16, 40, 50)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(keep_factor(0.3)).item()}
    kept = (mask > 0).double()
    n = kept.numel()  # 192,000: a rate is known to 0.001
    assert abs(kept.mean().item() - 0.7) < 5 * (0.21 / n) ** 0.5
    assert abs(mask.mean().item() - 1.0) < 5 * (0.3 / 0.7 / n) ** 0.5
    for dim in range(5):  # neighbours in every direction are independent
        a, b = kept.narrow(dim, 0, kept.shape[dim] - 1), kept.narrow(dim, 1, kept.shape[dim] - 1)
        covariance = ((a - 0.7) * (b - 0.7)).mean().item()
        assert abs(covariance) < 5 * 0.21 / a.numel() ** 0.5, dim
    assert not torch.equal(mask, pair_dropout(torch.tensor(2), 0.3, 2, 3, 16, 40, 50))


def test_the_mask_of_a_pair_does_not_depend_on_the_size_of_the_problem():
    whole = pair_dropout(torch.tensor(9), 0.5, 1, 2, 16, 40, 50)
    assert torch.equal(whole[:, :, :5, :7, :13], pair_dropout(torch.tensor(9), 0.5, 1, 2, 5, 7, 13))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_the_seed_decides_and_torch_draws_it(backend, interaction):
    tensors = pair_inputs(dtype=torch.float32)

    def run(seed):
        with avfkernels.backend(backend):
            return pair_attention(*tensors, scale=0.25, interaction=interaction, dropout_p=0.4, seed=seed)

    assert torch.equal(run(5), run(torch.tensor(5)))
    assert not torch.equal(run(5), run(6))
    torch.manual_seed(0)
    first, second = run(None), run(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(run(None), first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_averaged_over_seeds_the_output_is_that_without_dropout(backend, interaction):
    q, k1, v1, k2, v2 = pair_inputs(1, 1, 1, 3, 2, 2, 2, torch.float32)
    many = [t.expand(4000, -1, -1, -1) for t in (q, k1, v1, k2, v2)]  # each batch entry meets its own mask
    options = {"scale": 1.0, "interaction": interaction}
    with avfkernels.backend(backend):
        dropped = pair_attention(*many, dropout_p=0.3, seed=0, **options)
        kept = pair_attention(q, k1, v1, k2, v2, **options)
    standard_error = dropped.std(0) / 4000**0.5
    assert bool((standard_error > 0).all())
    assert bool(((dropped.mean(0) - kept[0]).abs() < 5 * standard_error).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_everything_dropped_is_zero_and_nothing_dropped_is_no_dropout(backend, interaction):
    tensors = pair_inputs(dtype=torch.float32, grad=True)
    options = {"scale": 0.25, "interaction": interaction, "return_lse": True}
    with avfkernels.backend(backend):
        out, lse = pair_attention(*tensors, dropout_p=1.0, **options)
        kept, kept_lse = pair_attention(*tensors, **options)
        grads = torch.autograd.grad(out.sum(), tensors)
        assert torch.equal(pair_attention(*tensors, dropout_p=0.0, seed=4, **options)[0], kept)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    torch.testing.assert_close(lse, kept_lse)  # that before dropout


@needs_native
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_checkpointing_meets_the_same_mask_again(interaction):
    from torch.utils.checkpoint import checkpoint

    tensors = pair_inputs(dtype=torch.float32, grad=True)

    def run(*t):
        return pair_attention(*t, scale=0.25, interaction=interaction, dropout_p=0.4)

    results = []
    for call in (run, lambda *t: checkpoint(run, *t, use_reentrant=False)):
        torch.manual_seed(0)
        out = call(*tensors)
        results.append((out, *torch.autograd.grad(out.sin().sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"dropout_p": 0.1, "seed": torch.zeros(2)}, TypeError, r"seed must be one int64, got \[2\] torch.float32"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        pair_attention(*pair_inputs(dtype=torch.float32), scale=1.0, **options)


@pytest.mark.parametrize(("steps", "expected"), [(0.5, 1), (1.5, 2), (2.5, 3), (2.49, 2), (65535.6, 65536)])
def test_the_threshold_rounds_halves_up_as_in_c(steps, expected):
    """Python's round goes to even: at 2.5 steps the reference once dropped fewer pairs than the kernels."""
    assert threshold(steps / 65536) == expected
