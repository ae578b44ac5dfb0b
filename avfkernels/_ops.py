"""The registration table: every op's schema, its backends, and what torch needs to trace and differentiate it.

`avfkernels::pair_attention`, `latent_attention` and `prefix_attention` are composite: their Python body picks a
backend and is traced through, so autograd, fake tensors, torch.compile and export need nothing else. A fused backend
is an op of its own behind them (`avfkernels::pair_attention_cpu`), with a fake and an autograd formula.
"""

from __future__ import annotations

import torch

from avfkernels import _backends
from avfkernels._autograd import gradients_by_formula
from avfkernels._backends import Backend
from avfkernels._checks import autocast_enabled, cast_for_autocast
from avfkernels.latent_attention import cpu as latent_cpu
from avfkernels.latent_attention import eager as latent_eager
from avfkernels.latent_attention import reference as latent_reference
from avfkernels.pair_attention import cpu as pair_cpu
from avfkernels.pair_attention import cuda as pair_cuda
from avfkernels.pair_attention import eager as pair_eager
from avfkernels.pair_attention import reference as pair_reference
from avfkernels.pair_attention import triton as pair_triton
from avfkernels.prefix_attention import eager as prefix_eager
from avfkernels.prefix_attention import reference as prefix_reference
from avfkernels.prefix_attention import triton as prefix_triton

SCHEMAS = {
    "pair_attention": (
        "(Tensor q, Tensor k1, Tensor v1, Tensor k2, Tensor v2, *, float scale, str interaction='sum', "
        "Tensor? mask1=None, Tensor? mask2=None, float dropout_p=0.0, Tensor? seed=None, bool return_lse=False, "
        "str backend='') "
        "-> (Tensor out, Tensor lse)"
    ),
    "latent_attention": (
        "(Tensor q, Tensor x, *, float scale, Tensor? mask=None, bool return_lse=False, str backend='') "
        "-> (Tensor out, Tensor lse)"
    ),
    "prefix_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor k_prefix, Tensor v_prefix, *, float scale, bool return_lse=False, "
        "str backend='') -> (Tensor out, Tensor lse)"
    ),
}

BACKENDS: dict[str, dict[str, Backend]] = {
    "pair_attention": {
        "reference": Backend(pair_reference.forward, pair_reference.why_not),
        "eager": Backend(pair_eager.forward, pair_eager.why_not),
        "cpu": Backend(pair_cpu.forward, pair_cpu.why_not, pair_cpu.is_faster),
        "triton": Backend(pair_triton.forward, pair_triton.why_not, pair_triton.is_faster),
        "cuda": Backend(pair_cuda.forward, pair_cuda.why_not, pair_cuda.is_faster),
    },
    "latent_attention": {
        "reference": Backend(latent_reference.forward, latent_reference.why_not),
        "eager": Backend(latent_eager.forward, latent_eager.why_not),
        "cpu": Backend(latent_cpu.forward, latent_cpu.why_not, latent_cpu.is_faster),
    },
    "prefix_attention": {
        "reference": Backend(prefix_reference.forward, prefix_reference.why_not),
        "eager": Backend(prefix_eager.forward, prefix_eager.why_not),
        "triton": Backend(prefix_triton.forward, prefix_triton.why_not, prefix_triton.is_faster),
    },
}

_library = torch.library.Library("avfkernels", "DEF")


def _run(op: str, arguments: dict, forced: str | None = None):
    """Runs an op on the backend of choice; under autocast, casts as torch's own attention does."""
    device = arguments["q"].device.type
    if not autocast_enabled(device):
        return _backends.select(op, BACKENDS[op], arguments, forced).forward(**arguments)
    arguments = dict(zip(arguments, cast_for_autocast(device, *arguments.values()), strict=True))
    with torch.autocast(device, enabled=False):
        return _backends.select(op, BACKENDS[op], arguments, forced).forward(**arguments)


def call(op: str, **arguments):
    """The registered op: as an op where a graph is made, and otherwise without the cost of the dispatcher.

    A graph holds the override: it is traced anew for another one, and caches of compiled graphs tell them apart.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.avfkernels, op)(**arguments, backend=_backends.forced() or "")
    return _run(op, arguments)


def _define(op: str, schema: str) -> None:
    defaults = {argument.name: argument.default_value for argument in torch._C.parse_schema(op + schema).arguments}

    def composite(*args, **kwargs):
        arguments = defaults | dict(zip(defaults, args, strict=False)) | kwargs
        return _run(op, arguments, forced=arguments.pop("backend"))

    _library.define(op + schema)
    _library.impl(op, composite, "CompositeImplicitAutograd")


def _define_opaque(schema: str, kernel, fake, key: str) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, key)
    torch.library.register_fake(f"avfkernels::{name}", fake, lib=_library)


def _define_fused(module, key: str) -> None:
    """A fused backend: two ops, forward and backward; `key` is their dispatch key.

    `module` holds SCHEMA, kernel, fake and the same three for BACKWARD, and joins them in setup_context and backward.
    Where a kernel's own gradients will not do, those of its `formula` take their place: (function, tensors), with
    function(*tensors) = out, lse in operators of PyTorch.
    """
    _define_opaque(module.SCHEMA, module.kernel, module.fake, key)
    _define_opaque(module.BACKWARD_SCHEMA, module.backward_kernel, module.backward_fake, key)
    name = module.SCHEMA.split("(")[0]

    def backward(ctx, *grads):
        if not torch.is_grad_enabled():
            return module.backward(ctx, *grads)
        function, tensors = module.formula(ctx)
        needed = ctx.needs_input_grad[: len(tensors)]
        found = gradients_by_formula(function, tensors, needed, grads[:2])
        return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

    torch.library.register_autograd(f"avfkernels::{name}", backward, setup_context=module.setup_context, lib=_library)


for _op, _schema in SCHEMAS.items():
    _define(_op, _schema)
_define_fused(pair_cpu, "CPU")
_define_opaque(pair_cpu.INFERENCE_SCHEMA, pair_cpu.inference_kernel, pair_cpu.inference_fake, "CPU")
_define_fused(pair_cuda, "CUDA")
for _module in (pair_triton, prefix_triton):
    _define_fused(_module, "CUDA")
