"""Do the gradients of single tokens point in a common direction?

g_t is what goes through token t of the loss's gradient for the weights of one linear layer (see
`gradients`). Of n sampled tokens of the student's responses:

    cosine     mean of cos(g_t, g_t') over tokens of different prompts; 0: no common direction.
               Tokens of one prompt share words, whatever there is to learn.
    coherence  ‖Σ g_t‖² / (n Σ ‖g_t‖²): 1/n if gradients are orthogonal, 1 if parallel and of one
               length. A long gradient counts more here; in the cosine all tokens count alike.
    rank       (Σ λ)² / Σ λ² of the spectrum of the cosines' matrix: how many directions the
               gradients use. `rank_energy` is that of the gradients at their own lengths.
    snr        ‖E g‖² / E‖g − E g‖², from pairs of different prompts: a mean over 1/snr tokens is as
               long as its noise.

None of this means much alone: inputs a of a layer have a common direction in any language model,
and gradients δ ⊗ a inherit it. Two null models stand beside the figures. `signs`: the same
gradients with a random sign for each prompt, which keeps lengths and what one prompt's tokens have
in common, and takes what prompts have in common; 95 % of its draws are below the figure given.
`shuffled`: the same δ and the same a, paired at random: what is beyond it needs a δ that goes with
its a. `errors` and `inputs` are the mean cosines of δ and of a alone.

By position, for right and wrong responses, and for tokens on which the top-k sets of student and
teacher overlap less or more than on average. `alignment` of two sets of gradients is the cosine of
their means, without the noise that pairs of one prompt put in; it may pass 1 by what is left.

Shape suffixes: T tokens of all responses · n sampled ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from megatron_opd.loss import Objective, Total
from megatron_opd.probes.anisotropy import Anisotropy, agreement, aligned, anisotropy
from megatron_opd.probes.gradients import Outer, head_products, outer_products
from megatron_opd.probes.length import bucket
from megatron_opd.probes.pair import Pair
from megatron_opd.probes.statistics import FEWEST, Estimate
from megatron_opd.told import Array, Told

SUPPORTS: dict[str, dict[str, Any]] = {  # the reverse KL elsewhere
    "sampled": {"form": "policy_gradient"},
    "full": {},
    "student_topk": {},
    "teacher_topk": {},
}


def probe(pair: Pair, tokens: int, supports: Sequence[str]) -> dict[str, Any]:
    """Return how coherent the gradients of `tokens` tokens are, for the run's objective and others.

    Raises:
        ValueError: the objective wants more than student and teacher.
    """
    for wrong, line in _misfits(pair.objective):
        if wrong:
            raise ValueError(line)
    told = pair.look(pair.write("student", pair.prompts, n=pair.config.rollout.n))
    draw, total = np.random.default_rng(pair.config.seed), len(told.reward_T)
    chosen_n = np.sort(draw.choice(total, size=min(tokens, total), replace=False))
    prompt_n = told.prompt_R[told.rollout_T[chosen_n]]
    sets = token_sets(told, chosen_n, bucket(pair, told))
    objectives = {"objective": pair.objective, **{name: _other(pair, name) for name in supports}}
    products = {name: gradients(pair, o, told, chosen_n) for name, o in objectives.items()}
    return {
        "responses": len(told.rollouts),
        "tokens": total,
        "sampled": {name: int(mask_n.sum()) for name, mask_n in sets.items()},
        "by_objective": {
            name: {layer: described(outer, prompt_n, sets) for layer, outer in by_layer.items()}
            for name, by_layer in products.items()
        },
        "between_objectives": {
            f"{one} and {other}": {
                layer: {
                    "cosine": agreement(outer, products[other][layer]),
                    "alignment": aligned(outer, prompt_n, products[other][layer], prompt_n),
                }
                for layer, outer in products[one].items()
            }
            for one, other in combinations(products, 2)
        },
    }


def _misfits(objective: Objective | Total) -> Iterator[tuple[bool, str]]:
    yield (
        objective.needs_base,
        "base: a probe knows student and teacher alone; set objective.extrapolation=1 and no base",
    )
    yield (
        objective.needs_reward or objective.group_normalize != "none",
        "objective: wants rewards of whole responses or groups, and the probe is of what the "
        "teacher says of a token; leave out outcome, group_normalize, and terms and weights by "
        "reward",
    )


def _other(pair: Pair, support: str) -> Objective:
    """Return the reverse KL on another support, at the run's k and temperatures."""
    own = pair.lead
    return Objective(
        support=support,
        k=own.k,
        student_temperature=own.student_temperature,
        teacher_temperature=own.teacher_temperature,
        **SUPPORTS[support],
    )


