"""torch.export, ONNX and AOTInductor see through the modules: dynamic batches and token counts, operators of PyTorch
alone. The encoder has its own in tests/avfusion."""

import pytest
import torch
from exporting import check, check_onnx
from oracle import assert_accurate

from avfkernels import DenseFusion, FactorizedFusion, TokenFusion, pair_attention

BLOCKS = {TokenFusion: 16, DenseFusion: 16, FactorizedFusion: 32}
B, VISUAL, AUDIO = (torch.export.Dim(name) for name in ("B", "visual", "audio"))
SHAPES = ({0: B}, {0: B, 1: VISUAL}, {0: B, 1: AUDIO})
# ONNX opset coverage makes its exporter look at many functions, some deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


def tokens(batch, *counts, dim=64):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, n, dim, generator=g) for n in counts)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("block", [*BLOCKS, "product"])
def test_export_with_dynamic_batch_and_token_counts(block, strict):
    torch.manual_seed(0)
    model = DenseFusion(64, 4, interaction="product") if block == "product" else block(64, 4)
    fusion = BLOCKS.get(block, 16)
    first = tokens(2, fusion, 13, 7)
    program = torch.export.export(model.eval(), first, dynamic_shapes=SHAPES, strict=strict)
    assert "avfkernels" not in program.graph_module.code
    check(program.module(), model, first, tokens(3, fusion, 196, 96), tokens(5, fusion, 4, 3))


def test_export_with_masks():
    model, (f, v, a) = DenseFusion(64, 4).eval(), tokens(3, 16, 13, 7)
    masks = {"visual_mask": torch.arange(13).expand(3, 13) < 9, "audio_mask": torch.arange(7).expand(3, 7) < 5}
    shapes = dict(zip(("x_fusion", "x_visual", "x_audio"), SHAPES, strict=True))
    shapes |= {"visual_mask": {0: B, 1: VISUAL}, "audio_mask": {0: B, 1: AUDIO}}
    program = torch.export.export(model, (f, v, a), masks, dynamic_shapes=shapes)
    f, v, a = tokens(2, 16, 9, 11)
    masks = {"visual_mask": torch.arange(9).expand(2, 9) < 3, "audio_mask": torch.arange(11).expand(2, 11) < 6}
    check(lambda *x: program.module()(*x, **masks), lambda *x: model(*x, **masks), (f, v, a))


def test_dropped_pairs_are_exported_as_the_equation():
    class Dropped(torch.nn.Module):
        def forward(self, *tensors):
            return pair_attention(*tensors, scale=0.5, dropout_p=0.3, seed=torch.tensor(5))

    tensors = [torch.randn(2, 3, n, 8) for n in (4, 5, 5, 6, 6)]
    program = torch.export.export(Dropped(), tuple(tensors))
    got, expected = program.module()(*tensors), Dropped()(*tensors)
    assert_accurate(got, Dropped()(*(t.double() for t in tensors)), expected, times=3, roundings=4)


@pytest.mark.parametrize("block", BLOCKS)
def test_onnx_at_the_papers_size(block, tmp_path):
    torch.manual_seed(0)
    fusion = BLOCKS[block]
    batches = tokens(2, fusion, 196, 96, dim=768), tokens(3, fusion, 49, 19, dim=768)
    check_onnx(tmp_path, block(768, 12).eval(), SHAPES, *batches)


@pytest.mark.slow  # compiles C++
def test_aot_inductor_runs_the_exported_program(tmp_path):
    model = DenseFusion(64, 4).eval()
    program = torch.export.export(model, tokens(2, 16, 13, 7), dynamic_shapes=SHAPES)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    check(run, model, tokens(2, 16, 13, 7), tokens(3, 16, 40, 20))
