"""Source separation: SDR, SIR and SAR (BSS Eval v3), ratio masks, and baselines that need no training.

BSS Eval projects an estimate e on the spans of delayed references, up to `taps` samples: P_j on those of reference j, P
on those of all.

    SDR = |P_j e|^2 / |e - P_j e|^2     SIR = |P_j e|^2 / |P e - P_j e|^2     SAR = |P e|^2 / |e - P e|^2      in dB

Source: Vincent, Gribonval & Fevotte, IEEE TASLP 2006, as mir_eval's `bss_eval_sources` computes it.
"""

import torch
from sklearn.decomposition import NMF
from torch import Tensor

from avfusion.clips import LogMel

MEMORY = 2**28  # bytes of a chunk's matrices


def bss_eval(references: Tensor, estimates: Tensor, taps: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """SDR, SIR and SAR of estimates in dB, estimate j against reference j: no permutation is tried.

    Args:
        references: [B, J, samples], on any device; computed in float64.
        estimates: likewise, or [M, B, J, samples], of M methods: they share what is costly.
        taps: length of the distortion that is allowed, in samples.

    Returns three float64 tensors of the shape of `estimates` without samples. All three are NaN where a reference or
    the estimate is silent, or references are delayed copies of each other: the projections are not defined.

    Raises ValueError for shapes that do not fit.
    """
    if references.ndim != 3 or references.shape != estimates.shape[-3:] or references.shape[-1] < taps:
        raise ValueError(f"bss_eval: expected references and estimates [B, J, samples] of {taps} samples or more, got "
                         f"{list(references.shape)} and {list(estimates.shape)}")  # fmt: skip
    methods = estimates if estimates.ndim == 4 else estimates[None]
    chunk = max(1, MEMORY // (8 * (references.shape[1] * taps) ** 2))
    parts = [_bss_eval(r.double(), e.double(), taps)
             for r, e in zip(references.split(chunk), methods.split(chunk, dim=1), strict=True)]  # fmt: skip
    scores = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return tuple(x if estimates.ndim == 4 else x[0] for x in scores)


def _bss_eval(references: Tensor, estimates: Tensor, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    count, samples = references.shape[1:]
    # Scales change nothing, and silence shows as NaN.
    references, estimates = (x / x.norm(dim=-1, keepdim=True) for x in (references, estimates))
    silent = ~(references.isfinite().all(-1).all(-1, keepdim=True) & estimates.isfinite().all(-1))  # [M, B, J]
    references, estimates = references.nan_to_num(), estimates.nan_to_num()

    size = 1 << (samples + taps - 1).bit_length()
    R, E = (torch.fft.rfft(x, size) for x in (references, estimates))
    # auto[p, q, k] = sum_t r_p(t) r_q(t + k), for k from -taps + 1 to taps - 1; cross likewise with e_q, for k >= 0.
    auto = torch.fft.irfft(R.conj()[:, :, None] * R[:, None], size)
    auto = torch.cat((auto[..., size - taps + 1 :], auto[..., :taps]), dim=-1)
    # Of each estimate, [M, B, reference, taps].
    cross = [torch.fft.irfft(R.conj() * e.unsqueeze(2), size)[..., :taps] for e in E.unbind(2)]
    # Gram matrix of delayed references: <r_p(t - i), r_q(t - j)> = auto[p, q, i - j], p's delays down, q's across.
    lags = torch.arange(taps, device=auto.device)
    gram = auto[..., taps - 1 + lags[:, None] - lags]  # [B, J, J, taps, taps]

    own, whole = [], []  # energies of the projections on the own reference, and on all of them
    for j in range(count):
        order = [j, *(p for p in range(count) if p != j)]
        matrix = gram[:, order][:, :, order].transpose(2, 3).flatten(3, 4).flatten(1, 2)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        right = cross[j][:, :, order].flatten(2, 3).movedim(0, -1)  # [B, J * taps, M]
        parts = torch.linalg.solve_triangular(factor, right, upper=False).square()
        parts = parts.masked_fill((failed > 0)[:, None, None], torch.nan)
        own.append(parts[:, :taps].sum(1).T)
        whole.append(parts.sum(1).T)
    own, whole = (torch.stack(x, dim=-1).masked_fill(silent, torch.nan) for x in (own, whole))
    total = estimates.square().sum(-1)
    ratios = own / (total - own), own / (whole - own), whole / (total - whole)
    return tuple(10 * x.clamp(min=0).log10() for x in ratios)


def ratio_masks(spectra: Tensor) -> Tensor:
    """Which share of the mixture's power each source has: p_k / sum_k p_k, in [0, 1].

    spectra [B, K, ..., mels, frames] is log10 of power, of each of K sources. Where all are silent, shares are equal.
    """
    return (spectra * torch.log(torch.tensor(10.0))).softmax(dim=1)


def apply_mask(mixture: Tensor, mask: Tensor, mel: LogMel) -> Tensor:
    """Filter mixtures [B, samples] by masks [B, mels, frames] of their log-mel spectrograms; returns [B, samples].

    A bin of the spectrum gets the mean of the masks of the bands that it is in, weighted as the filter bank weights
    them; bins in no band get that of the nearest.
    """
    spectrum = torch.stft(mixture, mel.n_fft, mel.hop, window=mel.window, return_complex=True)
    weight = mel.fbanks.clone()  # [bins, mels]
    bins = torch.arange(len(weight), device=weight.device)
    centers = weight.T @ bins.to(weight.dtype) / weight.sum(0).clamp(min=1e-12)
    for index in (weight.sum(1) == 0).nonzero().flatten().tolist():
        weight[index, (centers - index).abs().argmin()] = 1
    gain = (weight / weight.sum(1, keepdim=True)) @ mask.to(spectrum.real.dtype)
    last = gain[..., -1:].expand(-1, -1, spectrum.shape[-1] - gain.shape[-1])  # the spectrogram drops the last frame
    spectrum = spectrum * torch.cat((gain, last), dim=-1)
    return torch.istft(spectrum, mel.n_fft, mel.hop, window=mel.window, length=mixture.shape[-1])


def nmf(mixture: Tensor, sources: Tensor, mel: LogMel, components: int = 16, seed: int = 0) -> Tensor:
    """Non-negative matrix factorisation of the power spectrum; each component goes to the source that it fits best.

    The assignment looks at the true sources, so this is the best that these components can do. mixture [samples],
    sources [K, samples] -> estimates [K, samples].
    """
    spectrum = _stft(mixture, mel)
    power = spectrum.abs().square().double().cpu().numpy()
    model = NMF(components, init="nndsvda", max_iter=200, random_state=seed, tol=1e-3)
    activations = torch.from_numpy(model.fit_transform(power))
    parts = activations.T[:, :, None] * torch.from_numpy(model.components_)[:, None]  # [components, bins, frames]
    truth = _stft(sources, mel).abs().square().double().cpu()
    fit = torch.einsum("cbf,kbf->ck", parts, truth / truth.sum((1, 2), keepdim=True).clamp(min=1e-30))
    owner = torch.nn.functional.one_hot(fit.argmax(1), len(sources)).double()
    shares = _shares(torch.einsum("ck,cbf->kbf", owner, parts))
    return _istft(spectrum * shares.to(spectrum.device, spectrum.real.dtype), mel, mixture.shape[-1])


def rpca(mixture: Tensor, mel: LogMel, iterations: int = 100, tolerance: float = 1e-4) -> Tensor:
    """Robust principal component analysis of the magnitudes: what repeats (low rank) and what does not (sparse).

    min |L|_* + lambda |S|_1 with L + S = |STFT|, by the inexact augmented Lagrangian method (Lin et al., 2010), then
    masks L / (L + S) and S / (L + S). mixture [samples] -> estimates [2, samples], low rank first.
    """
    spectrum = _stft(mixture, mel)
    x = spectrum.abs().double()
    scale = torch.linalg.matrix_norm(x, 2)
    weight, mu = max(x.shape) ** -0.5, 1.25 / scale.clamp(min=1e-12)
    multiplier = x / torch.maximum(scale, x.abs().max() / weight).clamp(min=1e-12)
    sparse = torch.zeros_like(x)
    for _ in range(iterations):
        u, s, v = torch.linalg.svd(x - sparse + multiplier / mu, full_matrices=False)
        low = (u * (s - 1 / mu).clamp(min=0)) @ v
        rest = x - low + multiplier / mu
        sparse = rest.sign() * (rest.abs() - weight / mu).clamp(min=0)
        residual = x - low - sparse
        multiplier, mu = multiplier + mu * residual, mu * 1.5
        if residual.norm() <= tolerance * x.norm():
            break
    shares = _shares(torch.stack((low, sparse)).abs())
    return _istft(spectrum * shares.to(spectrum.real.dtype), mel, mixture.shape[-1])


def _shares(parts: Tensor) -> Tensor:
    """parts [K, ...] -> their shares of the sum; equal ones where there is nothing."""
    parts = parts.clamp(min=1e-30)
    return parts / parts.sum(0)


def _stft(x: Tensor, mel: LogMel) -> Tensor:
    return torch.stft(x, mel.n_fft, mel.hop, window=mel.window, return_complex=True)


def _istft(spectrum: Tensor, mel: LogMel, samples: int) -> Tensor:
    return torch.istft(spectrum, mel.n_fft, mel.hop, window=mel.window, length=samples)