def gradients(
    pair: Pair, objective: Objective | Total, told: Told, chosen_n: Array
) -> dict[str, Outer]:
    """Return the chosen tokens' gradients of every layer, the head's last."""
    parts: dict[str, list[Outer]] = {}
    student, start = pair.models["student"], 0
    head = student.head(pair.vocab_size)
    for batch in pair.bench.batches(told.rollouts):
        stop = start + len(batch.target_N)
        here = chosen_n[(chosen_n >= start) & (chosen_n < stop)] - start
        start = stop
        if not len(here):
            continue
        batch, rows = (
            batch.to(pair.parallel.device),
            torch.from_numpy(here).to(pair.parallel.device),
        )
        judged = pair.score(batch)
        kept: list[torch.Tensor] = []

        def hidden(batch=batch, kept=kept):
            kept.append(pair.hidden(batch))
            return kept[0]

        def loss(hidden_NH, batch=batch, judged=judged):
            return objective(hidden_NH, head, batch, judged).loss

        found = outer_products(student, batch, hidden, loss, rows)
        found["head"] = head_products(objective, kept[0], head, batch, judged, rows)
        for layer, outer in found.items():
            parts.setdefault(layer, []).append(outer)
    return {layer: Outer.cat(of_layer) for layer, of_layer in parts.items()}


def token_sets(told: Told, chosen_n: Array, width: int) -> dict[str, Array]:
    """Return which of the chosen tokens are in which set: a mask by name."""
    right_n = told.right_R[told.rollout_T[chosen_n]]
    overlap_n = told.metric_T["distill/overlap_ratio"][chosen_n]
    position_n = told.position_T[chosen_n]
    above_n = overlap_n > overlap_n.mean()
    buckets = {
        f"position {first}–{first + width - 1}": position_n // width == first // width
        for first in range(0, int(position_n.max()) + 1, width)
    }
    return {
        "all": np.ones(len(chosen_n), bool),
        "right": right_n,
        "wrong": ~right_n,
        "overlap below mean": ~above_n,
        "overlap above mean": above_n,
        **buckets,
    }


def described(outer: Outer, prompt_n: Array, sets: Mapping[str, Array]) -> dict[str, Any]:
    """Return the figures of every set of tokens, and how sets that part all tokens are aligned."""
    own = {name: (outer.rows(mask_n), prompt_n[mask_n]) for name, mask_n in sets.items()}
    means = {name: anisotropy(*of_set) for name, of_set in own.items()}
    positions = [name for name, mean in means.items() if name.startswith("position") and mean]
    pairs = [("right", "wrong"), ("overlap below mean", "overlap above mean")]
    pairs += [(positions[0], positions[-1])] * (len(positions) > 1)
    return {
        "sets": means,
        "alignment": {
            f"{one} and {other}": aligned(*own[one], *own[other]) for one, other in pairs
        },
    }


def table(found: dict[str, Any]) -> list[str]:
    """Return the figures as lines: all tokens by layer, then sets of tokens at the head."""
    lines = [
        f"{found['sampled']['all']} of {found['tokens']} tokens of {found['responses']} responses; "
        "signs: 95 % of random signs leave less",
        f"{'':<34} {COLUMNS}",
    ]
    for name, by_layer in found["by_objective"].items():
        lines += [
            f"{f'{name}, {layer}':<34} {_row(own['sets']['all'])}"
            for layer, own in by_layer.items()
        ]
    head = found["by_objective"]["objective"]["head"]
    lines += ["", f"{'objective, head: sets of tokens':<34} {COLUMNS}"]
    lines += [f"{name:<34} {_row(own)}" for name, own in head["sets"].items() if name != "all"]
    lines += ["", "alignment of mean directions, head"]
    lines += [f"{name:<56} {_shown(one)}" for name, one in head["alignment"].items()]
    for name, by_layer in found["between_objectives"].items():
        same, together = by_layer["head"]["cosine"], by_layer["head"]["alignment"]
        told = f"{_shown(together)}, of one token {_number(same)}"
        lines.append(f"{name:<56} {told}")
    return lines


COLUMNS = "tokens  cosine (95 %)                signs   shuffled  rank  coherence  signs   1/snr"


def _row(own: Anisotropy | None) -> str:
    if own is None:
        return f"{'-':>6}  tokens of fewer than {FEWEST} prompts"
    tokens = 1 / own.snr.value if own.snr and own.snr.low > 0 else None
    return (
        f"{own.tokens:>6}  {_shown(own.cosine):<27}  {own.cosine_signs:.4f}  "
        f"{own.shuffled.cosine:>8.4f}  {own.rank:>4.0f}  {own.coherence:>9.4f}  "
        f"{own.coherence_signs:.4f}  {'-' if tokens is None else f'{tokens:.0f}'}"
    )


def _shown(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
