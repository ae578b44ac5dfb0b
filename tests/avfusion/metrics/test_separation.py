"""Source separation metrics: mir_eval's figures, silence, masks, and what the baselines can and cannot do."""

import warnings

import mir_eval
import numpy as np
import pytest
import torch

from avfusion.media.transforms import LogMel
from avfusion.metrics.separation import (
    apply_mask,
    bss_eval,
    correlations,
    nmf,
    ratio_masks,
    rpca,
    toeplitz_energies,
)


def signals(batch, sources, samples, seed):
    """References, and estimates with interference, echoes and noise of many strengths."""
    g = torch.Generator().manual_seed(seed)
    references = torch.randn(batch, sources, samples, generator=g, dtype=torch.float64)
    references = torch.cumsum(references, -1) * 0.05 + references  # not white
    strength = 10 ** (torch.rand(3, batch, sources, 1, generator=g, dtype=torch.float64) * 3 - 2.5)
    noise = torch.randn(references.shape, generator=g, dtype=torch.float64)
    echo = references.roll(7, -1)
    return references, references + strength[0] * references.roll(1, 1) + strength[1] * echo + strength[2] * noise


def of_mir_eval(references, estimates):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated there
        pairs = zip(references.numpy(), estimates.numpy(), strict=True)
        found = [mir_eval.separation.bss_eval_sources(r, e, compute_permutation=False)[:3] for r, e in pairs]
    return torch.from_numpy(np.stack([np.stack(x) for x in found], axis=1))


@pytest.mark.parametrize(("batch", "sources", "samples"), [(6, 2, 3000), (2, 3, 2000), (2, 1, 1600), (1, 2, 16000)])
def test_figures_are_mir_evals(batch, sources, samples):
    references, estimates = signals(batch, sources, samples, seed=samples)
    ours, theirs = torch.stack(bss_eval(references, estimates)), of_mir_eval(references, estimates)
    meaningful = theirs.abs() < 100  # one source alone has no interference: rounding, here and there
    assert meaningful.sum() >= batch * sources * 2
    assert (ours - theirs)[meaningful].abs().max() < 1e-3


@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_figures_are_mir_evals_where_tones_make_the_projections_ill_conditioned(decay):
    t = torch.arange(16000, dtype=torch.float64) / 16000
    tones = [sum(0.6**h * torch.sin(2 * torch.pi * f * (h + 1) * t) for h in range(6)) for f in (220.0, 330.5)]
    g = torch.Generator().manual_seed(int(decay))
    references = torch.stack(tones) * torch.exp(-decay * t) * torch.hann_window(16000, dtype=torch.float64)
    references = references[None] + 1e-5 * torch.randn(1, 2, 16000, generator=g, dtype=torch.float64)
    noise = torch.randn(1, 2, 16000, generator=g, dtype=torch.float64)
    estimates = references + 0.1 * references.flip(1) + 1e-3 * noise
    ours, theirs = torch.stack(bss_eval(references, estimates)), of_mir_eval(references, estimates)
    assert (ours - theirs).abs().max() < 1e-3


def test_correlations_are_those_written_out():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 100, generator=g), torch.randn(2, 3, 100, generator=g)
    for taps in (1, 3, 7):
        found = correlations(x, y, taps)
        assert found.shape == (2, 2, 3, taps)
        for t in range(taps):
            expected = torch.einsum("bpn,bqn->bpq", x[..., : 100 - t], y[..., t:])
            torch.testing.assert_close(found[..., t], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_toeplitz_energies_are_those_of_the_whole_matrix(sources):
    taps, batch = 9, 50
    g = torch.Generator().manual_seed(sources)
    x = torch.randn(batch, sources, 60, generator=g, dtype=torch.float64)
    x = x + 3 * x.roll(1, -1)
    delayed = torch.stack([torch.nn.functional.pad(x, (i, taps - i)) for i in range(taps)], dim=1).flatten(1, 2)
    right = torch.randn(batch, taps * sources, 2, generator=g, dtype=torch.float64)
    expected = (right * torch.linalg.solve(delayed @ delayed.mT, right)).sum(1)
    gram = correlations(x, x, taps).permute(1, 2, 3, 0)
    rows = right.permute(2, 1, 0).unflatten(1, (taps, sources)).transpose(1, 2)
    torch.testing.assert_close(toeplitz_energies(gram, rows).T, expected)
    gram[0, 0, 1, 7] = 2 * gram[0, 0, 0, 7]  # no longer positive definite
    found = toeplitz_energies(gram, rows).T
    assert found[7].isnan().all()
    torch.testing.assert_close(found[torch.arange(batch) != 7], expected[torch.arange(batch) != 7])


def test_a_perfect_estimate_has_no_distortion():
    references, _ = signals(2, 2, 1000, seed=5)
    for score in bss_eval(references, references, taps=16):
        assert (score > 100).all()


def test_written_out_projections_on_many_short_signals():
    """Least squares on the matrix of delayed references, with few taps."""
    taps = 5
    references, estimates = signals(300, 2, 40, seed=1)
    ours = torch.stack(bss_eval(references, estimates, taps=taps))
    for b in range(300):
        delayed = torch.zeros(2, taps, 40 + taps - 1, dtype=torch.float64)
        for i in range(taps):
            delayed[:, i, i : i + 40] = references[b]
        for j in range(2):
            e = torch.cat((estimates[b, j], torch.zeros(taps - 1, dtype=torch.float64)))
            one, everything = (a.T @ torch.linalg.lstsq(a.T, e[:, None]).solution for a in
                               (delayed[j], delayed.flatten(0, 1)))  # fmt: skip
            one, everything = one[:, 0], everything[:, 0]
            ratios = [one.norm() / (e - one).norm(), one.norm() / (everything - one).norm(),
                      everything.norm() / (e - everything).norm()]  # fmt: skip
            expected = 20 * torch.stack(ratios).log10()
            torch.testing.assert_close(ours[:, b, j], expected, rtol=0, atol=1e-6)


def test_methods_that_share_references_get_the_figures_that_each_would_get():
    references, estimates = signals(3, 2, 1000, seed=4)
    both = torch.stack((estimates, estimates.flip(0)))
    together = torch.stack(bss_eval(references, both, taps=32))
    assert together.shape == (3, 2, 3, 2)
    for m in range(2):
        torch.testing.assert_close(together[:, m], torch.stack(bss_eval(references, both[m], taps=32)))


def test_silence_is_nan_and_leaves_others_alone():
    references, estimates = signals(3, 2, 1000, seed=2)
    expected = torch.stack(bss_eval(references, estimates, taps=16))
    references[0, 1] = 0  # the projections of this pair are not defined
    estimates[1, 0] = 0
    got = torch.stack(bss_eval(references, estimates, taps=16))
    assert got[:, 0].isnan().all()
    assert got[:, 1, 0].isnan().all()
    torch.testing.assert_close(got[:, 1, 1], expected[:, 1, 1])
    torch.testing.assert_close(got[:, 2], expected[:, 2])
    references[2, 1] = references[2, 0]
    assert torch.stack(bss_eval(references, estimates, taps=16))[1:, 2].isnan().all()


def test_scale_and_delay_cost_nothing():
    references, _ = signals(1, 2, 4000, seed=3)
    references[..., -100:] = 0
    delayed = 0.3 * references.roll(20, -1)
    assert bss_eval(references, delayed, taps=64)[0].min() > 100
    assert bss_eval(references, delayed, taps=16)[0].max() < 10
    mixed = delayed + references.roll(1, 1) + 0.1 * torch.randn_like(delayed)
    torch.testing.assert_close(bss_eval(references, mixed, 64), bss_eval(7 * references, 0.1 * mixed, 64))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"of 512 samples or more, got \[1, 2, 100\] and \[1, 2, 100\]"):
        bss_eval(torch.zeros(1, 2, 100), torch.zeros(1, 2, 100))
    with pytest.raises(ValueError, match=r"got \[1, 2, 600\] and \[1, 1, 600\]"):
        bss_eval(torch.zeros(1, 2, 600), torch.zeros(1, 1, 600))


