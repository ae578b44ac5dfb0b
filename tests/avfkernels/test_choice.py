"""The choice of an implementation: every branch, the overrides, and what `python -m avfkernels` says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_accurate, in_double, pair_inputs, plain_pair_attention

import avfkernels
from avfkernels import choice, native, pair_attention
from avfkernels.__main__ import report
from avfkernels.ops import pair
from avfkernels.ops.pair_plain import Pairs

needs_native = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations of pair_attention that ran."""
    names = []

    def spied(name, function):
        return lambda *args: names.append(name) or function(*args)

    for name, function in pair.PLAIN.items():
        monkeypatch.setitem(pair.PLAIN, name, spied(name, function))
    for name, kernel in pair.KERNELS.items():
        monkeypatch.setitem(pair.KERNELS, name, kernel._replace(forward=spied(name, kernel.forward)))
    return names


PAPER = {"B": 2, "H": 4, "N1": 96, "N2": 196, "dtype": torch.float32}


@needs_native
@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, {}, "cpu"),
        ({"grad": True}, {}, "cpu"),
        ({"F": 4}, {}, "eager"),  # most of a vector would be empty
        ({"N1": 3, "N2": 5}, {}, "cpu"),
        ({"dtype": torch.bfloat16}, {}, "cpu"),
        ({"dtype": torch.float64}, {}, "eager"),
        ({"dtype": torch.float16}, {}, "eager"),
        ({}, {"interaction": "product"}, "cpu"),
        ({"F": 4}, {"interaction": "product"}, "cpu"),
        ({}, {"dropout_p": 0.1}, "cpu"),
        ({"dtype": torch.float64}, {"interaction": "product"}, "eager"),
        ({"dtype": torch.float64}, {"dropout_p": 0.1}, "reference"),
    ],
)
def test_automatic_choice(ran, change, options, expected):
    pair_attention(*pair_inputs(**PAPER | change), scale=1.0, **options)
    assert ran == [expected]


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, {}, "triton"),
        ({"dtype": torch.float32}, {}, "triton"),
        ({}, {"dropout_p": 0.1}, "triton"),
        ({}, {"dropout_p": 0.1, "interaction": "product"}, "triton"),
        ({}, {"interaction": "product"}, "cuda"),
        ({"dtype": torch.float16}, {"interaction": "product"}, "cuda"),
        ({"dtype": torch.float32}, {"interaction": "product"}, "eager"),
        ({"dk": 64, "dv": 64}, {"interaction": "product"}, "eager"),
        ({"N1": 1024, "N2": 1024}, {"interaction": "product"}, "eager"),
        ({"dtype": torch.float64}, {}, "eager"),
        ({"dtype": torch.float64}, {"dropout_p": 0.1}, "reference"),
    ],
)
def test_automatic_choice_on_a_gpu(change, options, expected, monkeypatch):
    """As the table says; that the libraries are there is taken for granted."""

    class OnCuda(Pairs):
        q = property(lambda self: Fake(self._q), lambda self, q: setattr(self, "_q", q))

    class Fake:
        def __init__(self, x):
            self.shape, self.dtype, self.device = x.shape, x.dtype, torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "why_cuda_unavailable", lambda: None)
    monkeypatch.setattr(pair.pair_triton, "_INSTALLED", True)
    options = {"interaction": "sum", "dropout_p": 0.0} | options
    tensors = pair_inputs(1, 1, **{"dtype": torch.bfloat16} | change)
    arguments = OnCuda(*tensors, None, None, None, 1.0, **options)
    assert choice.choose("pair_attention", arguments, pair.WHY_NOT) == expected


def test_every_implementation_is_chosen_somewhere_by_a_measurement_that_is_in_the_repository():
    assert {row.implementation for row in choice.TABLE} == set(choice.NAMES) == set(pair.WHY_NOT)
    assert set(choice.KERNELS) == set(pair.KERNELS)
    for row in choice.TABLE:
        assert (RESULTS / row.evidence).exists() if row.implementation in choice.KERNELS else row.evidence is None, row


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


