"""What the Triton kernels compile to for each architecture, without a GPU, and that the committed table is fresh."""

import os
import re

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from bench import codegen  # noqa: E402

# The gradient of x holds a whole row of up to 1024 numbers; it spills some, and is known to.
SPILLS = {"latent: backward_x"}
EXPECTED = {80: {"mma.sync"}, 90: {"mma.sync", "wgmma.mma_async"}, 100: {"mma.sync", "tcgen05.mma"}}


@pytest.fixture(scope="module")
def rows():
    return codegen.triton_rows(every=False)


def test_every_kernel_uses_tensor_cores_and_fits(rows):
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        arch = int(row["arch"][3:])
        assert set(row["tensor cores"].split(", ")) & EXPECTED[arch], row
        assert row["shared memory"] <= codegen.SHARED_MEMORY[arch], row
        assert row["spills"] == 0 or row["kernel"] in SPILLS, row


def test_the_committed_table_is_fresh(rows):
    text = codegen.PATH.read_text()
    version = re.search(r"## Triton (\S+)", text)[1]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, installed is {triton.__version__}")
    assert f"Sources: {codegen.sources()}" in text, "run `python -m bench.codegen`"
    for line in codegen.table(rows).splitlines():
        assert line in text, "run `python -m bench.codegen`"
