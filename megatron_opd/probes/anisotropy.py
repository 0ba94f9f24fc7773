"""How far from isotropic a set of gradients is, from inner products alone.

`coherence` says what each figure means. Means are over pairs of tokens of different prompts: tokens
of one prompt have words in common, whatever there is to learn.

Shape suffixes: n tokens · m tokens of another set · G prompts · R resamples · S draws of signs.
"""

from typing import NamedTuple

import numpy as np

from megatron_opd.probes.gradients import Outer
from megatron_opd.probes.statistics import FEWEST, Estimate, estimate, forms, members
from megatron_opd.told import Array

SIGNS = 400  # draws of one null model
SHUFFLES = 20  # and of the other


class Shuffled(NamedTuple):
    """What is left when each δ gets the a of another token: means of the draws."""

    cosine: float
    rank: float


class Anisotropy(NamedTuple):
    """Figures of one set of gradients, and of their null models."""

    tokens: int  # that have a gradient
    prompts: int
    cosine: Estimate | None
    cosine_signs: float  # 95 % of the draws are below
    errors: float  # mean cosine of δ
    inputs: float  # mean cosine of a
    shuffled: Shuffled
    coherence: float
    coherence_signs: float  # 95 % of the draws are below
    rank: float
    rank_energy: float
    snr: Estimate | None
    top_decile: float  # share of Σ ‖g‖² that the longest tenth of the gradients has


class Pairs(NamedTuple):
    """One inner product, added up over the pairs of tokens of every two different prompts."""

    sum_GG: Array
    count_GG: Array

    @staticmethod
    def of(matrix_nm: Array, member_nG: Array, member_mG: Array) -> "Pairs":
        """Add up; `member` says which token is of which prompt."""
        found = Pairs(
            member_nG.T @ matrix_nm @ member_mG, np.outer(member_nG.sum(0), member_mG.sum(0))
        )
        for x_GG in found:
            np.fill_diagonal(x_GG, 0.0)
        return found

    def means(self, weight_RG: Array) -> Array:
        """Return the mean over all pairs, prompts weighed by each row, [R]."""
        return forms(weight_RG, self.sum_GG) / forms(weight_RG, self.count_GG)

    def mean(self) -> float:
        """Return the mean over all pairs."""
        return float(self.sum_GG.sum() / self.count_GG.sum())


def anisotropy(outer: Outer, prompt_n: Array) -> Anisotropy | None:
    """Return the figures; None where fewer than FEWEST prompts have one."""
    outer, prompt_n = _alive(outer, prompt_n)
    if len(np.unique(prompt_n)) < FEWEST:
        return None
    member_nG = members(prompt_n)
    n, prompts = member_nG.shape
    error_nn, input_nn = (x_nD @ x_nD.T for x_nD in outer.unit())
    gram_nn, cos_nn = outer.gram(outer), error_nn * input_nn
    cosine, error, input_, product = (
        Pairs.of(x_nn, member_nG, member_nG) for x_nn in (cos_nn, error_nn, input_nn, gram_nn)
    )
    energy_n = gram_nn.diagonal()
    energy, sign_SG = energy_n.sum(), _signs(prompts)
    signed_S = forms(sign_SG, member_nG.T @ gram_nn @ member_nG)
    return Anisotropy(
        tokens=n,
        prompts=prompts,
        cosine=estimate(prompts, cosine.means),
        cosine_signs=_below(forms(sign_SG, cosine.sum_GG) / cosine.count_GG.sum()),
        errors=error.mean(),
        inputs=input_.mean(),
        shuffled=shuffled(error_nn, input_nn, prompt_n),
        coherence=float(gram_nn.sum() / (n * energy)),
        coherence_signs=_below(signed_S / (n * energy)),
        rank=float(n**2 / np.square(cos_nn).sum()),
        rank_energy=float(energy**2 / np.square(gram_nn).sum()),
        snr=_snr(product, energy_n @ member_nG, member_nG.sum(0)),
        top_decile=float(np.sort(energy_n)[::-1][: -(-n // 10)].sum() / energy),
    )


def _snr(product: Pairs, energy_G: Array, count_G: Array) -> Estimate | None:
    """Return ‖E g‖² / (E‖g‖² − ‖E g‖²), the first from pairs of different prompts."""

    def ratio(weight_RG: Array) -> Array:
        signal_R = product.means(weight_RG)
        return signal_R / (weight_RG @ energy_G / (weight_RG @ count_G) - signal_R)

    return estimate(len(count_G), ratio)


def _signs(prompts: int) -> Array:
    return np.random.default_rng(0).choice([-1.0, 1.0], size=(SIGNS, prompts))


def shuffled(error_nn: Array, input_nn: Array, prompt_n: Array) -> Shuffled:
    """Pair every δ with a random token's a; what of a pair is of one prompt is left out."""
    draw, found = np.random.default_rng(0), []
    for _ in range(SHUFFLES):
        order_n = draw.permutation(len(prompt_n))
        cos_nn = error_nn * input_nn[np.ix_(order_n, order_n)]
        other_n = prompt_n[order_n]
        apart_nn = (prompt_n[:, None] != prompt_n) & (other_n[:, None] != other_n)
        found.append((cos_nn[apart_nn].mean(), len(cos_nn) ** 2 / np.square(cos_nn).sum()))
    return Shuffled(*np.mean(found, axis=0).tolist())


def aligned(one: Outer, prompt_n: Array, other: Outer, prompt_m: Array) -> Estimate | None:
    """Return cos(E ĝ, E ĝ') of two sets of gradients at length 1; None where one has none.

    All three inner products are of pairs of different prompts, so that no token meets itself. By
    the noise of what is left it may pass 1.
    """
    (one, prompt_n), (other, prompt_m) = _alive(one, prompt_n), _alive(other, prompt_m)
    if min(len(np.unique(prompt_n)), len(np.unique(prompt_m))) < FEWEST:
        return None
    member_nG, member_mG = np.split(members(np.append(prompt_n, prompt_m)), [len(prompt_n)])
    x, y = one.unit(), other.unit()
    across, mine, theirs = (
        Pairs.of(x.gram(y), member_nG, member_mG),
        Pairs.of(x.gram(x), member_nG, member_nG),
        Pairs.of(y.gram(y), member_mG, member_mG),
    )

    def cosine(weight_RG: Array) -> Array:
        mine_R, theirs_R = mine.means(weight_RG), theirs.means(weight_RG)
        lengths_R = np.where(np.minimum(mine_R, theirs_R) > 0, mine_R * theirs_R, np.nan)
        return across.means(weight_RG) / np.sqrt(lengths_R)

    return estimate(member_nG.shape[1], cosine)


def agreement(one: Outer, other: Outer) -> float | None:
    """Return the mean of cos(g_t, g'_t) over the tokens of which both losses make a gradient."""
    alive_n = (one.norms() > 0) & (other.norms() > 0)
    if not alive_n.any():
        return None
    pairs = zip(one.rows(alive_n).unit(), other.rows(alive_n).unit(), strict=True)
    return float(np.prod([(x_nD * y_nD).sum(1) for x_nD, y_nD in pairs], axis=0).mean())


def _alive(outer: Outer, prompt_n: Array) -> tuple[Outer, Array]:
    """Leave out tokens without a gradient: they have no direction."""
    alive_n = outer.norms() > 0
    return outer.rows(alive_n), prompt_n[alive_n]


def _below(value_S: Array) -> float:
    return float(np.quantile(value_S, 0.95))
