"""What the Triton kernels compile to for each architecture, without a GPU, and that the committed table is fresh.

An ordinary run compiles every kernel at one small shape for Hopper (`codegen.cases(every=False)`, seconds) and reads
the committed table for the others, which its fingerprint ties to the sources; `-m slow` compiles the whole table.
"""

import os
import re

import pytest
import torch

import avfkernels
from avfkernels import pair_attention

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from bench import codegen  # noqa: E402

EXPECTED = {80: {"mma.sync"}, 90: {"mma.sync", "wgmma.mma_async"}, 100: {"mma.sync", "tcgen05.mma"}}
WITHOUT_PRODUCTS = ": merge"  # it rescales and adds


@pytest.fixture(scope="module")
def rows():
    return codegen.triton_rows(every=False, architectures=(90,))


def check(rows):
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    for row in rows:
        arch = int(row["arch"][3:])
        assert int(row["spills"]) == 0, row
        assert int(row["shared memory"]) <= codegen.SHARED_MEMORY[arch], row
        instructions = set(filter(None, row["tensor cores"].split(", ")))
        if row["kernel"].endswith(WITHOUT_PRODUCTS):
            assert not instructions, row
        else:
            assert instructions, row
            assert instructions <= EXPECTED[arch], row


def test_every_kernel_uses_tensor_cores_and_fits_without_spills(rows):
    assert {row["function"] for row in rows} == codegen.entry_kernels()
    check(rows)


def test_every_row_of_the_committed_table_uses_tensor_cores_and_fits_without_spills():
    _, _, committed = codegen.committed()
    check(committed)
    assert {row["arch"] for row in committed} == {"sm_80", "sm_90", "sm_100"}
    shapes = {(what, shape) for what, shape, _ in codegen.cases()}
    assert {(row["kernel"].split(":")[0], row["shape"]) for row in committed} == shapes


def skip_unless_of_this_version(version):
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, installed is {triton.__version__}")


def test_the_committed_table_is_fresh(rows):
    version, sources, committed = codegen.committed()
    assert sources == codegen.sources(), "run `python -m bench.codegen`"
    skip_unless_of_this_version(version)
    for row in rows:
        assert {column: str(row[column]) for column in codegen.COLUMNS} in committed, "run `python -m bench.codegen`"


@pytest.mark.slow
def test_the_committed_table_is_what_every_case_compiles_to():
    version, _, committed = codegen.committed()
    skip_unless_of_this_version(version)
    got = codegen.triton_rows()
    check(got)
    assert codegen.table(got) == codegen.table(committed), "run `python -m bench.codegen`"


def test_the_section_of_cuda_says_why_there_is_none(monkeypatch):
    from bench import codegen_cuda

    monkeypatch.setattr(codegen, "triton_rows", list)
    monkeypatch.setattr(codegen_cuda, "why_not", lambda: "nvcc is not on PATH")
    assert re.search(r"## CUDA\n\nNot compiled: nvcc is not on PATH.\n$", codegen.markdown())


@pytest.fixture
def launched(monkeypatch):
    """What reaches the GPU's driver, of which there is none: (compiled kernel, grid, arguments) of each launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from avfkernels.ops import pair, pair_launch

    class NoDriver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: "a device of this test")
        get_current_stream = staticmethod(lambda device: 0)

    calls = []

    def init(kernel):
        kernel.module = kernel.function = kernel
        kernel._run = lambda *args: calls.append((args[4], args[:3], args[9:]))

    monkeypatch.setattr(CompiledKernel, "_init_handles", init)
    monkeypatch.setattr(pair_launch, "_compiled", {})
    monkeypatch.setitem(pair.WHY_NOT, "triton", lambda a: None)
    driver.set_active(NoDriver())
    return calls


def test_a_second_launch_is_the_first_without_triton_looking_at_its_arguments(launched, monkeypatch):
    tensors = [torch.randn(2, n, 3, 16).transpose(1, 2) for n in (16, 20, 20, 30, 30)]

    def run(tensors, **options):
        launched.clear()
        with avfkernels.backend("triton"):
            pair_attention(*tensors, **{"scale": 1} | options)
        return list(launched)

    def pointers(arguments):
        return [x.shape if isinstance(x, torch.Tensor) else x for x in arguments if not isinstance(x, tuple)]

    ((kernel, grid, arguments),) = run(tensors)
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.jit.JITFunction, "run", None)  # it would be called
        ((again, grid_again, arguments_again),) = run(tensors)
        assert (again, grid_again, pointers(arguments_again)) == (kernel, grid, pointers(arguments))
        ((other, _, arguments_other),) = run(tensors, scale=0.25)
        assert other == kernel  # of an int 1 Triton would have made a constant, and kept it
        assert [x for x in (*arguments, *arguments_other) if isinstance(x, float)] == [1.0, 0.25]
        ((fewer, fewer_grid, _),) = run([t[:1] for t in tensors])  # sizes are not specialised on
        assert (fewer, fewer_grid[0]) == (kernel, grid[0] // 2)
    shifted = torch.empty(tensors[1].numel() + 1)[1:].view(2, 20, 3, 16).transpose(1, 2)
    mask = torch.ones(2, 20, dtype=torch.bool)
    changes = [run([tensors[0], shifted, *tensors[2:]]), run(tensors, mask1=mask), run([t.half() for t in tensors]),
               run([t.contiguous() for t in tensors])]  # fmt: skip
    kernels = [kernel, *(calls[0][0] for calls in changes)]
    assert len(set(map(id, kernels))) >= 4  # alignment, a mask, a dtype; strides that divide alike share a kernel
