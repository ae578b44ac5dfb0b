"""`python -m avfkernels`: versions, devices, what runs where and the measurement that says so."""

import os
import platform
import shutil
import sys
from importlib.util import find_spec

import torch

import avfkernels
from avfkernels import choice, native
from avfkernels.ops import onednn, pair
from avfkernels.ops.pair_plain import Pairs


def report() -> str:
    lines = [
        f"avfkernels {avfkernels.__version__}",
        f"  python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"  torch    {torch.__version__}",
        f"  triton   {__import__('triton').__version__ if find_spec('triton') else 'not installed'}",
    ]
    if reason := native.why_unavailable():
        compilers = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
        lines += [
            f"  native   not available: {reason}",
            f"           compilers on PATH: {', '.join(compilers) or 'none'}",
        ]
    else:
        lines.append(f"  native   {native.PATH.name}, ABI {native.ABI_VERSION}, instruction set {native.isa()}")
    lines.append(f"  native   CUDA: {native.why_cuda_unavailable() or native.CUDA_PATH.name}")
    lines.append(f"  nvcc     {shutil.which('nvcc') or 'not on PATH'}")

    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    lines += ["", "devices", f"  cpu      {cpu}"]
    for i in range(torch.cuda.device_count()):
        capability = "".join(map(str, torch.cuda.get_device_capability(i)))
        lines.append(f"  cuda:{i}   {torch.cuda.get_device_name(i)}, sm_{capability}")
    if not torch.cuda.is_available():
        lines.append(f"  cuda     not available: {_why_no_cuda()}")

    origin = " (AVF_BACKEND)" if os.environ.get("AVF_BACKEND") else ""
    lines += ["", f"what runs, from top to bottom; override: {choice.forced() or 'none'}{origin}"]
    for row in choice.TABLE:
        lines.append(f"  {row.op}, {row.device}: {row.regime}")
        reason = _why_not_here(row)
        evidence = f"by bench/results/{row.evidence}" if row.evidence else "not measured"
        lines.append(f"    {row.implementation:<10} {evidence}{f'; not here: {reason}' if reason else ''}")
    lines += _blocks_on_cpus()
    lines.append("  every other op, any device\n    eager      no kernel measured is faster by enough (docs/tried.md)")
    return "\n".join(lines)


def _why_not_here(row: choice.Choice) -> str | None:
    """The reason that a row's implementation cannot run on this machine, or None."""
    if row.device == "any":
        return None
    if row.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    half = torch.bfloat16 if row.device == "cuda" else torch.float32
    tensors = [torch.empty(1, 1, n, 16, device=row.device, dtype=half) for n in (16, 2, 2, 2, 2)]
    for interaction, dropout_p in (("sum", 0.0), ("product", 0.0), ("sum", 0.1)):
        arguments = Pairs(*tensors, None, None, None, 1.0, interaction, dropout_p)
        if row.holds(arguments):
            return pair.WHY_NOT[row.implementation](arguments)
    raise AssertionError(f"no arguments for {row}")


def _blocks_on_cpus() -> list[str]:
    """Of linear layers, and of the self-attention of ViT blocks (ops/attention.py) in inference."""
    lines, evidence = [], "by bench/results/cpu-amd-epyc-2-cores-avx512.md"
    for dtype in (torch.float32, torch.bfloat16):
        reason = onednn.why_not(dtype)
        not_here = f"; not here: {reason}" if reason else ""
        lines += [f"  linear layers, cpu: {str(dtype).removeprefix('torch.')}", f"    onednn     {evidence}{not_here}"]
    reason = native.why_unavailable() or ("" if native.isa() == "avx512" else "no AVX-512")
    not_here = f"; not here: {reason}" if reason else ""
    return [*lines, "  self-attention in inference, cpu: float32 with AVX-512", f"    cpu        {evidence}{not_here}"]


def _why_no_cuda() -> str:
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    return "torch finds no NVIDIA driver or no device"


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
