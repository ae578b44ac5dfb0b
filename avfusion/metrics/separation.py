"""Source separation: SDR, SIR and SAR (BSS Eval v3), ratio masks, and baselines that need no training.

BSS Eval projects an estimate e on the spans of delayed references, up to `taps` samples: P_j on those of reference j, P
on those of all.

    SDR = |P_j e|^2 / |e - P_j e|^2     SIR = |P_j e|^2 / |P e - P_j e|^2     SAR = |P e|^2 / |e - P e|^2      in dB

Source: Vincent, Gribonval & Fevotte, IEEE TASLP 2006, as mir_eval's `bss_eval_sources` computes it.
"""

import torch
import torch.nn.functional as F
from sklearn.decomposition import NMF
from torch import Tensor

from avfusion.media.transforms import LogMel

CHUNK = 128  # mixtures whose factorisations go side by side
CACHED = 4  # mixtures whose spectra do


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
    parts = [_bss_eval(r, e, taps) for r, e in zip(references.split(CHUNK), methods.split(CHUNK, dim=1), strict=True)]
    scores = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return tuple(x if estimates.ndim == 4 else x[0] for x in scores)


def _bss_eval(references: Tensor, estimates: Tensor, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    M, B, J, _ = estimates.shape
    delayed = []
    for r, e in zip(references.split(CACHED), estimates.transpose(0, 1).flatten(1, 2).split(CACHED), strict=True):
        every = torch.cat((r, e), dim=1).double()  # [.., J + M * J, samples]
        delayed.append(correlations(every[:, :J], every, taps))
    delayed = torch.cat(delayed).permute(1, 2, 3, 0)  # [J, J + M * J, taps, B]
    gram, cross = delayed[:, :J], delayed[:, J:].transpose(0, 1)  # [J, J, taps, B], [M * J, J, taps, B]
    whole = toeplitz_energies(gram, cross).unflatten(0, (M, J)).transpose(1, 2)  # [M, B, J]

    def alone(x: Tensor) -> Tensor:  # the own reference of each: x [..., J, J, taps, B] -> [..., taps, J * B]
        return x.diagonal(dim1=-4, dim2=-3).movedim(-1, -2).flatten(-2)

    own = toeplitz_energies(alone(gram)[None, None], alone(cross.unflatten(0, (M, J)))[:, None])
    own = own.unflatten(1, (J, B)).transpose(1, 2)
    own = own.masked_fill(whole.isnan(), torch.nan)
    total = torch.linalg.vector_norm(estimates, dim=-1, dtype=torch.float64).square()
    # Of a perfect estimate the rest is 0 but for rounding.
    ratios = own / (total - own).clamp(min=0), own / (whole - own).clamp(min=0), whole / (total - whole).clamp(min=0)
    return tuple(10 * x.log10() for x in ratios)


def correlations(x: Tensor, y: Tensor, taps: int) -> Tensor:
    """sum_n x[.., p, n] y[.., q, n + t] for delays t = 0 ... taps - 1: [B, P, N], [B, Q, N] -> [B, P, Q, taps].

    By pieces of the signals, whose spectra are added up before they are transformed back.
    """
    size = 1 << (8 * taps - 1).bit_length()
    hop = size - taps + 1  # a piece of x, with the part of y that it meets: nothing wraps around
    pieces = -(-x.shape[-1] // hop)
    x = F.pad(x, (0, pieces * hop - x.shape[-1])).unflatten(-1, (pieces, hop))
    y = F.pad(y, (0, pieces * hop + taps - 1 - y.shape[-1])).unfold(-1, size, hop)
    X, Y = torch.fft.rfft(x, size).conj().resolve_conj(), torch.fft.rfft(y, size)
    spectra = torch.zeros_like(Y[:, None, :, 0].expand(-1, X.shape[1], -1, -1))
    for piece in range(pieces):
        spectra.addcmul_(X[:, :, None, piece], Y[:, None, :, piece])
    return torch.fft.irfft(spectra, size)[..., :taps]


def toeplitz_energies(gram: Tensor, right: Tensor) -> Tensor:
    """right^T T^-1 right for symmetric positive definite block Toeplitz matrices T: Schur's algorithm, O(taps^2).

    T is given by its first block column, T[(i, p), (0, q)] = gram[p, q, i], with blocks of K x K. With Z the shift by
    one block, T - Z T Z^T has rank 2K: sum_q d_q a_q a_q^T - e_q b_q b_q^T. Hyperbolic rotations of a and b leave that
    sum as it is and make a column of T's Cholesky factor of each a_q, K at a time; the substitution follows at once.
    Batches are innermost, so that every step is one operation on rows.

    Args:
        gram: float64 [K, K, taps, B]; right: [R, K, taps, B].

    Returns [R, B]; NaN where T is not positive definite.

    Source: Kailath & Sayed, "Displacement structure: theory and applications", SIAM Review 1995; the rotations are in
    the mixed form of Bojanczyk et al., 1987, whose errors are those of Cholesky factorisation, without square roots.
    """
    K, _, taps, B = gram.shape
    a = gram.permute(1, 2, 0, 3).reshape(K, taps * K, B).clone()  # first block column; rows are (delay, p)
    right = right.transpose(1, 2).reshape(len(right), taps * K, B).clone()
    for q in range(K):  # its K columns, orthogonalised
        for p in range(q + 1, K):
            a[p] -= a[q] * (a[p, q] / a[q, q])
    d = [1 / a[q, q] for q in range(K)]
    e, b, one = list(d), a.clone(), gram.new_ones(())
    total, lowest = right.new_zeros(len(right), B), torch.stack(d).amin(0)
    for i in range(taps):
        below, ahead = a[:, : K * (taps - i)], b[:, K * i :]  # a moves down by a block, b does not
        for r in range(K):
            column = below[r, r:]
            for q in range(K) if i > 0 else ():  # makes b_q zero in this row
                row = ahead[q, r:]
                ratio = row[0] / column[0]
                turn = ratio * (e[q] / d[r])
                rest = torch.addcmul(one, ratio, turn, value=-1)
                column.addcmul_(row, turn, value=-1)
                row.addcmul_(column, ratio / rest, value=-1)
                d[r], e[q] = d[r] / rest, e[q] * rest
                lowest = torch.minimum(lowest, rest)
            solution = right[:, r] / column[0]
            total.addcdiv_(solution.square(), d[r])
            right[:, r:].addcmul_(column, solution[:, None], value=-1)
        right = right[:, K:]
    return total.masked_fill(~(lowest > 0), torch.nan)


def ratio_masks(spectra: Tensor) -> Tensor:
    """Which share of the sources' power each source has: p_k / sum_k p_k, in [0, 1].

    spectra [B, K, ..., mels, frames] is log10 of power, of each of K sources. Where all are silent, shares are equal.
    """
    return (spectra * torch.log(torch.tensor(10.0))).softmax(dim=1)


def binary_masks(spectra: Tensor) -> Tensor:
    """1 where a source is the loudest, else 0: spectra as in `ratio_masks`."""
    return (spectra == spectra.amax(1, keepdim=True)).to(spectra.dtype)


def released_masks(spectra: Tensor, mixture: Tensor, *, binary: bool = False) -> Tensor:
    """The DeepAVFusion release's: p_k / (p_k + p) with the power p of the mixture; binary: 1 where p_k > p.

    Both are log10 of power, of the same shape. Where sources do not overlap, that is 1/2 and not 1.
    """
    power, whole = 10**spectra, 10**mixture
    return (power > whole).to(power.dtype) if binary else (power / (power + whole + 1e-5)).clamp(0, 1)


def apply_mask(mixture: Tensor, mask: Tensor, mel: LogMel, *, released: bool = False) -> Tensor:
    """Filter mixtures [B, samples] by masks [B, mels, frames] of their log-mel spectrograms; returns [B, samples].

    A bin of the spectrum gets the mean of the masks of the bands that it is in, weighted as the filter bank weights
    them; bins in no band get that of the nearest; the last frame, which the spectrogram drops, that of the one before.

    `released`: as the DeepAVFusion release, which weights and does not divide by the sum of the weights, so that bins
    in no band, and the last frame, are silent.
    """
    spectrum = _stft(mixture, mel)
    weight = mel.fbanks.clone()  # [bins, mels]
    if released:
        gain = weight @ mask.to(spectrum.real.dtype)
        return _istft(spectrum * F.pad(gain, (0, spectrum.shape[-1] - gain.shape[-1])), mel, mixture.shape[-1])
    bins = torch.arange(len(weight), device=weight.device)
    centers = weight.T @ bins.to(weight.dtype) / weight.sum(0).clamp(min=1e-12)
    for index in (weight.sum(1) == 0).nonzero().flatten().tolist():
        weight[index, (centers - index).abs().argmin()] = 1
    gain = (weight / weight.sum(1, keepdim=True)) @ mask.to(spectrum.real.dtype)
    last = gain[..., -1:].expand(-1, -1, spectrum.shape[-1] - gain.shape[-1])
    return _istft(spectrum * torch.cat((gain, last), dim=-1), mel, mixture.shape[-1])


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
    owner = F.one_hot(fit.argmax(1), len(sources)).double()
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
