"""What the Triton kernels compile to for each architecture, without a GPU, and that the committed table is fresh.

An ordinary run compiles every kernel at one small shape for Hopper (`codegen.cases(every=False)`, seconds) and reads
the committed table for the others, which its fingerprint ties to the sources; `-m slow` compiles the whole table.
"""

import os
import re

import pytest

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
