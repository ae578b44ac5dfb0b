"""`python -m avfkernels`: versions, devices, and for each op which backends can run here, or why not."""

import os
import platform
import shutil
import sys
from importlib.util import find_spec

import torch

import avfkernels
from avfkernels import _backends, _native, _ops

# The paper's shapes, per op.
SHAPES = {
    "pair_attention": {
        "q": (1, 12, 16, 16),
        "k1": (1, 12, 96, 16),
        "v1": (1, 12, 96, 16),
        "k2": (1, 12, 196, 16),
        "v2": (1, 12, 196, 16),
    },
    "latent_attention": {"q": (1, 96, 768), "x": (1, 196, 768)},
    "prefix_attention": {
        "q": (1, 12, 196, 64),
        "k": (1, 12, 196, 64),
        "v": (1, 12, 196, 64),
        "k_prefix": (1, 12, 16, 64),
        "v_prefix": (1, 12, 16, 64),
    },
}
OPTIONS = {
    "pair_attention": {
        "scale": 0.25,
        "interaction": "sum",
        "mask1": None,
        "mask2": None,
        "dropout_p": 0.0,
        "seed": None,
        "return_lse": False,
    },
    "latent_attention": {"scale": 0.25, "mask": None, "return_lse": False},
    "prefix_attention": {"scale": 0.125, "return_lse": False},
}


def report() -> str:
    lines = [
        f"avfkernels {avfkernels.__version__}",
        f"  python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"  torch    {torch.__version__}",
        f"  triton   {__import__('triton').__version__ if find_spec('triton') else 'not installed'}",
    ]
    if reason := _native.why_unavailable():
        compilers = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
        lines += [
            f"  native   not available: {reason}",
            f"           compilers on PATH: {', '.join(compilers) or 'none'}",
        ]
    else:
        lines.append(f"  native   {_native.PATH.name}, ABI {_native.ABI_VERSION}, instruction set {_native.isa()}")
    lines.append(f"  native   CUDA: {_native.why_cuda_unavailable() or _native.CUDA_PATH.name}")
    lines.append(f"  nvcc     {shutil.which('nvcc') or 'not on PATH'}")

    devices = ["cpu"]
    lines += [
        "",
        "devices",
        f"  cpu      {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            capability = "".join(map(str, torch.cuda.get_device_capability(i)))
            lines.append(f"  cuda:{i}   {torch.cuda.get_device_name(i)}, sm_{capability}")
    else:
        lines.append(f"  cuda     not available: {_why_no_cuda()}")

    forced = _backends.forced()
    origin = " (AVF_BACKEND)" if os.environ.get("AVF_BACKEND") else ""
    lines += ["", f"backends, for fp32 at the paper's shapes; override: {forced or 'none'}{origin}"]
    for op, table in _ops.BACKENDS.items():
        for device in devices:
            arguments = {name: torch.zeros(shape, device=device) for name, shape in SHAPES[op].items()} | OPTIONS[op]
            lines.append(f"  {op} on {device}")
            try:
                chosen = _backends.select(op, table, arguments)
            except RuntimeError as error:
                chosen = None
                lines.append(f"    {error}")
            for name in _backends.NAMES:
                if name not in table:
                    lines.append(f"    {name:<10} no      not implemented for this op")
                    continue
                reason = table[name].why_not(**arguments)
                mark = "chosen" if table[name] is chosen else "no" if reason else "yes"
                lines.append(f"    {name:<10} {mark:<7} {reason or ''}".rstrip())
    return "\n".join(lines)


def _why_no_cuda() -> str:
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    return "torch finds no NVIDIA driver or no device"


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
