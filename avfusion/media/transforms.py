"""What feeds the model: frames as normalised tensors, waveforms as log-mel spectrograms."""

from collections.abc import Callable

import numpy as np
import torch
import torchaudio.functional as AF
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(image_size: tuple[int, int], audio_size: tuple[int, int]) -> tuple[v2.Transform, "LogMel", dict]:
    """What turns clips into inputs of a model: its image transform, its spectrogram, and the window for `read_clip`.

    A model of 128 x 192 spectrograms takes 3 s windows at 16 kHz.
    """
    n_mels, frames = audio_size
    mel = LogMel(n_mels=n_mels)
    return image_transform(image_size), mel, {"duration": frames * mel.hop / mel.sample_rate,
                                              "sample_rate": mel.sample_rate}  # fmt: skip


def image_transform(size: tuple[int, int] = (224, 224), train: bool = False, crop_min: float = 0.5) -> v2.Transform:
    """PIL image -> float32 [3, *size], normalised with ImageNet's mean and standard deviation.

    `train` takes a random crop of at least `crop_min` of the area, mirrored half the time. Otherwise it is the centre
    of the image, the short side scaled to 8/7 of `size` (256 pixels, of which 224 are kept), as the paper evaluates.
    """
    if train:
        geometry = [v2.RandomResizedCrop(size, scale=(crop_min, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    else:
        geometry = _centre(size)
    return _normalised(geometry)


def image_pixels(size: tuple[int, int] = (224, 224)) -> v2.Transform:
    """PIL image -> uint8 [3, *size]: a quarter of the bytes of `image_transform`, which is `normalize` of it."""
    return v2.Compose([*_centre(size), v2.ToImage(), v2.ToPureTensor()])


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, with ImageNet's mean and standard deviation."""
    return v2.functional.normalize(v2.functional.to_dtype(pixels, scale=True), IMAGENET_MEAN, IMAGENET_STD)


def _centre(size: tuple[int, int]) -> list[v2.Transform]:
    return [v2.Resize(int(max(size) / 0.875), antialias=True), v2.CenterCrop(size)]


def whole_frame(size: tuple[int, int]) -> v2.Transform:
    """`image_transform` without cropping: the whole frame, squeezed to `size`; for what is placed in the picture."""
    return _normalised([v2.Resize(size, antialias=True)])


def masked_transform(size: tuple[int, int], train: bool = False, crop_min: float = 0.5) -> Callable:
    """(PIL image, mask [H, W]) -> image float32 [3, *size], normalised, and mask uint8 [*size], moved together.

    `train` crops and mirrors as `image_transform` does; otherwise it is the whole frame. The image has the mask's size
    before that.
    """
    geometry = v2.Resize(size, antialias=True)
    if train:
        crop = v2.RandomResizedCrop(size, scale=(crop_min, 1.0), antialias=True)
        geometry = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def transform(frame: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.array(frame.resize(mask.shape[::-1]))).permute(2, 0, 1)
        image, mask = geometry(tv_tensors.Image(pixels), tv_tensors.Mask(torch.from_numpy(mask.copy())[None]))
        image = v2.functional.normalize(image.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
        return image.as_subclass(Tensor), mask[0].as_subclass(Tensor)

    return transform


def _normalised(geometry: list[v2.Transform]) -> v2.Transform:
    return v2.Compose([*geometry, v2.ToImage(), v2.ToPureTensor(), normalize])


class LogMel(nn.Module):
    """Log-mel spectrogram: waveform [..., samples] -> log10(mel + 1e-7) [..., n_mels, samples // hop], float32.

    Power spectra of 50 ms Hann windows, 64 a second, over `n_mels` triangular bands (HTK scale, lowest first). 3 s at
    16 kHz give [128, 192]. Runs in float32 under autocast too, since squared magnitudes leave the range of half
    precision. The window and the filter bank are constants: they follow `.to(device)` but are in no state dict.

    Raises ValueError where the waveform is shorter than half a window.
    """

    def __init__(self, sample_rate: int = 16000, n_mels: int = 128):
        super().__init__()
        self.sample_rate, self.n_fft, self.hop = sample_rate, int(sample_rate * 0.05), sample_rate // 64
        fbanks = AF.melscale_fbanks(self.n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        self.register_buffer("fbanks", fbanks, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        if waveform.shape[-1] <= self.n_fft // 2:
            raise ValueError(f"waveform {tuple(waveform.shape)}: expected more than {self.n_fft // 2} samples")
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = AF.spectrogram(
                waveform.float(), 0, self.window, self.n_fft, self.hop, self.n_fft, power=2.0, normalized=False
            )
            mel = self.fbanks.T @ spectrum
            return torch.log10(mel[..., : waveform.shape[-1] // self.hop] + 1e-7)
