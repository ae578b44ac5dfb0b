"""DeepAVFusion around avfkernels: real clips in, features out.

    model = avfusion.load_encoder("checkpoint.pth")
    features = model.embed("clip.mp4")

What this package adds to the kernels (timm, torchaudio, PyAV, ...) is the extra `train`: pip install -e '.[train]'.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of _NAMES, for type checkers and editors
    from avfusion import data as data
    from avfusion.embedding.decode import Decoder as Decoder
    from avfusion.embedding.embed import Embedder as Embedder
    from avfusion.embedding.embed import embed_clips as embed_clips
    from avfusion.embedding.features import Features as Features
    from avfusion.media.clip import ClipError as ClipError
    from avfusion.media.reader import read_clip as read_clip
    from avfusion.media.transforms import LogMel as LogMel
    from avfusion.models.checkpoint import CheckpointError as CheckpointError
    from avfusion.models.checkpoint import load_encoder as load_encoder
    from avfusion.models.checkpoint import load_unimodal as load_unimodal
    from avfusion.models.checkpoint import save_encoder as save_encoder
    from avfusion.models.deepavfusion import DeepAVFusion as DeepAVFusion
    from avfusion.models.deepavfusion import EncoderConfig as EncoderConfig
    from avfusion.models.mae import AVMAE as AVMAE

    __version__: str

# The public names and where they live: loaded on first use, so that `avfusion --help` is instant, and the model alone
# needs neither a video decoder nor what reads data sets.
_NAMES = {
    "AVMAE": "models.mae",
    "CheckpointError": "models.checkpoint",
    "ClipError": "media.clip",
    "DeepAVFusion": "models.deepavfusion",
    "Decoder": "embedding.decode",
    "Embedder": "embedding.embed",
    "EncoderConfig": "models.deepavfusion",
    "Features": "embedding.features",
    "LogMel": "media.transforms",
    "embed_clips": "embedding.embed",
    "load_encoder": "models.checkpoint",
    "load_unimodal": "models.checkpoint",
    "read_clip": "media.reader",
    "save_encoder": "models.checkpoint",
}
# Import name -> package of the extra `train`.
_REQUIRES = {"av": "av", "defusedxml": "defusedxml", "einops": "einops",
             "filelock": "filelock", "huggingface_hub": "huggingface-hub", "matplotlib": "matplotlib",
             "pyarrow": "pyarrow", "safetensors": "safetensors",
             "sklearn": "scikit-learn", "soundfile": "soundfile", "tensorboard": "tensorboard", "timm": "timm",
             "torchaudio": "torchaudio", "torchvision": "torchvision", "tqdm": "tqdm",
             "webdataset": "webdataset"}  # fmt: skip

__all__ = sorted(_NAMES)


def _missing() -> str | None:
    """Which packages of the extra are not installed, and the remedy; None if all are."""
    packages = [package for module, package in _REQUIRES.items() if find_spec(module) is None]
    if not packages:
        return None
    return f"avfusion needs {', '.join(packages)}; install what is missing with: pip install -e '.[train]'"


def __getattr__(name):
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("avfusion")
    if name == "data":
        return importlib.import_module("avfusion.data")
    if name not in _NAMES:
        raise AttributeError(f"module 'avfusion' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"avfusion.{_NAMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in _REQUIRES:
            raise
        raise ImportError(f"avfusion.{name}: {_missing()}") from error


def __dir__():
    return __all__
