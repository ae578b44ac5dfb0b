"""The CUDA kernels without a GPU: their source run on the CPU (cuda_emulation.h), and what nvcc makes of it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import assert_accurate, pair_inputs, plain_pair_attention
from torch.library import opcheck

import avfkernels
from avfkernels import _native, pair_attention
from avfkernels.pair_attention import cuda
from bench import codegen_cuda

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
pytestmark = pytest.mark.long  # the emulation takes a quarter of a minute to compile
NAMES = ("q", "k1", "v1", "k2", "v2")
DTYPES = (torch.bfloat16, torch.float16)
INTERACTIONS = ("sum", "product")


class NoGuard:
    """In place of a device guard and a stream."""

    def __init__(self, device):
        assert device.type == "cpu"

    def __enter__(self):
        return 0

    def __exit__(self, *error):
        pass


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/*.cu as a C++ compiler sees them: the kernels as they are, a warp as 32 fibers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("emulation")
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
    objects, jobs = [], []
    for source in CSRC.glob("*.cu"):
        objects.append(folder / f"{source.stem}.o")
        command = [compiler, *flags, f"-I{HERE}", "-x", "c++", "-c", source, "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, messages = job.communicate()
        assert job.returncode == 0, messages
    subprocess.run([compiler, "-shared", *objects, "-o", folder / "emulated.so"], check=True)
    library = ctypes.CDLL(str(folder / "emulated.so"))
    library.avf_cuda_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def registered():
    """The op on CPU tensors."""
    fragment = torch.library.Library("avfkernels", "IMPL")
    fragment.impl("pair_attention_cuda", cuda.kernel, "CPU")
    fragment.impl("pair_attention_cuda_backward", cuda.backward_kernel, "CPU")
    yield
    fragment._destroy()


@pytest.fixture
def emulated(library, registered, monkeypatch):
    monkeypatch.setattr(_native, "_load_cuda", lambda: (library, None))
    monkeypatch.setattr(cuda, "_on", NoGuard)


def run(tensors, interaction="sum", mask1=None, mask2=None, return_lse=True, scale=0.25):
    return cuda.forward(
        *tensors, scale=scale, interaction=interaction, mask1=mask1, mask2=mask2, dropout_p=0.0, seed=None,
        return_lse=return_lse,
    )  # fmt: skip


def exact(tensors, **options):
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    with avfkernels.backend("reference"):
        return pair_attention(*doubles, scale=0.25, return_lse=True, **options), doubles


def masks_for(B, N1, N2):
    g = torch.Generator().manual_seed(3)
    masks = [torch.rand(B, n, generator=g) > 0.4 for n in (N1, N2)]
    for mask in masks:
        mask[:, 0] = True
    return dict(zip(("mask1", "mask2"), masks, strict=True))


# B, H, F, N1, N2, dk, dv: one query and many, one token and many, odd numbers, every width, more tokens than the warps
# of a block take at once (for products: more of the first set than there are warps, and of the second than a step).
SMALL = [(2, 2, 16, 19, 49, 16, 16), (2, 8, 3, 1, 1, 16, 16), (1, 1, 5, 8, 8, 16, 64)]
WIDTHS = [(1, 1, 17, 9, 35, dk, dv) for dk in cuda.WIDTHS for dv in cuda.WIDTHS]
SHAPES = {
    "sum": [*SMALL, (2, 1, 21, 33, 130, 16, 64), (1, 2, 16, 130, 7, 32, 64), (1, 1, 33, 65, 40, 64, 32),
            (1, 1, 3, 290, 70, 16, 16), *WIDTHS],
    "product": [*SMALL, (1, 1, 21, 9, 70, 16, 64), (1, 2, 16, 37, 7, 32, 64), (1, 1, 33, 9, 40, 64, 32), *WIDTHS],
}  # fmt: skip
# Each shape with both dtypes and both with and without masks; the four combinations by turns.
CASES = [
    (interaction, shape, dtype, (index + turn) % 2 == 1)
    for interaction, shapes in SHAPES.items()
    for index, shape in enumerate(shapes)
    for turn, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("interaction", "shape", "dtype", "masked"), CASES, ids=str)
def test_error_is_that_of_the_plain_formula(emulated, shape, interaction, dtype, masked):
    B, H, F, N1, N2, _, dv = shape
    tensors = pair_inputs(*shape, dtype=dtype, logit=2.0, grad=True)
    options = {"interaction": interaction} | (masks_for(B, N1, N2) if masked else {})
    (out, lse), (exact_out, exact_lse), doubles = run(tensors, **options), *exact(tensors, **options)
    plain_out, plain_lse = plain_pair_attention(*tensors, scale=0.25, **options)
    assert_accurate(out, exact_out, plain_out, "out")
    assert_accurate(lse, exact_lse, plain_lse, "lse")
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(B, H, F, dv, generator=g).to(dtype), torch.randn(B, H, F, generator=g)]
    exact_grads = torch.autograd.grad([exact_out, exact_lse], doubles, [t.double() for t in upstream])
    plain_grads = torch.autograd.grad([plain_out, plain_lse], tensors, upstream)
    grads = torch.autograd.grad([out, lse], tensors, upstream)
    for name, *triple in zip(NAMES, grads, exact_grads, plain_grads, strict=True):
        assert_accurate(*triple, f"gradient of {name}")


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize(("N1", "N2"), [(0, 9), (9, 0), (0, 0), (9, 40)])
def test_without_a_pair_the_output_is_zero_with_zero_gradients(emulated, interaction, N1, N2):
    tensors = pair_inputs(3, 2, 5, N1, N2, dtype=torch.bfloat16, grad=True)
    mask1, mask2 = torch.ones(3, N1, dtype=torch.bool), torch.ones(3, N2, dtype=torch.bool)
    mask1[0], mask2[2] = False, False
    out, lse = run(tensors, interaction, mask1, mask2)
    grads = torch.autograd.grad(out.float().sum(), tensors)
    without = slice(None) if 0 in (N1, N2) else [0, 2]
    assert bool((lse[without] == float("-inf")).all())
    for tensor in (out, *grads):
        assert torch.equal(tensor[without], torch.zeros_like(tensor[without]))
        assert 0 in (N1, N2) or bool((tensor[1] != 0).any())


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("logit", [1e-3, 100.0])
def test_extreme_logits(emulated, interaction, logit):
    """Where rounding a logit moves whole weights, the largest error is one of chance: the mean one is compared."""
    tensors = pair_inputs(1, 2, 17, 33, 65, 16, 16, torch.bfloat16, logit)
    (exact_out, _), _ = exact(tensors, interaction=interaction)
    results = (
        run(tensors, interaction)[0], plain_pair_attention(*tensors, scale=0.25, interaction=interaction)[0]
    )  # fmt: skip
    error, allowed = ((out.double() - exact_out).abs().mean().item() for out in results)
    assert error <= 1.5 * allowed + torch.finfo(torch.bfloat16).eps * exact_out.abs().mean().item()


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("index", range(5))
def test_non_finite_input_does_not_vanish(emulated, interaction, index):
    tensors = pair_inputs(1, 1, 4, 5, 6, 16, 16, torch.bfloat16)
    tensors[index][0, 0, 1] = float("nan")
    assert not run(tensors, interaction)[0].isfinite().all()


def packed_views(dtype):
    """q, k1, v1, k2, v2 as slices of projections [B, N, 3, H, d]; what is not theirs is NaN."""
    packed = [torch.full((2, n, 3, 4, 16), float("nan"), dtype=dtype) for n in (21, 17, 35)]
    views = [packed[i][:, :, part].transpose(1, 2)[:, 1:3] for i, part in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))]
    for view, values in zip(views, pair_inputs(2, 2, 21, 17, 35, dtype=dtype), strict=True):
        view.copy_(values)
    return views


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_strided_inputs_and_an_expanded_gradient(emulated, interaction):
    views = [view.requires_grad_() for view in packed_views(torch.bfloat16)]
    copies = [view.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for view in views]
    out, copied = run(views, interaction)[0], run(copies, interaction)[0]
    assert torch.equal(out, copied)
    # sum() hands back a gradient all of whose strides are 0
    grads, expected = torch.autograd.grad(out.sum(), views), torch.autograd.grad(copied.sum(), copies)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_every_element_is_written_and_none_beside_them(emulated, monkeypatch, interaction):
    """Outputs and gradients lie in the middle of NaN, every second token and head of which is not theirs."""
    made = []

    def surrounded(tensor, width):
        B, H, N, _ = tensor.shape
        memory = tensor.new_full((B + 2, 2 * N + 2, 2 * H + 2, width), float("nan"))
        view = memory[1:-1, 1:-1:2, 1:-1:2].transpose(1, 2)
        made.append((memory, view))
        return view

    monkeypatch.setattr(cuda, "_like", surrounded)
    tensors = pair_inputs(2, 3, 21, 5, 70, 16, 64, torch.bfloat16)
    out, lse, saved = cuda.kernel(*tensors, 0.25, interaction, None, None, True, True)
    cuda.backward_kernel(out, lse, *tensors, saved, 0.25, interaction, None, None)
    assert len(made) == 6
    for memory, view in made:
        assert bool(view.isfinite().all())
        assert int(memory.isfinite().sum()) == view.numel()


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_another_order_of_the_threads_gives_the_same_bits(emulated, monkeypatch, interaction):
    """A missing barrier would show: the threads of a block run backwards."""
    N1, N2 = (290, 70) if interaction == "sum" else (19, 70)
    tensors = pair_inputs(1, 1, 21, N1, N2, 16, 16, torch.bfloat16, grad=True)
    results = []
    for order in ("forwards", "backwards"):
        monkeypatch.setenv("AVF_EMULATION_ORDER", order)
        out, lse = run(tensors, interaction)
        results.append((out, lse, *torch.autograd.grad(out.sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_a_batch_entry_does_not_depend_on_the_batch(emulated, interaction):
    tensors = pair_inputs(3, 1, 16, 17, 70, dtype=torch.float16, grad=True)
    results = []
    for part in (tensors, [t[1:2] for t in tensors]):
        out, lse = run(part, interaction)
        results.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), part)))
    assert all(torch.equal(a[1:2], b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_gradients_of_lse_alone(emulated, interaction):
    tensors = pair_inputs(dtype=torch.float16, grad=True)
    grads = torch.autograd.grad(run(tensors, interaction)[1].sin().sum(), tensors)
    (_, exact_lse), doubles = exact(tensors, interaction=interaction)
    plain_lse = plain_pair_attention(*tensors, scale=0.25, interaction=interaction)[1]
    of_keys = [0, 1, 3]
    expected, plain = (
        torch.autograd.grad(lse.sin().sum(), [inputs[i] for i in of_keys])
        for lse, inputs in ((exact_lse, doubles), (plain_lse, tensors))
    )
    for i, *triple in zip(of_keys, [grads[i] for i in of_keys], expected, plain, strict=True):
        assert_accurate(*triple, NAMES[i])
    assert not grads[2].any()
    assert not grads[4].any()


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(emulated, masked, interaction):
    masks = masks_for(2, 9, 14).values() if masked else (None, None)
    tensors = pair_inputs(dtype=torch.bfloat16, grad=True)
    opcheck(torch.ops.avfkernels.pair_attention_cuda.default, (*tensors, 0.25, interaction, *masks, True, True))
    tensors = [t.detach() for t in tensors]
    out, lse, saved = torch.ops.avfkernels.pair_attention_cuda(*tensors, 0.25, interaction, *masks, True, True)
    arguments = (out, lse, *tensors, saved, 0.25, interaction, *masks)
    opcheck(torch.ops.avfkernels.pair_attention_cuda_backward.default, arguments)


def test_an_error_code_becomes_an_exception(emulated):
    with pytest.raises(RuntimeError, match=r"avf_cuda_pair_attention_forward failed: invalid argument \(1\)"):
        run(pair_inputs(dk=48, dtype=torch.bfloat16))
    tensors = pair_inputs(dtype=torch.bfloat16)
    tensors[1] = torch.empty(tensors[1].numel() + 1, dtype=torch.bfloat16)[1:].view_as(tensors[1])
    with pytest.raises(RuntimeError, match="avf_cuda_pair_attention_forward failed: misaligned address"):
        run(tensors)


class Fake:
    """A CUDA tensor, as far as why_not looks before it asks for the device."""

    def __init__(self, shape=(2, 3, 5, 16), dtype=torch.bfloat16, stride=None, offset=0, requires_grad=False):
        self.device, self.dtype, self.shape, self.requires_grad = torch.device("cuda"), dtype, shape, requires_grad
        self._stride, self._offset = stride or torch.empty(shape, device="meta").stride(), offset

    def stride(self, dim=None):
        return self._stride if dim is None else self._stride[dim]

    def storage_offset(self):
        return self._offset


@pytest.mark.parametrize(
    ("k1", "options", "reason"),
    [
        ({}, {"dropout_p": 0.1}, "it has no dropout"),
        ({"stride": (240, 80, 1, 5)}, {}, r"k1 has a last stride of 5, not 1"),
        ({"stride": (252, 84, 17, 1)}, {}, r"the rows of k1 \(strides \(252, 84, 17, 1\)\) do not begin at multiples"),
        ({"offset": 4}, {}, "the rows of k1 .* do not begin at multiples of 16 bytes"),
    ],
)
def test_why_not_says_what_it_cannot_do(k1, options, reason):
    arguments = {name: Fake() for name in NAMES} | {"k1": Fake(**k1), "interaction": "sum", "dropout_p": 0.0} | options
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(cuda.why_not(**arguments))


def test_why_not_names_the_dtype_the_width_and_the_device():
    options = {"interaction": "sum", "dropout_p": 0.0}
    for change, reason in (
        ({"dtype": torch.float32}, "it takes bfloat16 and float16, not torch.float32"),
        ({"shape": (2, 3, 5, 24)}, "it takes widths of 16, 32 and 64, not 24 and 24"),
    ):
        assert cuda.why_not(**{name: Fake(**change) for name in NAMES}, **options) == reason
    tensors = dict(zip(NAMES, pair_inputs(dtype=torch.bfloat16), strict=True))
    assert cuda.why_not(**tensors, **options) == "the tensors are on cpu, not on a CUDA device"


def test_a_missing_broken_or_foreign_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "CUDA_PATH", tmp_path / "libavfkernels_cuda.so")
    load = _native._load_cuda.__wrapped__
    assert "libavfkernels_cuda.so was not built: it needs nvcc" in load()[1]
    _native.CUDA_PATH.write_bytes(b"not a library")
    assert "libavfkernels_cuda.so does not load" in load()[1]
    monkeypatch.setattr(_native, "_load_cuda", load)
    with pytest.raises(RuntimeError, match="does not load"):
        _native.cuda_library()


def test_a_library_of_another_abi_is_refused(library, monkeypatch):
    monkeypatch.setattr(_native, "CUDA_PATH", Path(library._name))
    monkeypatch.setattr(_native, "CUDA_ABI_VERSION", 999)
    assert "ABI version 2, this package 999" in _native._load_cuda.__wrapped__()[1]


@pytest.fixture(scope="module")
def usage():
    """Of the library that the install built."""
    if reason := codegen_cuda.why_not():
        pytest.skip(reason)
    return codegen_cuda.usage()


def test_the_installed_library_loads_without_a_gpu(usage):
    assert _native.why_cuda_unavailable() is None


def test_every_kernel_is_there_for_every_architecture_without_spills(usage):
    kernels, archs = {row["kernel"] for row in usage}, {row["arch"] for row in usage}
    assert len(kernels) == 2 * (6 * 9 + 3)  # dtypes, kernels, widths; the merge of products has one width
    assert len(usage) == len(kernels) * len(archs)
    assert [row for row in usage if row["spills"] or row["registers"] > 255] == []
    assert max(row["shared memory"] for row in usage) <= 48 * 1024  # what every GPU gives without being asked


def test_every_kernel_is_made_of_tensor_core_instructions(usage):
    """On the oldest architecture; `python -m bench.codegen` counts them on all."""
    found = codegen_cuda.instructions(usage[0]["arch"])
    assert found.keys() == {row["kernel"] for row in usage}
    for name, counts in found.items():
        kernel, _, widths = name.split()
        if kernel == "pair_product_merge":
            continue  # it adds
        dk, dv = map(int, widths.split("/"))
        if kernel.endswith("_forward"):  # 4 tiles of 8 tokens need dk / 16 instructions each, 2 tiles of 16 need dv / 8
            fewest = 4 * dk // 16 + 2 * dv // 8
        else:  # p and dp of 2 tiles of 8 queries, and gradients of as many columns
            fewest = 2 * (dk + dv) // 16 + (0 if kernel == "pair_product_delta" else (dk + dv) // 8)
        assert counts["mma instructions"] >= fewest, name
        assert counts["transposes"] > 0 or kernel == "pair_product_delta", name
