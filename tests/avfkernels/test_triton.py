"""The Triton kernels: against float64 in every dtype, on a GPU or interpreted on the CPU.

The interpreter must be chosen before triton is imported, so an ordinary run starts this file in a process of its own
(test_every_kernel_interpreted). There the kernels are registered for CPU tensors too. It computes bf16 wrongly,
silently, and is left to fp32 and fp16; on a GPU (`-m gpu`) the same tests cover bf16.
"""

import os
import subprocess
import sys

import pytest
import torch
from oracle import assert_accurate, pair_inputs, plain_pair_attention

import avfkernels
from avfkernels import pair_attention
from avfkernels.ops import pair
from avfkernels.ops.dropout import pair_dropout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def runs_kernels(test):
    """For tests that launch kernels: run interpreted, or on a GPU."""
    reason = "" if INTERPRETED or torch.cuda.is_available() else "interpreted in a process of its own"
    test = pytest.mark.skipif(bool(reason), reason=reason)(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(autouse=True)
def interpreted_on_cpu_tensors(monkeypatch):
    if INTERPRETED:
        monkeypatch.setitem(pair.WHY_NOT, "triton", lambda a: None)


in_an_ordinary_process = pytest.mark.skipif(INTERPRETED, reason="in the process that starts this one")


@in_an_ordinary_process
@pytest.mark.long
def test_every_kernel_interpreted():
    """The interpreter takes most of a minute, at the smallest shapes that reach every branch."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout.splitlines()[-1], run.stdout


def inputs_of(shape, dtype):
    return [t.to(DEVICE) for t in pair_inputs(*shape, dtype=dtype, logit=2.0)]


def triton_call(tensors, options):
    """(out, lse) by the Triton backend, whatever the device."""
    with avfkernels.backend("triton"):
        return pair_attention(*tensors, **options, return_lse=True)


def gradients(call, tensors, upstream):
    """out, lse and the gradients of a sum of both, weighted by `upstream`."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = call(*tensors)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out.double() * upstream).sum() + (finite.double() * upstream[..., 0]).sum()
    return out, lse, *torch.autograd.grad(loss, tensors)


def compare(shape, dtype, tensors=None, **options):
    """out, lse and every gradient against the reference in float64."""
    tensors = inputs_of(shape, dtype) if tensors is None else tensors
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1], dtype=torch.float64, generator=generator).to(
        DEVICE
    )
    upstream = upstream.to(dtype).double()
    got = gradients(lambda *t: triton_call(t, options), tensors, upstream)
    with avfkernels.backend("reference"):
        exact, plain = (
            gradients(lambda *t: pair_attention(*t, **options, return_lse=True), inputs, upstream)
            for inputs in ([t.double() for t in tensors], tensors)
        )
    # In half types the reference rounds the result alone; kernels round weights too.
    for triple in zip(got, exact, plain, strict=True):
        assert_accurate(*triple, times=3, roundings=4 if dtype == torch.float32 else 2)


def masks(B, N1, N2):
    generator = torch.Generator().manual_seed(1)
    made = [torch.rand(B, n, generator=generator) > 0.4 for n in (N1, N2)]
    made[0][0] = False  # no pair at all
    return {"mask1": made[0].to(DEVICE), "mask2": made[1].to(DEVICE)}


# B, H, F, N1, N2, dk, dv
PAIRS = [(2, 1, 16, 5, 70, 16, 16), (1, 2, 5, 9, 17, 16, 64), (2, 1, 19, 3, 33, 20, 33), (1, 1, 1, 1, 1, 1, 1)]
# Interpreted, float16 once: rounding does not depend on the shape.
PAIR_CASES = [(shape, dtype) for shape in PAIRS for dtype in DTYPES if shape == PAIRS[0] or dtype == DTYPES[0]]
PAIR_CASES = PAIR_CASES if INTERPRETED else [(shape, dtype) for shape in PAIRS for dtype in DTYPES]


