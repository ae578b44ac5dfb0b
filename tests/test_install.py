"""The build: with a compiler, without one, with one that fails. Each case builds a wheel from a copy of the sources."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILERS = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler on PATH")


@pytest.fixture
def sources(tmp_path):
    """What a user clones, without anything built."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("csrc", "avfkernels", "avfusion"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(sources, **environment):
    """pip wheel, in the environment at hand (its setuptools and ninja), no network; without nvcc unless asked for."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-v",
        "-w",
        "out",
    ]
    return subprocess.run(
        command,
        cwd=sources,
        env=os.environ | {"AVF_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def unpacked(sources):
    (wheel,) = (sources / "out").glob("*.whl")
    target = sources / "unpacked"
    zipfile.ZipFile(wheel).extractall(target)
    return wheel, target


USE_IT = """
import torch, avfkernels
from avfkernels import _native
q, x = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
avfkernels.pair_attention(q, x, x, x, x, scale=1.0)
print(avfkernels.__file__, _native.why_unavailable())
"""


def use(target):
    done = subprocess.run(
        [sys.executable, "-c", USE_IT],
        env=os.environ | {"PYTHONPATH": str(target)},
        cwd=target,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    return done.stdout


@needs_compiler
def test_a_wheel_serves_every_python_and_holds_the_library(sources):
    done = build(sources, AVF_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    wheel, target = unpacked(sources)
    assert "-py3-none-" in wheel.name
    assert (target / "avfkernels" / "libavfkernels.so").exists()
    assert use(target).strip().endswith("None")


def test_without_a_compiler_the_install_succeeds_and_says_what_is_missing(sources):
    done = build(sources, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert "native kernels skipped" in output
    assert "no C++ compiler (no-such-compiler" in output
    _, target = unpacked(sources)
    assert not list(target.rglob("*.so"))
    assert "was not built: it needs a C++ compiler" in use(target)


def test_a_compiler_that_fails_is_no_obstacle_either(sources):
    done = build(sources, CXX="false")
    assert done.returncode == 0, done.stderr
    assert "false failed on csrc/" in done.stdout + done.stderr


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_avf_require_native_turns_a_missing_library_into_an_error(sources, cxx):
    done = build(sources, CXX=cxx, AVF_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "AVF_REQUIRE_NATIVE=1 and the native kernels did not build" in done.stdout + done.stderr


@needs_compiler
def test_an_nvcc_that_fails_does_not_cost_the_library_of_the_cpu(sources):
    done = build(sources, AVF_CUDA="1", NVCC="false")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels skipped, PyTorch fallbacks will run: false failed on csrc/" in done.stdout + done.stderr
    _, target = unpacked(sources)
    assert [path.name for path in target.rglob("*.so")] == ["libavfkernels.so"]


@pytest.mark.parametrize("nvcc", ["no-such-nvcc", "false"])
def test_avf_require_native_turns_a_failing_nvcc_into_an_error(sources, nvcc):
    for source in (sources / "csrc").glob("*_kernel.cpp"):  # quicker: the other library need not compile
        source.unlink()
    (sources / "csrc" / "pair_attention.cpp").unlink()
    done = build(sources, AVF_CUDA="1", NVCC=nvcc, AVF_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "AVF_REQUIRE_NATIVE=1 and the CUDA kernels did not build" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_wheel_built_with_nvcc_holds_the_cuda_library_and_it_loads_without_a_gpu(sources):
    done = build(sources, AVF_CUDA="1", AVF_CUDA_ARCHS="8.0", AVF_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    _, target = unpacked(sources)
    library = target / "avfkernels" / "libavfkernels_cuda.so"
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).avf_cuda_abi_version())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def test_avfkernels_imports_torch_and_nothing_of_the_extras():
    """The kernel library depends on torch (and triton) alone."""
    code = "import sys, avfkernels; print({'timm', 'torchaudio', 'av', 'einops', 'avfusion'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_avfusion_without_its_extra_names_the_package_and_the_command():
    code = (
        "import importlib.util as u; find_spec = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'av' else find_spec(name, *a);"
        "import avfusion"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "avfusion needs av; install what is missing with: pip install -e '.[train]'" in done.stderr
