"""The choice of a backend: every branch, the overrides, and what `python -m avfkernels` says."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from oracle import assert_accurate, in_double, pair_inputs, plain_pair_attention

import avfkernels
from avfkernels import _backends, _native, _ops, pair_attention
from avfkernels.__main__ import report

needs_native = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends of pair_attention that ran."""
    names = []

    def spied(name, backend):
        def forward(*args, **kwargs):
            names.append(name)
            return backend.forward(*args, **kwargs)

        return replace(backend, forward=forward)

    table = {name: spied(name, backend) for name, backend in _ops.BACKENDS["pair_attention"].items()}
    monkeypatch.setitem(_ops.BACKENDS, "pair_attention", table)
    return names


PAPER = {"B": 2, "H": 4, "N1": 96, "N2": 196, "dtype": torch.float32}


@needs_native
@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, {}, "cpu"),
        ({"B": 8, "grad": True}, {}, "cpu"),
        ({"grad": True}, {}, "eager"),  # too little work for two calls of our own
        ({"F": 4}, {}, "eager"),  # most of a vector would be empty
        ({"N1": 3, "N2": 5}, {}, "eager"),  # the call itself counts
        ({"H": 1, "B": 1, "grad": True}, {}, "eager"),  # backward would run on one thread
        ({"dtype": torch.bfloat16}, {}, "cpu"),
        ({"dtype": torch.float64}, {}, "eager"),
        ({"dtype": torch.float16}, {}, "eager"),
        ({}, {"interaction": "product"}, "cpu"),
        ({}, {"dropout_p": 0.1}, "cpu"),
        ({"dtype": torch.float64}, {"interaction": "product"}, "reference"),
        ({"dtype": torch.float64}, {"dropout_p": 0.1}, "reference"),
    ],
)
def test_automatic_choice(ran, change, options, expected):
    pair_attention(*pair_inputs(**PAPER | change), scale=1.0, **options)
    assert ran == [expected]


@needs_native
@pytest.mark.parametrize(
    ("B", "M", "grad", "isa", "expected"),
    [
        (8, 96, False, "avx512", "cpu"),
        (8, 96, False, "avx2", "eager"),
        (8, 96, True, "avx512", "cpu"),
        (8, 96, True, "avx2", "eager"),
        (1, 96, True, "avx512", "eager"),
        (8, 8, False, "avx512", "eager"),
    ],
)
def test_automatic_choice_of_latent_attention(B, M, grad, isa, expected, monkeypatch):
    monkeypatch.setattr(_native, "isa", lambda: isa)
    if torch.get_num_threads() > 8:
        pytest.skip("tuned on two cores; more threads than tasks stay with eager")
    q, x = (torch.zeros(B, n, 768, requires_grad=grad) for n in (M, 196))
    arguments = {"q": q, "x": x, "scale": 1.0, "mask": None, "return_lse": False}
    table = _ops.BACKENDS["latent_attention"]
    if torch.get_num_threads() == 1 and expected == "eager" and B == 1:
        expected = "cpu"
    assert _backends.select("latent_attention", table, arguments) is table[expected]


def test_tensors_off_the_cpu_do_not_go_to_the_cpu_kernel(ran):
    pair_attention(*(t.to("meta") for t in pair_inputs(dtype=torch.float32)), scale=1.0)
    assert ran == ["eager"]


def test_a_last_stride_other_than_one_goes_to_eager(ran):
    tensors = pair_inputs(**PAPER)
    tensors[1] = tensors[1].transpose(-2, -1).contiguous().transpose(-2, -1)
    pair_attention(*tensors, scale=1.0)
    assert ran == ["eager"]


@needs_native
@pytest.mark.parametrize("options", [{"interaction": "product"}, {"dropout_p": 0.5, "seed": 1}])
def test_any_stride_goes_to_the_kernel_where_the_alternative_holds_every_pair(ran, options):
    tensors = pair_inputs(dtype=torch.float32)
    expected = pair_attention(*tensors, scale=1.0, **options)
    strided = [t.transpose(-2, -1).contiguous().transpose(-2, -1) for t in tensors]
    torch.testing.assert_close(pair_attention(*strided, scale=1.0, **options), expected)
    assert ran == ["cpu", "cpu"]


