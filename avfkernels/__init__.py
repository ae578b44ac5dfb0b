"""Exact, fused attention over pairwise interactions of two token streams.

Ops: `pair_attention`, `latent_attention`, `prefix_attention`; `merge_attention` joins partial results of any of them,
and `split_linear` applies the parts of a packed weight.
Modules: `TokenFusion`, `DenseFusion`, `FactorizedFusion`; `accelerate` puts them into a model of the authors' release.
`python -m avfkernels` shows what runs on this machine and why; `backend(name)` overrides the choice.
"""

import warnings
from importlib.metadata import PackageNotFoundError, version

with warnings.catch_warnings():  # of torch, where NumPy is not installed: nothing here needs it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401

from avfkernels import _ops  # noqa: F401  registers torch.ops.avfkernels
from avfkernels._backends import backend, materialises
from avfkernels.accelerate import accelerate
from avfkernels.latent_attention import latent_attention
from avfkernels.merge import merge_attention
from avfkernels.nn import DenseFusion, FactorizedFusion, TokenFusion
from avfkernels.pair_attention import pair_attention
from avfkernels.prefix_attention import prefix_attention
from avfkernels.split_linear import split_linear

try:
    __version__ = version("avfusion")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

__all__ = [
    "DenseFusion",
    "FactorizedFusion",
    "TokenFusion",
    "accelerate",
    "backend",
    "latent_attention",
    "materialises",
    "merge_attention",
    "pair_attention",
    "prefix_attention",
    "split_linear",
]
