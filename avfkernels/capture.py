"""An encoder compiled, and in inference recorded as CUDA graphs, once a shape is worth it.

A forward pass of this model is hundreds of small kernels, and a GPU waits for Python between them. A CUDA graph is all
of them by one call. It has fixed shapes and addresses, so that this is about when it may be used: a batch of another
size is padded, and a model that has changed is recorded anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from operator import is_

import torch
from torch import Tensor, nn

from avfkernels import fold, layer
from avfkernels.choice import forced, transformed
from avfkernels.ops.common import autocast_enabled

WARM_UP = 3  # passes before recording: libraries choose their kernels and allocate in the first
CLIPS = 200  # samples of one shape after which compiling, half a minute or less, pays
GRAPHS = 4  # shapes that are recorded; each keeps the memory of its activations


def pays(device: torch.device) -> bool:
    """Whether compiling and recording pays on a kind of device: on GPUs; a CPU does not wait for Python."""
    return device.type == "cuda"


def record(
    function: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Records what `function` does on a GPU: its outputs, and what runs it again and fills these outputs anew.

    It runs on a stream of its own from the first pass on: a node of autograd's graph belongs to the stream it was made
    on, and one that is alive from a pass on another stream cannot be recorded.
    """
    with torch.cuda.device(device):
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        current.wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a thread of a loader, which pins memory, is none of its business.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
    return outputs, graph.replay


class Snapshot:
    """What a recorded model was: its modules and their modes, without hooks; its tensors, and where they lie.

    Looked at before every replay, and so by loops in C: a third of a millisecond for the thousand tensors of a ViT-B.
    """

    def __init__(self, model: nn.Module):
        self.modules = list(model.modules())
        self.modes = [m.training for m in self.modules]
        self.hooks = _hooks(model)
        held = [
            (owner, name, value)
            for m in self.modules for owner in (m._parameters, m._buffers, m._modules)
            for name, value in owner.items() if value is not None
        ]  # fmt: skip
        self.owners, self.names, self.held = map(list, zip(*held, strict=True))
        self.tensors = [value for value in self.held if isinstance(value, Tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))

    def same(self) -> bool:
        """Whether the same modules, called in the same way, hold the same tensors in the same places."""
        return (
            not any(self.hooks)
            and all(map(is_, map(dict.get, self.owners, self.names), self.held))
            and [m.training for m in self.modules] == self.modes
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )


def _hooks(model: nn.Module) -> list[dict]:
    return [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]


class Captured:
    """Calls of `function(*tensors, compiled=...)` -> tensors, a forward pass of `model`: as it is, compiled, recorded.

    On a GPU, once `after` samples (200 by default) of its shapes have been seen, a call is compiled, and recorded if it
    is without gradients and the model in evaluation mode; until then it runs as it is. A batch that is no less than
    half of one that is recorded is padded, and not recorded itself. Weights that are written to, by an optimizer or
    `load_state_dict`, count from the next call on; what is written through `Tensor.data` is hidden from PyTorch, and
    needs a call of `weights_changed`. A failure to compile or record is reported once; from then on all runs as it is.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.seen: dict[tuple, int] = {}
        self.graphs: dict[tuple, _Graph] = {}
        self.trained: set[tuple] = set()

    def __reduce__(self):  # copies and files hold no graphs
        return Captured, ()

    def __call__(
        self, model: nn.Module, function: Callable, *tensors: Tensor, after: int | None = None
    ) -> tuple[Tensor, ...]:
        if not self._may(model, tensors):
            return function(*tensors, compiled=False)
        batch, key = tensors[0].shape[0], _key(tensors)
        name = batch, *key
        recorded = not torch.is_grad_enabled() and not model.training
        if recorded:
            sizes = [size for size, *rest in self.graphs if tuple(rest) == key and batch <= size <= 2 * batch]
            name = (min(sizes), *key) if sizes else name
        if name not in (self.graphs if recorded else self.trained):
            self.seen[name] = self.seen.get(name, 0) + batch
            full = recorded and (len(self.graphs) >= GRAPHS or any(_hooks(model)))
            if full or self.seen[name] < (CLIPS if after is None else after):
                return function(*tensors, compiled=False)
            try:
                if not recorded:
                    outputs = function(*tensors, compiled=True)
                    self.trained.add(name)
                    return outputs
                self.graphs[name] = _Graph(model, function, tensors)
            except Exception as error:  # whatever compilers and drivers raise
                self.failure = error
                warnings.warn(f"{type(model).__name__} runs uncompiled: {type(error).__name__}: {error}", stacklevel=2)
                return function(*tensors, compiled=False)
        if not recorded:
            return function(*tensors, compiled=True)
        outputs = self.graphs[name](tensors)
        if outputs is None:  # another model than was recorded: it has to prove that it stays
            self.graphs.clear()
            self.seen.clear()
            return function(*tensors, compiled=False)
        return outputs

    def _may(self, model: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
        device = tensors[0].device
        return (
            not torch.compiler.is_compiling()
            and self.failure is None
            and not getattr(model, "_is_replica", False)  # of nn.DataParallel, made anew for every call
            and pays(device)
            and not (forced() or transformed())
            and tensors[0].shape[0] > 0
            and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        )


def _key(tensors: tuple[Tensor, ...]) -> tuple:
    device = tensors[0].device
    autocast = torch.get_autocast_dtype(device.type) if autocast_enabled(device.type) else None
    return tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in tensors), autocast, torch.is_inference_mode_enabled()


class _Graph:
    def __init__(self, model: nn.Module, function: Callable, tensors: tuple[Tensor, ...]):
        self.snapshot = Snapshot(model)
        if any(tensor.is_inference() for tensor in self.snapshot.tensors):
            raise RuntimeError("its parameters, made in inference mode, do not say when they are written to")
        self.versions = fold.versions(self.snapshot.tensors)
        self.inputs = [x.clone() for x in tensors]
        self.function = function
        self.outputs, self.replay = record(self._run, tensors[0].device)

    def _run(self) -> tuple[Tensor, ...]:
        with layer.beside(), _no_autocast_cache(self.inputs[0].device):
            return self.function(*self.inputs, compiled=True)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.snapshot.same():
            return None
        batch = tensors[0].shape[0]
        for buffer, x in zip(self.inputs, tensors, strict=True):
            buffer[:batch].copy_(x)
        versions = fold.versions(self.snapshot.tensors)
        if versions != self.versions:
            self.versions = versions
            outputs = self._run()  # folds what is kept of the weights anew, where it is
            return tuple(x[:batch] for x in outputs)
        self.replay()
        return tuple(x[:batch].clone() for x in self.outputs)


def _no_autocast_cache(device: torch.device):
    """Autocast as it is, without its cache: what a graph has recorded must not be freed when the context ends."""
    if not autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
