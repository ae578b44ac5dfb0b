"""The CUDA kernel without a GPU: its source run on the CPU (cuda_emulation.h), and what nvcc makes of it."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_accurate, pair_inputs, plain_pair_attention

import avfkernels
from avfkernels import native, pair_attention
from avfkernels.ops import pair, pair_native
from avfkernels.ops.pair_plain import Pairs
from bench import codegen_cuda

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
pytestmark = pytest.mark.long  # the emulation takes a while to compile
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/*.cu as a C++ compiler sees it: the kernel as it is, a warp as 32 fibers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("emulation") / "emulated.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    emulation = [f"-I{HERE}", '-DAVF_WARP="cuda_emulation.h"', "-x", "c++", "-shared"]
    done = subprocess.run(
        [compiler, *flags, *emulation, CSRC / "pair_product.cu", "-o", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(path))
    library.avf_error.restype = ctypes.c_char_p
    return library


@pytest.fixture
def emulated(library, monkeypatch):
    monkeypatch.setattr(native, "_cuda_library", library)
    monkeypatch.setattr(native, "_cuda_reason", None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


def arguments(tensors, mask1=None, mask2=None):
    return Pairs(*(t.detach() for t in tensors), mask1, mask2, None, 0.25, "product", 0.0)


def run(tensors, **masks):
    """out, lse and [2, B, H, F]: what backward, which is Triton's, needs."""
    q, _, v1, _, _ = tensors
    B, H, F, _ = q.shape
    out, lse = torch.full((B, F, H, v1.shape[3]), float("nan"), dtype=q.dtype).transpose(1, 2), torch.empty(B, H, F)
    saved = torch.full(((2 + v1.shape[3]) * B * H * F,), float("nan"))
    pair_native.forward_cuda(arguments(tensors, **masks), out, lse, saved)
    return out, lse, saved[: 2 * B * H * F].view(2, B, H, F)


def exact(tensors, **masks):
    with avfkernels.backend("reference"):
        return pair_attention(
            *(t.detach().double() for t in tensors), scale=0.25, return_lse=True, interaction="product", **masks
        )


def masks_for(B, N1, N2):
    g = torch.Generator().manual_seed(3)
    masks = [torch.rand(B, n, generator=g) > 0.4 for n in (N1, N2)]
    for mask in masks:
        mask[:, 0] = True
    return dict(zip(("mask1", "mask2"), masks, strict=True))


# B, H, F, N1, N2, dk, dv: one query and many, one token and many, odd numbers, every width, more tokens of the first
# set than there are warps, and of the second than a step.
SHAPES = [(2, 2, 16, 19, 49, 16, 16), (2, 8, 3, 1, 1, 16, 16), (1, 1, 5, 8, 8, 16, 32), (1, 1, 21, 9, 70, 16, 16),
          (1, 2, 16, 37, 7, 32, 16), *((1, 1, 17, 9, 35, dk, dv) for dk in (16, 32) for dv in (16, 32))]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_the_plain_formula_and_the_softmax_is_saved(emulated, shape, dtype, masked):
    tensors = pair_inputs(*shape, dtype=dtype, logit=2.0)
    masks = masks_for(shape[0], shape[3], shape[4]) if masked else {}
    (out, lse, (offset, factor)), (exact_out, exact_lse) = run(tensors, **masks), exact(tensors, **masks)
    plain_out, plain_lse = plain_pair_attention(*tensors, scale=0.25, interaction="product", **masks)
    assert_accurate(out, exact_out, plain_out, "out")
    assert_accurate(lse, exact_lse, plain_lse, "lse")
    # exp(logit - offset) * factor are the weights, so offset - log(factor) is the log-sum-exp.
    assert_accurate(offset - factor.log(), exact_lse, plain_lse, "saved", times=3)


