"""On a GPU: how many kernels one forward pass launches, counted by torch.profiler."""

import pytest
import torch
from test_gpu import BACKENDS, inputs, masks_for, pytestmark, run, skip_unless_it_runs  # noqa: F401

import avfkernels


def launches(call) -> int:
    """Kernels that a call launches, once it has compiled what it needs; copies and fills by the driver do not count."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def skip_unless_launches_are_seen():
    zero = torch.zeros(1, device="cuda")
    if launches(lambda: zero + 1) != 1:
        pytest.skip("torch.profiler sees no kernels here: CUPTI is missing or not permitted")


@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_pairs_are_one_launch(masked):
    tensors, options = inputs(64, 12, 16, 96, 196), masks_for(64, 96, 196) if masked else {}
    skip_unless_it_runs("triton", tensors, **options)
    skip_unless_launches_are_seen()
    assert launches(lambda: run("triton", tensors, **options)) == 1


@pytest.mark.parametrize("block", [avfkernels.DenseFusion, avfkernels.FactorizedFusion], ids=lambda b: b.__name__)
def test_a_fusion_block_launches_no_more_kernels_than_in_eager(block):
    """Prints the counts too: `-s` shows them."""
    skip_unless_launches_are_seen()
    module = block(768, 12).to("cuda", torch.bfloat16).eval()
    fusion_tokens = 32 if block is avfkernels.FactorizedFusion else 16
    tokens = [torch.randn(8, n, 768, device="cuda", dtype=torch.bfloat16) for n in (fusion_tokens, 196, 96)]
    counts = {}
    for backend in ("reference", *BACKENDS, None):
        with avfkernels.backend(backend), torch.no_grad():
            try:
                counts[backend or "automatic"] = launches(lambda: module(*tokens))
            except RuntimeError as error:
                print(f"\nlaunches of {block.__name__}, {backend}: {error}")
    print(f"\nlaunches of one forward of {block.__name__}: {counts}")
    assert all(0 < counts[name] <= counts["eager"] for name in counts if name != "reference")
