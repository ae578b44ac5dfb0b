"""Compiles csrc/ into avfkernels/: plain C ABI, loaded with ctypes, tied to no torch or Python version.

    *.cpp  libavfkernels.so       CXX, CXXFLAGS
    *.cu   libavfkernels_cuda.so  if there is an nvcc; NVCC, AVF_CUDA_ARCHS="8.0 9.0a ...", AVF_CUDA=0 for none

A failed build leaves a working package without those kernels (`python -m avfkernels` says so);
AVF_REQUIRE_NATIVE=1 turns it into an error. AVF_NATIVE=0, and Windows, build none: the wheel is for any machine.
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
# -Wno-psabi: vectors cross no library boundary.
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi"
# Every *_kernel.cpp is compiled once for each instruction set; the choice is made at run time (csrc/pair.cpp).
X86_ISAS = {"avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma", "avx2": "-mavx2 -mfma"}

# Machine code for each, and PTX of the oldest for GPUs that are none of them. The kernels use what that one has, so all
# are made from its PTX: nvcc's front end runs once. The CUDA runtime is linked in statically.
CUDA_ARCHS = "8.0 9.0a 10.0 12.0"
NVCCFLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall --threads 2"


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


def cuda_ninja_file(nvcc: str, library: Path) -> str:
    archs = [arch.replace(".", "") for arch in os.environ.get("AVF_CUDA_ARCHS", CUDA_ARCHS).replace(";", " ").split()]
    oldest = min((arch.rstrip("abcdefghijklmnopqrstuvwxyz") for arch in archs), key=int)
    codes = ",".join([f"compute_{oldest}", *(f"sm_{arch}" for arch in archs)])
    lines = [
        "rule nvcc",
        f"  command = {nvcc} {NVCCFLAGS} -gencode 'arch=compute_{oldest},code=[{codes}]' -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {nvcc} -shared -cudart static $in -o $out",
    ]
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    lines += [f"build {source.stem}.o: nvcc {escape(source)}" for source in sources]
    lines.append(f"build {escape(library)}: link {' '.join(f'{source.stem}.o' for source in sources)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # one file serves every Python: no ABI suffix

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        kind, compile = ("CUDA", self.compile_cuda) if ext.name.endswith("_cuda") else ("native", self.compile)
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            if not any((ROOT / "csrc").glob("*.cpp")):
                raise RuntimeError("there is no csrc/: these sources are not a whole clone or source distribution")
            compile(library)
        except (OSError, subprocess.CalledProcessError, RuntimeError, ValueError, ImportError) as error:
            library.unlink(missing_ok=True)  # that of an earlier build
            if os.environ.get("AVF_REQUIRE_NATIVE") == "1":
                raise RuntimeError(f"AVF_REQUIRE_NATIVE=1 and the {kind} kernels did not build: {error}") from error
            print(f"avfkernels: {kind} kernels skipped, PyTorch fallbacks will run: {error}", file=sys.stderr)

    def compile(self, library: Path):
        cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
        if cxx is None or shutil.which(shlex.split(cxx)[0]) is None:
            raise RuntimeError(f"no C++ compiler ({cxx or 'g++, clang++ or c++'} is not on PATH)")
        # Without OpenMP the kernels run on one thread.
        if not any(self.ninja("native", ninja_file(cxx, library, openmp)) for openmp in ("-fopenmp", "")):
            raise RuntimeError(f"{cxx} failed on csrc/ (see the messages above)")

    def compile_cuda(self, library: Path):
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
        if nvcc is None or os.environ.get("AVF_CUDA") == "0":  # no failure: most machines have no CUDA
            reason = "no nvcc on PATH" if nvcc is None else "AVF_CUDA=0"
            print(f"avfkernels: CUDA kernels skipped: {reason}", file=sys.stderr)
            library.unlink(missing_ok=True)
            return
        if shutil.which(shlex.split(nvcc)[0]) is None:
            raise RuntimeError(f"no CUDA compiler ({nvcc} is not on PATH)")
        if not self.ninja("cuda", cuda_ninja_file(nvcc, library)):
            raise RuntimeError(f"{nvcc} failed on csrc/ (see the messages above)")

    def ninja(self, name: str, graph: str) -> bool:
        """Runs a build graph; whether it succeeded."""
        import ninja

        build = (Path(self.build_temp) / name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(graph)
        return subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]).returncode == 0

    def get_outputs(self):
        # A skipped build has nothing to install.
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self):
        for ext in self.extensions:  # a skipped build must not leave an older library behind
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


NATIVE = os.name != "nt" and os.environ.get("AVF_NATIVE") != "0"
LIBRARIES = ("avfkernels.libavfkernels", "avfkernels.libavfkernels_cuda") if NATIVE else ()
setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