@needs_native
def test_transforms_of_torch_func_run_in_plain_pytorch(ran):
    q, *rest = pair_inputs(**PAPER)

    def loss(q):
        out = pair_attention(q, *rest, scale=1.0)
        return out.sin().sum(), out

    got, (_, out) = torch.func.grad_and_value(loss, has_aux=True)(q)
    assert ran == ["eager"]
    _, native_out = loss(q)
    assert ran == ["eager", "cpu"]
    q.requires_grad_()
    exact_out, doubles = in_double(lambda *t: pair_attention(*t, scale=1.0), q, *rest)
    plain_out = plain_pair_attention(q, *rest, scale=1.0)[0]
    (exact_grad,), (plain_grad,) = (
        torch.autograd.grad(y.sin().sum(), x) for y, x in ((exact_out, doubles[:1]), (plain_out, [q]))
    )
    for value, grad in ((out, got), (native_out, torch.autograd.grad(loss(q)[0], q)[0])):
        assert_accurate(value, exact_out, plain_out, "output")
        assert_accurate(grad, exact_grad, plain_grad, "gradient")
    with avfkernels.backend("cpu"), pytest.raises(RuntimeError, match=r"cannot run: torch\.func and forward-mode"):
        torch.func.grad(loss, has_aux=True)(q.detach())


def test_without_the_native_library_eager_runs(ran, monkeypatch):
    monkeypatch.setattr(_native, "_load", lambda: (None, "not built"))
    pair_attention(*pair_inputs(dtype=torch.float32), scale=1.0)
    assert ran == ["eager"]
    with pytest.raises(RuntimeError, match="not built"):
        _native.library()


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("cpu", marks=needs_native)])
def test_the_context_manager_forces_a_backend_and_restores_the_choice(ran, name):
    tensors = pair_inputs(dtype=torch.float32)
    with avfkernels.backend(name):
        pair_attention(*tensors, scale=1.0)
        with avfkernels.backend(None):
            assert _backends.forced() is None
        assert _backends.forced() == name
    assert ran == [name]
    assert _backends.forced() is None


def test_an_op_without_the_forced_backend_runs_as_eager():
    q, x = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    with avfkernels.backend("cuda"):
        avfkernels.latent_attention(q, x, scale=1.0)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("cpu", {"dtype": torch.float64}, "float32 and bfloat16, not torch.float64"),
        ("eager", {"interaction": "product"}, "R1 separates sums"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(name, change, reason):
    interaction = change.pop("interaction", "sum")
    tensors = pair_inputs(**{"dtype": torch.float32} | change)
    with avfkernels.backend(name), pytest.raises(RuntimeError, match=f"pair_attention: the backend '{name}'.*{reason}"):
        pair_attention(*tensors, scale=1.0, interaction=interaction)


def test_an_unknown_backend_is_an_error_that_lists_the_known():
    unknown = avfkernels.backend("cudnn")
    with pytest.raises(ValueError, match="no backend is called 'cudnn'; expected one of reference, eager, cpu"):
        unknown.__enter__()


def run_module(**environment):
    return subprocess.run(
        [sys.executable, "-m", "avfkernels"], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_diagnosis_lists_versions_devices_and_every_backend_with_its_reason():
    text = report()
    for word in ("avfkernels", f"torch    {torch.__version__}", "cuda", "pair_attention on cpu", "reference", "eager"):
        assert word in text
    assert text.count("not implemented for this op") >= 3
    assert ("chosen" in text) or os.environ.get("AVF_BACKEND")


def test_diagnosis_says_what_is_missing_without_the_native_library(monkeypatch):
    monkeypatch.setattr(_native, "_load", lambda: (None, "libavfkernels.so was not built: it needs a C++ compiler"))
    text = report()
    assert "native   not available: libavfkernels.so was not built" in text
    assert "compilers on PATH" in text


def test_avf_backend_forces_a_backend_from_the_environment():
    done = run_module(AVF_BACKEND="reference")
    assert done.returncode == 0
    assert "override: reference (AVF_BACKEND)" in done.stdout
    assert "reference  chosen" in done.stdout


def test_avf_backend_with_an_unknown_name_is_an_error():
    done = run_module(AVF_BACKEND="fast")
    assert done.returncode != 0
    assert "AVF_BACKEND: no backend is called 'fast'" in done.stderr
