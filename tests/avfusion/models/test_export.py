"""The whole encoder in torch.export and ONNX, with dynamic batches and, masked, dynamic numbers of patches."""

import pytest
import torch
from exporting import check, check_onnx

from avfusion import DeepAVFusion, EncoderConfig

B = torch.export.Dim("B")
pytestmark = pytest.mark.filterwarnings("ignore")


def build(fusion, **options):
    torch.manual_seed(0)
    return DeepAVFusion(EncoderConfig(fusion=fusion, **options)).eval()


def batch(size, image=None, audio=None):
    """Clips, and with numbers of patches also which of them are visible."""
    g = torch.Generator().manual_seed(0)
    clips = torch.randn(size, 3, 224, 224, generator=g), torch.randn(size, 1, 128, 192, generator=g)
    kept = [torch.rand(size, n, generator=g).argsort(1)[:, :keep] for n, keep in ((196, image), (96, audio)) if keep]
    return *clips, *kept


SMALL = {"dim": 96, "num_heads": 6, "depth": 2}


@pytest.mark.parametrize("fusion", ["dense", "factorized", "token", "none"])
def test_export_with_a_dynamic_batch_and_dynamic_patches(fusion):
    model = build(fusion, **SMALL)
    program = torch.export.export(model, batch(2), dynamic_shapes=({0: B}, {0: B}))
    assert "avfkernels" not in program.graph_module.code
    check(program.module(), model, batch(2), batch(5))
    kept = [torch.export.Dim(name, max=patches - 1) for name, patches in (("image", 196), ("audio", 96))]
    shapes = ({0: B}, {0: B}, {0: B, 1: kept[0]}, {0: B, 1: kept[1]})
    program = torch.export.export(model, batch(2, image=49, audio=19), dynamic_shapes=shapes)
    check(program.module(), model, batch(3, image=30, audio=40))


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("dense", 1), ("dense", 12), ("factorized", 12))]


@pytest.mark.parametrize(("fusion", "depth"), [("factorized", 1), *SLOW])
def test_onnx_at_the_papers_size(fusion, depth, tmp_path):
    check_onnx(tmp_path, build(fusion, depth=depth), ({0: B}, {0: B}), batch(2), batch(3))
