"""csrc/ under the address and undefined-behaviour sanitizers: no read or write outside the buffers, on any path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


# Half a minute of compiling: every instruction set's kernels, with both sanitizers.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """sanitize.cpp, linked with a sanitized build of the library."""
    folder = tmp_path_factory.mktemp("sanitizer")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "empty.cpp").write_text("int main() {}")
    probe = [compiler, *SANITIZE, folder / "empty.cpp", "-o", folder / "empty"]
    if subprocess.run(probe, capture_output=True).returncode or subprocess.run([folder / "empty"]).returncode:
        pytest.skip(f"{compiler} has no sanitizers here")

    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", folder / "temp", "--build-lib", folder]
    flags = {"CXX": compiler, "CXXFLAGS": " ".join(["-O0 -g1", *SANITIZE]), "AVF_REQUIRE_NATIVE": "1", "AVF_CUDA": "0"}
    done = subprocess.run(build, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    library, program = folder / "avfkernels" / "libavfkernels.so", folder / "sanitize"
    source = Path(__file__).with_name("sanitize.cpp")
    link = [compiler, "-std=c++17", *SANITIZE, f"-I{ROOT / 'csrc'}", source, library, "-o", program]
    subprocess.run(link, check=True)
    return program


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_no_access_outside_the_buffers(program, isa):
    done = subprocess.run([program], capture_output=True, text=True, env=os.environ | {"AVF_CPU_ISA": isa})
    assert done.returncode == 0, done.stderr
    ran, count = done.stdout.split()
    assert int(count) == 8 * 16
    if ran != isa:
        pytest.skip(f"this machine has no {isa}: {ran} ran instead")


def test_the_sanitizer_sees_a_step_beyond(program, tmp_path):
    """A test that cannot fail is none: one element less than promised must be noticed."""
    text = Path(__file__).with_name("sanitize.cpp").read_text()
    short = text.replace(" * rows);\n                        a.seed", " * rows - 1);\n                        a.seed")
    assert short != text
    (tmp_path / "short.cpp").write_text(short)
    library = program.parent / "avfkernels" / "libavfkernels.so"
    compiler = shutil.which("g++") or shutil.which("clang++")
    link = [compiler, "-std=c++17", *SANITIZE, f"-I{ROOT / 'csrc'}", tmp_path / "short.cpp", library]
    subprocess.run([*link, "-o", tmp_path / "short"], check=True)
    done = subprocess.run([tmp_path / "short"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
