"""Exact, fused attention over pairwise interactions of two token streams.

Ops: `pair_attention`, `latent_attention`; `merge_attention` joins partial results of any of them,
and `split_linear` applies the parts of a packed weight.
Modules: `TokenFusion`, `DenseFusion`, `FactorizedFusion`; `accelerate` puts them into a model of the authors' release.
`python -m avfkernels` shows what runs on this machine and why; `backend(name)` overrides the choice.
"""

import warnings
from importlib.metadata import PackageNotFoundError, version

with warnings.catch_warnings():  # of torch, where NumPy is not installed: nothing here needs it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401

from avfkernels.capture import CLIPS, Captured, pays, record
from avfkernels.choice import backend, materialises, multiplies_bf16
from avfkernels.convert import accelerate
from avfkernels.fold import weights_changed
from avfkernels.layer import early_fusion, read_prefix, run_block
from avfkernels.modules import DenseFusion, FactorizedFusion, TokenFusion
from avfkernels.ops.latent import latent_attention
from avfkernels.ops.linear import split_linear
from avfkernels.ops.merge import merge_attention
from avfkernels.ops.pair import pair_attention

try:
    __version__ = version("avfusion")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

__all__ = [
    "CLIPS",
    "Captured",
    "DenseFusion",
    "FactorizedFusion",
    "TokenFusion",
    "accelerate",
    "backend",
    "early_fusion",
    "latent_attention",
    "materialises",
    "merge_attention",
    "multiplies_bf16",
    "pair_attention",
    "pays",
    "read_prefix",
    "record",
    "run_block",
    "split_linear",
    "weights_changed",
]
