"""merge_attention: pieces of the tokens, joined, are the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, pair_inputs

import avfkernels
from avfkernels import latent_attention, merge_attention, pair_attention
from avfkernels.native import why_unavailable

needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def assert_same(merged, whole):
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    interaction=st.sampled_from(["sum", "product"]), side=st.sampled_from([1, 2]), cut=st.integers(0, 9),
    logit=st.sampled_from([1.0, 100.0]), masked=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_pairs_in_two_pieces_are_all_pairs(interaction, side, cut, logit, masked, seed):
    q, k1, v1, k2, v2 = pair_inputs(N1=9, N2=9, logit=logit, seed=seed)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) > 0.5 if masked else None
    options = {"scale": 0.25, "interaction": interaction, "return_lse": True}

    def piece(part):
        cut_mask = None if mask is None else mask[:, part]
        if side == 1:
            return pair_attention(q, k1[:, :, part], v1[:, :, part], k2, v2, mask1=cut_mask, **options)
        return pair_attention(q, k1, v1, k2[:, :, part], v2[:, :, part], mask2=cut_mask, **options)

    merged = merge_attention(*piece(slice(0, cut)), *piece(slice(cut, 9)))
    assert_same(merged, piece(slice(0, 9)))


def test_latent_attention_in_two_pieces_are_the_whole():
    g = torch.Generator().manual_seed(0)
    q, x = (torch.randn(2, n, 8, generator=g, dtype=torch.float64) for n in (3, 11))
    pieces = [latent_attention(q, part, scale=0.3, return_lse=True) for part in (x[:, :4], x[:, 4:])]
    assert_same(merge_attention(*pieces[0], *pieces[1]), latent_attention(q, x, scale=0.3, return_lse=True))


def test_merging_is_associative():
    q, k1, v1, k2, v2 = pair_inputs(N1=9)
    parts = [
        pair_attention(q, k1[:, :, part], v1[:, :, part], k2, v2, scale=0.25, return_lse=True)
        for part in (slice(0, 2), slice(2, 3), slice(3, 9))
    ]
    left = merge_attention(*merge_attention(*parts[0], *parts[1]), *parts[2])
    right = merge_attention(*parts[0], *merge_attention(*parts[1], *parts[2]))
    assert_same(left, right)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_gradients_flow_through_the_merge(backend, interaction):
    if (backend, interaction) == ("eager", "product"):
        backend = "reference"
    options = {"scale": 0.25, "interaction": interaction, "return_lse": True}

    def merged(q, k1, v1, k2, v2):
        parts = [
            pair_attention(q, k1[:, :, part], v1[:, :, part], k2, v2, **options) for part in (slice(0, 4), slice(4, 9))
        ]
        return merge_attention(*parts[0], *parts[1])

    assert_same_gradients(merged, lambda *t: pair_attention(*t, **options), backend)


def assert_same_gradients(merged, whole, backend):
    """Of a loss of (out, lse): the pieces are as near to float64 as three times the whole, in plain PyTorch, is."""
    tensors = pair_inputs(N1=9, dtype=torch.float32, grad=True)

    def gradients(function, inputs, name):
        with avfkernels.backend(name):
            out, lse = function(*inputs)
            return torch.autograd.grad(out.sin().sum() + lse.cos().sum(), inputs)

    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact, plain = (gradients(whole, inputs, "reference") for inputs in (doubles, tensors))
    for triple in zip(gradients(merged, tensors, backend), exact, plain, strict=True):
        assert_accurate(*triple, times=3)


def test_no_key_anywhere_is_zero_with_lse_minus_infinity_and_no_nan_gradient():
    out = torch.zeros(2, 3, 4, requires_grad=True)
    lse = torch.full((2, 3), float("-inf"), requires_grad=True)
    merged, merged_lse = merge_attention(out, lse, out, lse)
    assert torch.equal(merged, torch.zeros_like(merged))
    assert bool((merged_lse == float("-inf")).all())
    for grad in torch.autograd.grad(merged.sum(), (out, lse)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", ["eager", "reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_pieces_without_any_token_leave_the_gradients_of_the_others_alone(backend, interaction):
    if (backend, interaction) == ("eager", "product"):
        backend = "reference"
    mask = torch.tensor([[False] * 6 + [True] * 3, [True] * 9])
    options = {"scale": 0.25, "interaction": interaction, "return_lse": True}

    def piece(q, k1, v1, k2, v2, part=slice(0, 9)):
        return pair_attention(q, k1[:, :, part], v1[:, :, part], k2, v2, mask1=mask[:, part], **options)

    def merged(*tensors):
        pieces = [piece(*tensors, slice(at, at + 3)) for at in (0, 3, 6)]
        return merge_attention(*merge_attention(*pieces[0], *pieces[1]), *pieces[2])

    assert_same_gradients(merged, piece, backend)


def test_half_types_keep_their_dtype():
    out, lse = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(2, 3)
    merged, merged_lse = merge_attention(out, lse, out, lse)
    assert merged.dtype == torch.bfloat16
    assert merged_lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 3, 5)}, r"out1 and out2 must have one shape and dtype, got \[2, 3, 4\]"),
        ({1: torch.zeros(2, 3, 4, dtype=torch.float64)}, "torch.float64"),
        ({2: torch.zeros(2)}, r"lse1 must have shape \[2, 3\], got \[2\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    tensors = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3)]
    for i, value in change.items():
        tensors[i] = value
    out1, out2, lse1, lse2 = tensors
    with pytest.raises(ValueError, match=message):
        merge_attention(out1, lse1, out2, lse2)