def test_tensors_off_the_cpu_do_not_go_to_the_cpu_kernel(ran):
    pair_attention(*(t.to("meta") for t in pair_inputs(dtype=torch.float32)), scale=1.0)
    assert ran == ["eager"]


def test_without_the_native_library_plain_pytorch_runs(ran, monkeypatch):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", "not built")
    pair_attention(*pair_inputs(dtype=torch.float32), scale=1.0)
    assert ran == ["eager"]
    with pytest.raises(RuntimeError, match="not built"):
        native.library()


@needs_native
@pytest.mark.parametrize("options", [{}, {"interaction": "product"}, {"dropout_p": 0.5, "seed": 1}])
def test_any_stride_goes_to_the_kernel(ran, options):
    tensors = pair_inputs(dtype=torch.float32, grad=True)
    strided = [t.detach().transpose(-2, -1).contiguous().transpose(-2, -1).requires_grad_() for t in tensors]
    results = []
    for given in (tensors, strided):
        out = pair_attention(*given, scale=1.0, **options)
        results.append((out, *torch.autograd.grad(out.sin().sum(), given)))
    torch.testing.assert_close(*results)
    assert ran == ["cpu", "cpu"]


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("cpu", marks=needs_native)])
def test_the_context_manager_forces_a_backend_and_restores_the_choice(ran, name):
    tensors = pair_inputs(dtype=torch.float32)
    with avfkernels.backend(name):
        pair_attention(*tensors, scale=1.0)
        with avfkernels.backend(None):
            assert choice.forced() is None
        assert choice.forced() == name
    assert ran == [name]
    assert choice.forced() is None


def test_an_op_without_the_forced_backend_runs_as_eager():
    q, x = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    with avfkernels.backend("cuda"):
        avfkernels.latent_attention(q, x, scale=1.0)


@pytest.mark.parametrize(
    ("name", "dtype", "options", "reason"),
    [
        ("cpu", torch.float64, {}, "float32 and bfloat16, not torch.float64"),
        ("eager", torch.float32, {"dropout_p": 0.1}, "R1 and R4 do not hold where pairs are dropped"),
        ("triton", torch.float32, {}, "the tensors are on cpu, not on a CUDA device"),
        ("cuda", torch.float32, {}, "the tensors are on cpu, not on a CUDA device"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(name, dtype, options, reason):
    tensors = pair_inputs(dtype=dtype)
    with avfkernels.backend(name), pytest.raises(RuntimeError, match=f"pair_attention: the backend '{name}'.*{reason}"):
        pair_attention(*tensors, scale=1.0, **options)


def test_an_unknown_backend_is_an_error_that_lists_the_known():
    unknown = avfkernels.backend("cudnn")
    with pytest.raises(ValueError, match="no backend is called 'cudnn'; expected one of reference, eager, cpu"):
        unknown.__enter__()


def run_module(**environment):
    return subprocess.run(
        [sys.executable, "-m", "avfkernels"], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_diagnosis_prints_versions_devices_and_the_table():
    text = report()
    for word in ("avfkernels", f"torch    {torch.__version__}", "cuda", "override: none"):
        assert word in text
    for row in choice.TABLE:
        assert f"{row.op}, {row.device}: {row.regime}" in text
        assert row.evidence is None or f"bench/results/{row.evidence}" in text
    if not torch.cuda.is_available():
        assert text.count("not here: no CUDA device") == sum(row.device == "cuda" for row in choice.TABLE)


def test_diagnosis_says_what_is_missing_without_the_native_library(monkeypatch):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", "libavfkernels.so was not built: it needs a C++ compiler")
    text = report()
    assert "native   not available: libavfkernels.so was not built" in text
    assert "compilers on PATH" in text
    assert "not here: libavfkernels.so was not built" in text


def test_avf_backend_forces_a_backend_from_the_environment():
    done = run_module(AVF_BACKEND="reference")
    assert done.returncode == 0
    assert "override: reference (AVF_BACKEND)" in done.stdout


def test_avf_backend_with_an_unknown_name_is_an_error():
    done = run_module(AVF_BACKEND="fast")
    assert done.returncode != 0
    assert "AVF_BACKEND: no backend is called 'fast'" in done.stderr
