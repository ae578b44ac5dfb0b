"""Compiles csrc/ into avfkernels/libavfkernels.so: plain C ABI, loaded with ctypes, tied to no torch or Python version.

A failed build leaves a working package without native kernels (`python -m avfkernels` says so);
AVF_REQUIRE_NATIVE=1 turns it into an error. CXX and CXXFLAGS are honoured.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# -ffast-math is left out on purpose: at link time it switches the whole process to flush-to-zero.
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
# Every *_kernel.cpp is compiled once for each instruction set; the choice is made at run time (csrc/isa.cpp).
X86_ISAS = {"avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma", "avx2": "-mavx2 -mfma"}


def ninja_file(cxx: str, library: Path, openmp: str) -> str:
    """The build graph: one object per source (and instruction set), one shared library."""
    isas = dict(X86_ISAS) if platform.machine() in ("x86_64", "AMD64") else {}
    defines = "".join(f" -DAVF_HAVE_{isa.upper()}" for isa in isas)
    isas["portable"] = ""
    flags = f"{CXXFLAGS} {openmp}{defines} {os.environ.get('CXXFLAGS', '')}"
    lines = [
        f"flags = {flags}",
        "rule cxx",
        f"  command = {cxx} $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared {openmp} {os.environ.get('CXXFLAGS', '')} $in -o $out",
    ]
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        variants = isas.items() if source.stem.endswith("_kernel") else [("", "")]
        for isa, isa_flags in variants:
            objects.append(f"{source.stem}{'.' if isa else ''}{isa}.o")
            lines.append(f"build {objects[-1]}: cxx {escape(source)}")
            lines.append(f"  isa = {isa_flags}{f' -DAVF_ISA={isa}' if isa else ''}")
    lines.append(f"build {escape(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # one file serves every Python: no ABI suffix

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.compile(library)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            if os.environ.get("AVF_REQUIRE_NATIVE") == "1":
                raise RuntimeError(f"AVF_REQUIRE_NATIVE=1 and the native kernels did not build: {error}") from error
            print(f"avfkernels: native kernels skipped, PyTorch fallbacks will run: {error}", file=sys.stderr)

    def compile(self, library: Path):
        cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
        if cxx is None or shutil.which(shlex.split(cxx)[0]) is None:
            raise RuntimeError(f"no C++ compiler ({cxx or 'g++, clang++ or c++'} is not on PATH)")
        import ninja

        build = (Path(self.build_temp) / "native").resolve()
        build.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        for openmp in ("-fopenmp", ""):  # without OpenMP the kernels run on one thread
            (build / "build.ninja").write_text(ninja_file(cxx, library, openmp))
            done = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)])
            if done.returncode == 0:
                return
        raise RuntimeError(f"{cxx} failed on csrc/ (see the messages above)")

    def get_outputs(self):
        # A skipped build has nothing to install.
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self):
        for ext in self.extensions:  # a skipped build must not leave an older library behind
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("avfkernels.libavfkernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
