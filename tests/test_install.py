"""The build: clone, source distribution, wheel, environment; with a compiler, without one, with one that fails."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


def run(*command, cwd, succeeds=True, **environment):
    """What a command says; without nvcc unless asked for."""
    environment = os.environ | {"AVF_CUDA": "0"} | environment
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def clone(folder):
    """What a user clones, without anything built."""
    for name in ("csrc", "avfkernels", "avfusion"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def sources(tmp_path):
    """A clone whose libraries hold next to nothing, so that they compile in no time."""
    sources = clone(tmp_path / "sources")
    for file in (sources / "csrc").glob("pair_*.cpp"):
        file.unlink()
    (sources / "csrc" / "pair_product.cu").write_text("int nothing;")
    return sources


def build(sources, succeeds=True, **environment):
    """Compiles as pip does, without the wheel; what it says, and the libraries that are there then."""
    said = run(sys.executable, "setup.py", "build_ext", "-b", "out", cwd=sources, succeeds=succeeds, **environment)
    return said, sorted(path.name for path in (sources / "out").rglob("*.so"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """clone -> source distribution -> wheel -> fresh environment, which has torch from the one at hand; no network."""
    folder = tmp_path_factory.mktemp("install")
    clone(folder / "sources")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=folder / "sources")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-deps", "--no-index")
    quick = {"AVF_REQUIRE_NATIVE": "1", "CXXFLAGS": "-O0"}
    run(*pip, "wheel", ".", *offline, "--no-build-isolation", "-w", folder, cwd=unpacked, **quick)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "fresh", cwd=folder)
    python = folder / "fresh" / "bin" / "python"
    run(*pip, "--python", python, "install", *offline, wheel, cwd=folder)
    (site,) = (folder / "fresh").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # not followed further: no editable install is seen
    return wheel, python, site


# Compiles the library, for every instruction set: half a minute.
@needs_compiler
def test_a_source_distribution_makes_a_wheel_for_every_python_whose_kernels_are_listed(installed, tmp_path):
    wheel, python, site = installed
    assert "-py3-none-" in wheel.name
    said = run(python, "-m", "avfkernels", cwd=tmp_path)
    assert "native   libavfkernels.so, ABI" in said
    assert "not here: libavfkernels.so" not in said
    assert "NumPy" not in said
    use = (
        "import torch, avfkernels; q, x = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4);"
        "avfkernels.pair_attention(q, x, x, x, x, scale=1.0); print(avfkernels.__file__)"
    )
    assert run(python, "-c", use, cwd=tmp_path).startswith(str(site))


def test_without_a_compiler_the_build_succeeds_and_says_what_is_missing(sources):
    said, libraries = build(sources, CXX="no-such-compiler")
    assert libraries == []
    assert "native kernels skipped" in said
    assert "no C++ compiler (no-such-compiler" in said
    code = "from avfkernels import native; print(native.why_unavailable())"
    said = run(sys.executable, "-c", code, cwd=sources, PYTHONPATH=str(sources))
    assert "was not built: it needs a C++ compiler (g++ or clang++) and csrc/" in said


def test_a_compiler_that_fails_is_no_obstacle_either(sources):
    said, libraries = build(sources, CXX="false")
    assert libraries == []
    assert "false failed on csrc/" in said


def test_sources_without_csrc_are_named(sources):
    shutil.rmtree(sources / "csrc")
    said, _ = build(sources)
    assert "there is no csrc/: these sources are not a whole clone or source distribution" in said


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_avf_require_native_turns_a_missing_library_into_an_error(sources, cxx):
    said, _ = build(sources, succeeds=False, CXX=cxx, AVF_REQUIRE_NATIVE="1")
    assert "AVF_REQUIRE_NATIVE=1 and the native kernels did not build" in said


@needs_compiler
def test_an_nvcc_that_fails_does_not_cost_the_library_of_the_cpu(sources):
    said, libraries = build(sources, AVF_CUDA="1", NVCC="false")
    assert "CUDA kernels skipped, PyTorch fallbacks will run: false failed on csrc/" in said
    assert libraries == ["libavfkernels.so"]


@needs_compiler
@pytest.mark.parametrize("nvcc", ["no-such-nvcc", "false"])
def test_avf_require_native_turns_a_failing_nvcc_into_an_error(sources, nvcc):
    said, _ = build(sources, succeeds=False, AVF_CUDA="1", NVCC=nvcc, AVF_REQUIRE_NATIVE="1")
    assert "AVF_REQUIRE_NATIVE=1 and the CUDA kernels did not build" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_with_nvcc_there_is_the_library_of_cuda_too(sources):
    """That it loads without a GPU and holds every kernel: tests/avfkernels/test_cuda_build.py, of the installed one."""
    _, libraries = build(sources, AVF_CUDA="1", AVF_CUDA_ARCHS="8.0", AVF_REQUIRE_NATIVE="1")
    assert libraries == ["libavfkernels.so", "libavfkernels_cuda.so"]


WITHOUT = "import sys; sys.modules.update(dict.fromkeys({}));"  # packages that then seem not to be installed


def test_avfkernels_imports_torch_and_nothing_of_the_extras_and_is_silent_without_numpy():
    code = WITHOUT.format(["numpy"]) + (
        "import avfkernels; print({'timm', 'torchaudio', 'av', 'einops', 'avfusion'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "set()"


WITHOUT_MEDIA = """
import importlib.util as util, torch
find = util.find_spec
util.find_spec = lambda name, *a: None if name in ("av", "soundfile", "webdataset") else find(name, *a)
from avfusion import AVMAE, DeepAVFusion, EncoderConfig
config = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 32), audio_size=(32, 64))
losses = AVMAE(DeepAVFusion(config), 16, 1, 2)(torch.randn(2, 3, 32, 32), torch.randn(2, 1, 32, 64))[:2]
assert all(loss.isfinite() for loss in losses)
try:
    from avfusion import read_clip
except ImportError as error:
    print(error)
"""


def test_the_model_runs_without_what_reads_and_writes_media_and_the_rest_names_its_package():
    said = run(sys.executable, "-c", WITHOUT.format(["av", "soundfile", "webdataset"]) + WITHOUT_MEDIA, cwd=ROOT)
    assert (
        "avfusion.read_clip: avfusion needs av, soundfile, webdataset; install what is missing with: pip install -e"
        in said
    )


@pytest.mark.parametrize(("words", "succeeds"), [(["--help"], True), (["embed", "clip.mp4"], False)])
def test_the_command_line_without_its_extra_says_what_to_install(words, succeeds):
    code = WITHOUT.format(["numpy", "torch", "av", "timm"]) + (
        "import importlib.util as util; find = util.find_spec;"
        "util.find_spec = lambda name, *a: None if name in ('av', 'timm') else find(name, *a);"
        "from avfusion.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    said = run(sys.executable, "-c", code, *words, cwd=ROOT, succeeds=succeeds)
    assert "avfusion needs av, timm; install what is missing with: pip install -e '.[train]'" in " ".join(said.split())
    assert "Traceback" not in said


def test_a_wheel_without_native_code_is_for_any_machine(sources):
    run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist", cwd=sources, AVF_NATIVE="0")
    (wheel,) = (sources / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert not [name for name in names if name.endswith(".so")]
    assert {"avfkernels/py.typed", "avfusion/py.typed", "avfusion/viz/page.css", "avfusion/viz/page.js",
            "avfusion/models/weights/synth-small.safetensors"} <= names  # fmt: skip
