"""What a type checker knows of the public names: `mypy` reads this file, nothing runs it."""

from typing import assert_type

from torch import Tensor

import avfkernels
import avfusion
from avfusion import DeepAVFusion, EncoderConfig, Features, embed_clips, load_encoder

model = load_encoder("synth-small")
assert_type(model, DeepAVFusion)
assert_type(model.config, EncoderConfig)
assert_type(DeepAVFusion(EncoderConfig(fusion="dense")), DeepAVFusion)
assert_type(embed_clips(model, ["clip.mp4"]), Features)
assert_type(avfusion.__version__, str)
assert_type(avfkernels.DenseFusion(dim=768, num_heads=12), avfkernels.DenseFusion)


def attend(q: Tensor, k: Tensor) -> None:
    assert_type(avfkernels.pair_attention(q, k, k, k, k, scale=1.0), Tensor | tuple[Tensor, Tensor])