@pytest.mark.parametrize(("N1", "N2"), [(0, 9), (9, 0), (0, 0), (9, 40)])
def test_without_a_pair_the_output_is_zero(emulated, N1, N2):
    tensors = pair_inputs(3, 2, 5, N1, N2, dtype=torch.bfloat16)
    mask1, mask2 = torch.ones(3, N1, dtype=torch.bool), torch.ones(3, N2, dtype=torch.bool)
    mask1[0], mask2[2] = False, False
    out, lse, (offset, factor) = run(tensors, mask1=mask1, mask2=mask2)
    without = slice(None) if 0 in (N1, N2) else [0, 2]
    assert bool((lse[without] == float("-inf")).all())
    for tensor in (out, offset, factor):
        assert torch.equal(tensor[without], torch.zeros_like(tensor[without]))
    assert 0 in (N1, N2) or bool((out[1] != 0).any())


@pytest.mark.parametrize("logit", [1e-3, 100.0])
def test_extreme_logits(emulated, logit):
    """Where rounding a logit moves whole weights, the largest error is one of chance: the mean one is compared."""
    tensors = pair_inputs(1, 2, 17, 33, 65, 16, 16, torch.bfloat16, logit)
    exact_out, _ = exact(tensors)
    results = run(tensors)[0], plain_pair_attention(*tensors, scale=0.25, interaction="product")[0]
    error, allowed = ((out.double() - exact_out).abs().mean().item() for out in results)
    assert error <= 1.5 * allowed + torch.finfo(torch.bfloat16).eps * exact_out.abs().mean().item()


@pytest.mark.parametrize("index", range(5))
def test_non_finite_input_does_not_vanish_unless_it_is_hidden(emulated, index):
    tensors = pair_inputs(1, 1, 4, 5, 6, 16, 16, torch.bfloat16)
    tensors[index][0, 0, 1] = float("nan")
    assert not run(tensors)[0].isfinite().all()
    if index > 0:
        mask = torch.arange(tensors[index].shape[2])[None] != 1
        assert run(tensors, **{"mask1" if index < 3 else "mask2": mask})[0].isfinite().all()


def test_strided_and_misaligned_inputs(emulated):
    """Slices of projections [B, N, 3, H, d] whose other parts are NaN; then rows that begin anywhere."""
    values = pair_inputs(2, 2, 21, 17, 35, dtype=torch.bfloat16)
    packed = [torch.full((2, n, 3, 4, 16), float("nan"), dtype=torch.bfloat16) for n in (21, 17, 35)]
    views = [packed[i][:, :, part].transpose(1, 2)[:, 1:3] for i, part in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))]
    misaligned = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x) for x in values]
    for given in (views, misaligned):
        for x, value in zip(given, values, strict=True):
            x.copy_(value)
        assert torch.equal(run(given)[0], run(values)[0])


def test_every_element_is_written_and_none_beside_them(emulated):
    """The output lies in the middle of NaN, every second token and head of which is not its own."""
    tensors = pair_inputs(2, 3, 21, 5, 70, 16, 32, torch.bfloat16)
    memory = torch.full((4, 2 * 21 + 2, 2 * 3 + 2, 32), float("nan"), dtype=torch.bfloat16)
    out = memory[1:-1, 1:-1:2, 1:-1:2].transpose(1, 2)
    pair_native.forward_cuda(arguments(tensors), out, None, None)
    assert bool(out.isfinite().all())
    assert int(memory.isfinite().sum()) == out.numel()