def tones(seconds=1.0):
    """Two sources that share no band, at different times."""
    t = torch.arange(int(16000 * seconds)) / 16000
    low, high = torch.sin(2 * torch.pi * 300 * t), torch.sin(2 * torch.pi * 3000 * t)
    return torch.stack((0.3 * low * (t % 0.5 < 0.3), 0.3 * high * (t % 0.4 > 0.1)))


def test_ratio_masks_are_shares_of_power():
    g = torch.Generator().manual_seed(0)
    spectra = torch.randn(1000, 2, 3, 4, generator=g) * 4
    masks = ratio_masks(spectra)
    power = 10 ** spectra.double()
    torch.testing.assert_close(masks.double(), power / power.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    silent = ratio_masks(torch.full((1, 2, 1, 1), -7.0))
    assert silent.flatten().tolist() == pytest.approx([0.5, 0.5])


def test_a_mask_of_ones_changes_nothing_and_the_oracle_separates():
    mel, sources = LogMel(), tones()
    mixture = sources.sum(0, keepdim=True)
    ones = torch.ones(1, 128, mixture.shape[-1] // 250)
    torch.testing.assert_close(apply_mask(mixture, ones, mel), mixture, rtol=0, atol=1e-5)
    assert apply_mask(mixture, 0 * ones, mel).abs().max() < 1e-6
    masks = ratio_masks(mel(sources[:, None])[None])[0, :, 0]
    estimates = apply_mask(mixture.expand(2, -1), masks, mel)
    ours, plain = (bss_eval(sources[None], x[None])[0].mean() for x in (estimates, mixture.expand(2, -1)))
    assert ours > plain + 20


def test_baselines_add_up_and_nmf_separates_what_never_overlaps():
    mel, sources = LogMel(), tones()
    mixture = sources.sum(0)
    for parts in (nmf(mixture, sources, mel, components=4), rpca(mixture, mel)):
        assert parts.shape == sources.shape
        torch.testing.assert_close(parts.sum(0), mixture, rtol=0, atol=1e-4)
    found, plain = (bss_eval(sources[None], x[None])[0].mean()
                    for x in (nmf(mixture, sources, mel, components=4), mixture.expand(2, -1)))  # fmt: skip
    assert found > plain + 10
    assert rpca(torch.zeros(4000), mel).abs().max() == 0
    assert nmf(torch.zeros(4000), torch.zeros(2, 4000), mel).abs().max() == 0


def test_robust_pca_keeps_what_repeats_apart_from_what_does_not():
    mel, g = LogMel(), torch.Generator().manual_seed(0)
    t = torch.arange(32000) / 16000
    hum = 0.2 * torch.sin(2 * torch.pi * 440 * t)
    bursts = torch.zeros(32000)  # here and there in time and pitch
    for at in range(0, 32000, 4000):
        pitch = 1000 + 6000 * torch.rand((), generator=g)
        bursts[at : at + 800] = 0.2 * torch.sin(2 * torch.pi * pitch * t[:800])
    low, sparse = rpca(hum + bursts, mel)
    assert low @ hum > 0.6 * hum @ hum
    assert sparse @ bursts > 0.6 * bursts @ bursts
