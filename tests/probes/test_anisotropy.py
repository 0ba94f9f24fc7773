"""Figures of gradients whose geometry is known, and the same by writing the gradients out."""

import numpy as np
import pytest

from megatron_opd.probes.anisotropy import agreement, aligned, anisotropy
from megatron_opd.probes.gradients import Outer

PROMPTS = np.arange(48) // 4  # 12 of 4 tokens
N = len(PROMPTS)


def gaussian(seed: int, n: int, width: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)) + shift


def written_out(outer: Outer) -> np.ndarray:
    """Return every gradient as a vector, [n, D·A]."""
    return np.einsum("nd,na->nda", *outer).reshape(len(outer.error_nD), -1)


def cosines(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


def test_inner_products_are_those_of_the_gradients_written_out():
    one, other = (Outer(gaussian(s, N, 5), gaussian(s + 1, N, 7)) for s in (0, 2))
    assert one.gram(other) == pytest.approx(written_out(one) @ written_out(other).T)
    assert one.norms() == pytest.approx(np.linalg.norm(written_out(one), axis=1))
    both = Outer.cat([one, other])
    assert written_out(both) == pytest.approx(np.vstack([written_out(one), written_out(other)]))


def test_every_figure_by_its_definition():
    outer = Outer(gaussian(0, N, 5, 0.4), gaussian(1, N, 7, 0.3))
    found, g = anisotropy(outer, PROMPTS), written_out(outer)
    apart = PROMPTS[:, None] != PROMPTS
    energy = np.square(g).sum(1)
    assert (found.tokens, found.prompts) == (N, 12)
    assert found.cosine.value == pytest.approx(cosines(g)[apart].mean())
    assert found.errors == pytest.approx(cosines(outer.error_nD)[apart].mean())
    assert found.inputs == pytest.approx(cosines(outer.input_nA)[apart].mean())
    assert found.coherence == pytest.approx(np.square(g.sum(0)).sum() / (N * energy.sum()))
    for rank, x in ((found.rank_energy, g), (found.rank, g / np.sqrt(energy)[:, None])):
        spectrum = np.linalg.svd(x, compute_uv=False) ** 2
        assert rank == pytest.approx(spectrum.sum() ** 2 / np.square(spectrum).sum())
    signal = (g @ g.T)[apart].mean()
    assert found.snr.value == pytest.approx(signal / (energy.mean() - signal))
    assert found.top_decile == pytest.approx(np.sort(energy)[-5:].sum() / energy.sum())


def test_parallel_and_orthogonal_gradients():
    parallel = anisotropy(Outer(np.ones((N, 3)), np.full((N, 4), 2.0)), PROMPTS)
    assert parallel.cosine == pytest.approx((1, 1, 1)) and parallel.rank == pytest.approx(1)
    assert parallel.coherence == pytest.approx(1) and parallel.shuffled.cosine == pytest.approx(1)
    orthogonal = anisotropy(Outer(np.eye(N), np.ones((N, 4))), PROMPTS)
    assert orthogonal.cosine == pytest.approx((0, 0, 0)) and orthogonal.rank == pytest.approx(N)
    assert orthogonal.coherence == pytest.approx(1 / N) and orthogonal.snr.value < 1e-12


def test_the_signs_tell_a_common_direction_from_none():
    above = 0
    for seed in range(40):
        none = anisotropy(Outer(gaussian(seed, N, 30), gaussian(seed + 99, N, 30)), PROMPTS)
        above += none.cosine.value > none.cosine_signs
    assert above <= 6  # of 2 expected
    common = anisotropy(Outer(gaussian(0, N, 30, 0.7), gaussian(1, N, 30, 0.7)), PROMPTS)
    assert common.cosine.low > 2 * common.cosine_signs
    assert common.coherence > 2 * common.coherence_signs


def test_what_a_prompts_tokens_share_is_no_common_direction():
    own = np.repeat(gaussian(3, 12, 40), 4, axis=0)  # one gradient a prompt
    found = anisotropy(Outer(own, np.ones((N, 2))), PROMPTS)
    assert found.coherence > 2 / N  # four times the 1/n of orthogonal ones, less chance
    assert found.coherence < found.coherence_signs and found.cosine.value < found.cosine_signs


def test_shuffling_leaves_what_errors_and_inputs_have_alone():
    errors, inputs = gaussian(4, N, 9, 0.5), gaussian(5, N, 9, 0.5)
    apart = anisotropy(Outer(errors, inputs), PROMPTS)
    assert apart.shuffled.cosine == pytest.approx(apart.errors * apart.inputs, rel=0.1)
    assert apart.shuffled.cosine == pytest.approx(apart.cosine.value, rel=0.25)
    paired = anisotropy(Outer(errors, errors), PROMPTS)
    assert paired.cosine.value > 1.2 * paired.shuffled.cosine


def test_alignment_of_means():
    ones = np.ones((N, 1))
    one, other, against = (
        Outer(gaussian(seed, N, 20) + shift, ones) for seed, shift in ((6, 1), (7, 1), (8, -1))
    )
    assert aligned(one, PROMPTS, other, PROMPTS).value == pytest.approx(1, abs=0.1)
    assert aligned(one, PROMPTS, against, PROMPTS).value == pytest.approx(-1, abs=0.1)
    assert aligned(one, PROMPTS, one, PROMPTS).value == pytest.approx(1)
    assert aligned(one, PROMPTS, other.rows(np.arange(N) < 20), PROMPTS[:20]) is None  # 5 prompts
    assert agreement(one, one) == pytest.approx(1)
    assert agreement(one, Outer(-2 * one.error_nD, ones)) == pytest.approx(-1)


def test_tokens_without_a_gradient_have_no_direction():
    outer = Outer(gaussian(9, N, 5, 0.4), gaussian(10, N, 7))
    silent = np.arange(N) % 3 == 0
    outer.error_nD[silent] = 0
    found, rest = anisotropy(outer, PROMPTS), anisotropy(outer.rows(~silent), PROMPTS[~silent])
    assert found == rest and found.tokens == 32
    assert anisotropy(Outer(np.zeros((N, 5)), np.ones((N, 2))), PROMPTS) is None