def test_another_order_of_the_threads_gives_the_same_bits(emulated, monkeypatch):
    """A missing barrier would show: the threads of a block run backwards."""
    tensors, results = pair_inputs(1, 1, 21, 19, 70, 16, 16, torch.bfloat16), []
    for order in ("forwards", "backwards"):
        monkeypatch.setenv("AVF_EMULATION_ORDER", order)
        results.append(run(tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_entry_does_not_depend_on_the_batch(emulated):
    tensors = pair_inputs(3, 1, 16, 17, 70, dtype=torch.float16)
    for whole, alone in zip(run(tensors)[:2], run([t[1:2] for t in tensors])[:2], strict=True):
        assert torch.equal(whole[1:2], alone)


def test_an_error_code_becomes_an_exception(emulated):
    with pytest.raises(RuntimeError, match=r"avf_pair_forward failed: invalid argument \(1\)"):
        run(pair_inputs(dk=48, dtype=torch.bfloat16))
    tensors = pair_inputs(dtype=torch.bfloat16)
    out = torch.empty(tensors[0].numel() + 1, dtype=torch.bfloat16)[1:].view_as(tensors[0])
    with pytest.raises(RuntimeError, match="avf_pair_forward failed: misaligned address"):
        pair_native.forward_cuda(arguments(tensors), out, None, None)


class Fake:
    """A CUDA tensor, as far as why_not looks before it asks for the device."""

    def __init__(self, shape=(2, 3, 5, 16), dtype=torch.bfloat16):
        self.device, self.dtype, self.shape = torch.device("cuda"), dtype, shape


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({}, ("product", 0.1), "it computes products without dropout alone"),
        ({}, ("sum", 0.0), "it computes products without dropout alone"),
        ({"dtype": torch.float32}, ("product", 0.0), "it takes bfloat16 and float16, not torch.float32"),
        ({"shape": (2, 3, 5, 64)}, ("product", 0.0), "it takes widths of 16 and 32, not 64 and 64"),
        ({"shape": (1, 1, 2**31, 16)}, ("product", 0.0), "a side has more than 2^30 tokens"),
    ],
)
def test_why_not_says_what_it_cannot_do(change, options, reason):
    a = Pairs(*[Fake(**change)] * 5, None, None, None, 1.0, *options)
    assert pair_native.why_not_cuda(a) == reason


def test_on_a_cpu_why_not_names_the_device():
    a = arguments(pair_inputs(dtype=torch.bfloat16))
    assert pair.WHY_NOT["cuda"](a) == "the tensors are on cpu, not on a CUDA device"


def test_a_missing_broken_or_foreign_library_is_explained(library, monkeypatch, tmp_path):
    path = tmp_path / "libavfkernels_cuda.so"
    assert "libavfkernels_cuda.so was not built: it needs nvcc" in native._open(path, "nvcc")[1]
    path.write_bytes(b"not a library")
    library_, reason = native._open(path, "nvcc")
    assert library_ is None
    assert "libavfkernels_cuda.so does not load" in reason
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    assert "this package 999" in native._open(Path(library._name), "nvcc")[1]
    monkeypatch.setattr(native, "_cuda_library", None)
    monkeypatch.setattr(native, "_cuda_reason", reason)
    with pytest.raises(RuntimeError, match="does not load"):
        native.cuda_library()


@pytest.fixture(scope="module")
def usage():
    """Of the library that the install built."""
    if reason := codegen_cuda.why_not():
        pytest.skip(reason)
    return codegen_cuda.usage()


def test_the_installed_library_loads_without_a_gpu(usage):
    assert native.why_cuda_unavailable() is None


def test_every_kernel_is_there_for_every_architecture_without_spills(usage):
    kernels, archs = {row["kernel"] for row in usage}, {row["arch"] for row in usage}
    assert len(kernels) == 2 * 4  # dtypes, widths
    assert len(usage) == len(kernels) * len(archs)
    assert [row for row in usage if row["spills"] or row["registers"] > 255] == []
    assert max(row["shared memory"] for row in usage) <= 48 * 1024  # what every GPU gives without being asked


def test_every_kernel_is_made_of_tensor_core_instructions(usage):
    """On the oldest architecture; `python -m bench.codegen` counts them on all."""
    found = codegen_cuda.instructions(usage[0]["arch"])
    assert found.keys() == {row["kernel"] for row in usage}
    for name, counts in found.items():
        dk, dv = map(int, name.split()[2].split("/"))
        # 4 tiles of 8 tokens need dk / 16 instructions each, 2 tiles of 16 need dv / 8
        assert counts["mma instructions"] >= 4 * dk // 16 + 2 * dv // 8, name
        assert counts["transposes"] > 0, name