KINDS = [("sum", 0.0), ("product", 0.0), ("sum", 0.3), ("product", 0.3)]
# Interpreted, each shape but the first takes two of the kinds in turns, so that sums and products see all of them.
PAIR_KINDS = [(shape, dtype, kind) for shape, dtype in PAIR_CASES for i, kind in enumerate(KINDS)
              if not INTERPRETED or shape == PAIRS[0] or PAIRS.index(shape) % 2 == i // 2]  # fmt: skip


@runs_kernels
@pytest.mark.parametrize(("shape", "dtype", "kind"), PAIR_KINDS)
def test_pairs(shape, dtype, kind):
    interaction, dropout_p = kind
    options = {"scale": 0.25, "interaction": interaction, "dropout_p": dropout_p}
    options["seed"] = torch.tensor(2**40 + 5, device=DEVICE) if dropout_p else None
    if shape[0] > 1:
        options |= masks(shape[0], shape[3], shape[4])
    compare(shape, dtype, **options)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_bug_a_single_pair_has_weight_one_and_logits_without_gradient(interaction, dtype):
    """delta came from another rounding of the same number, so that the gradients of q and k were rounding errors."""
    tensors = [t.requires_grad_() for t in inputs_of((2, 2, 5, 1, 1, 16, 16), dtype)]
    out, _ = triton_call(tensors, {"scale": 0.25, "interaction": interaction})
    grad_q, grad_k1, _, grad_k2, _ = torch.autograd.grad(out.float().sin().sum(), tensors)
    assert not any(bool(grad.any()) for grad in (grad_q, grad_k1, grad_k2))


@runs_kernels
@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("shape", [(1, 2, 3, 0, 5, 16, 16), (1, 2, 3, 5, 0, 16, 16), (0, 2, 3, 5, 4, 16, 16)])
def test_empty_sides(shape, interaction):
    compare(shape, torch.float32, scale=0.25, interaction=interaction)


@runs_kernels
def test_many_queries_and_long_sets_whose_gradients_are_split_over_tokens(monkeypatch):
    launched = []
    if INTERPRETED:
        from avfkernels.ops import pair_sum_triton as kernels

        def spy(kernel, *args, run=kernels.launch):
            launched.append(kernel.fn.__name__)
            run(kernel, *args)

        monkeypatch.setattr(kernels, "launch", spy)
    for shape, expected in (
        (
            (1, 1, 70, 40, 70, 16, 16),
            ["forward_kernel", "backward_kernel", *["backward_tokens_kernel"] * 2],
        ),  # two blocks of queries
        (
            (1, 1, 3, 300, 600, 16, 16),
            ["forward_kernel", "merge", "backward_kernel", *["backward_tokens_kernel"] * 2],
        ),  # long sets
        ((1, 1, 3, 0, 600, 16, 16), ["forward_kernel", "merge", "backward_kernel", "backward_tokens_kernel"]),
        ((1, 1, 3, 30, 60, 16, 16), ["forward_kernel", "backward_kernel"]),
    ):
        launched.clear()
        compare(shape, torch.float32, scale=0.25)
        assert not INTERPRETED or launched == expected
    compare((2, 1, 3, 300, 600, 16, 16), torch.float32, scale=0.25, **masks(2, 300, 600))


@runs_kernels
@pytest.mark.parametrize(("interaction", "dropout_p"), [("sum", 0.0), ("product", 0.0), ("sum", 0.3)])
def test_hidden_tokens_may_hold_nan(interaction, dropout_p):
    keep = masks(2, 9, 17)
    keep["mask1"][0] = True
    options = {"scale": 0.25, "interaction": interaction, "dropout_p": dropout_p, "seed": 5}
    results = []
    for value in (0.0, float("nan")):
        tensors = inputs_of((2, 1, 5, 9, 17, 16, 16), torch.float32)
        for i, mask in ((1, "mask1"), (2, "mask1"), (3, "mask2"), (4, "mask2")):
            tensors[i].masked_fill_(~keep[mask][:, None, :, None], value)
        upstream = torch.ones(2, 1, 5, 16, dtype=torch.float64, device=DEVICE)
        results.append(gradients(lambda *t: triton_call(t, options | keep), tensors, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_error_is_that_of_the_plain_formula(interaction, dtype):
    """Root mean square errors over several draws: the interpreter wants tiny shapes, where one maximum is noise."""
    options = {"scale": 0.25, "interaction": interaction}
    squares = torch.zeros(2, 6, dtype=torch.float64)  # of kernel and formula; out and five gradients
    B, N1, N2 = (2, 24, 49) if interaction == "sum" else (1, 9, 40)
    for seed in range(3):
        tensors = [t.to(DEVICE) for t in pair_inputs(B, 2, 16, N1, N2, 16, 16, dtype, logit=2.0, seed=seed)]
        upstream = torch.randn(B, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        upstream = upstream.to(DEVICE, dtype)
        results = []
        for call, inputs in (
            (lambda *t: plain_pair_attention(*t, **options)[0], [t.double() for t in tensors]),
            (lambda *t: triton_call(t, options)[0], tensors),
            (lambda *t: plain_pair_attention(*t, **options)[0], tensors),
        ):
            inputs = [t.detach().requires_grad_() for t in inputs]
            out = call(*inputs)
            results.append((out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))))
        exact, *inexact = results
        errors = [[(x.double() - e).square().mean() for x, e in zip(row, exact, strict=True)] for row in inexact]
        squares = squares + torch.tensor(errors, dtype=torch.float64)
    got, plain = squares.sqrt()
    assert bool((got <= 1.5 * plain).all()), (got / plain).tolist()


@runs_kernels
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_slices_of_a_packed_projection_and_an_expanded_gradient(interaction):
    packed = [torch.randn(2, n, 3, 2, 16, device=DEVICE) for n in (6, 5, 17)]
    views = [packed[i][:, :, part].transpose(1, 2) for i, part in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))]
    results = []
    for tensors in (views, [view.contiguous() for view in views]):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = triton_call(tensors, {"scale": 0.25, "interaction": interaction})[0]
        results.append((out, *torch.autograd.grad(out.sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@runs_kernels
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_the_dropout_mask_is_that_of_the_reference(interaction):
    """With equal logits and values that are one for one pair, the output shows which pairs were kept."""
    B, H, F, N1, N2, seed = 1, 2, 3, 5, 11, torch.tensor(-3, device=DEVICE)
    q, k1, k2 = (torch.zeros(B, H, n, 16, device=DEVICE) for n in (F, N1, N2))
    v1, v2 = torch.eye(N1, 16, device=DEVICE).expand(B, H, N1, 16), torch.zeros(B, H, N2, 16, device=DEVICE)
    if interaction == "product":
        v1, v2 = torch.ones_like(v1), torch.eye(N2, 16, device=DEVICE).expand(B, H, N2, 16)
    options = {"scale": 1.0, "interaction": interaction, "dropout_p": 0.4, "seed": seed}
    out = triton_call((q, k1, v1, k2, v2), options)[0] * (N1 * N2)
    mask = pair_dropout(seed, 0.4, B, H, F, N1, N2)
    expected = mask.sum(4) if interaction == "sum" else mask.sum(3)
    torch.testing.assert_close(out[..., : expected.shape[3]], expected)


@runs_kernels
@pytest.mark.parametrize("dv", [0, 16])
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_gradients_of_lse_alone_and_values_of_no_width(interaction, dv):
    tensors = [t.requires_grad_() for t in inputs_of((1, 2, 3, 5, 9, 16, dv), torch.float32)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    options = {"scale": 0.25, "interaction": interaction}
    out, lse = triton_call(tensors, options)
    assert out.shape == (1, 2, 3, dv)
    grad_q, grad_k1, grad_v1, grad_k2, grad_v2 = torch.autograd.grad(lse.sin().sum(), tensors)
    assert not grad_v1.any()
    assert not grad_v2.any()
    exact, plain = (plain_pair_attention(*inputs, **options)[1] for inputs in (doubles, tensors))
    assert_accurate(lse, exact, plain, times=3, roundings=4)
    of_keys = [0, 1, 3]
    exact = torch.autograd.grad(exact.sin().sum(), [doubles[i] for i in of_keys])
    plain = torch.autograd.grad(plain.sin().sum(), [tensors[i] for i in of_keys])
    for triple in zip((grad_q, grad_k1, grad_k2), exact, plain, strict=True):
        assert_accurate(*triple, times=3, roundings=4)


@in_an_ordinary_process
def test_the_package_imports_without_triton():
    """Neither importing avfkernels nor asking what runs imports triton, and without it there is a reason."""
    code = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch\n"
        "loaded = 'triton' in sys.modules\n"
        "from avfkernels.ops import pair_triton\n"
        "assert loaded or 'triton' not in sys.modules\n"
        "class Cuda: device = torch.device('cuda'); dtype = torch.float32; shape = (1, 16)\n"
        "class Pairs: q = v1 = Cuda()\n"
        "assert pair_triton.why_not(Pairs()) == 'triton is not installed'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
