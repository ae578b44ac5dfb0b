"""The choice of a backend: every branch, the overrides, and what `python -m avfkernels` says."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from oracle import pair_inputs

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


@needs_native
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "cpu"),
        ({"grad": True}, "eager"),  # no fused backward yet
        ({"dtype": torch.float64}, "eager"),
        ({"dtype": torch.bfloat16}, "eager"),
        ({"F": 300}, "eager"),
        ({"dv": 80}, "eager"),
    ],
)
def test_automatic_choice(ran, change, expected):
    pair_attention(*pair_inputs(**{"dtype": torch.float32} | change), scale=1.0)
    assert ran == [expected]


@needs_native
def test_gradients_that_nobody_wants_do_not_keep_the_native_kernel_away(ran):
    with torch.no_grad():
        pair_attention(*pair_inputs(dtype=torch.float32, grad=True), scale=1.0)
    assert ran == ["cpu"]


def test_tensors_off_the_cpu_do_not_go_to_the_cpu_kernel(ran):
    pair_attention(*(t.to("meta") for t in pair_inputs(dtype=torch.float32)), scale=1.0)
    assert ran == ["eager"]


def test_a_last_stride_other_than_one_goes_to_eager(ran):
    tensors = pair_inputs(dtype=torch.float32)
    tensors[1] = tensors[1].transpose(-2, -1).contiguous().transpose(-2, -1)
    pair_attention(*tensors, scale=1.0)
    assert ran == ["eager"]


def test_products_go_to_the_reference(ran):
    pair_attention(*pair_inputs(dtype=torch.float32), scale=1.0, interaction="product")
    assert ran == ["reference"]


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
    with avfkernels.backend("triton"):
        avfkernels.latent_attention(q, x, scale=1.0)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("cpu", {"dtype": torch.float64}, "float32, not torch.float64"),
        ("cpu", {"interaction": "product"}, "no interaction 'product'"),
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
    assert text.count("not implemented for this op") >= 4
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
