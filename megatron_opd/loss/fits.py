"""What goes together: the terms of a sum, and a call with what it brings.

Each rule is (is it so, what to tell the user), the line in terms of the config's keys.
"""

import re
from typing import TYPE_CHECKING

from megatron_opd.loss.names import WITHOUT_TEACHER, Rules
from megatron_opd.loss.shard import Ranks
from megatron_opd.types import Head, HiddenScores, Microbatch, Scores, TopKScores

if TYPE_CHECKING:
    from megatron_opd.loss.objective import Objective
    from megatron_opd.loss.total import Total


def disagreements(total: "Total") -> Rules:
    """Yield what the terms of a sum cannot all have."""
    terms, first, lead = total.terms, total.terms[0], total.lead
    ids = [term for term in terms if "rollout_ids_CK" in term.wants]
    grouped = [term for term in terms if term.group_normalize != "none"]
    for term in terms[1:]:
        yield (
            not re.fullmatch(r"\w+", term.name) or term.name in ("objective", "total"),
            f"terms: got '{term.name}', expected a name of letters, digits and underscores other "
            "than 'objective' and 'total', which loss/NAME is logged under",
        )
        yield (
            (term.aggregation == "token-mean") != (first.aggregation == "token-mean"),
            f"terms.{term.name}.aggregation: got '{term.aggregation}', but objective.aggregation="
            f"{first.aggregation}: a sum is divided once, by tokens (token-mean) or by sequences",
        )
    for term in ids:
        yield (
            term.k != lead.k,
            term.told(f"objective.k: got {term.k}, expected ")
            + f"{lead.k} as in {'terms.' * (lead is not first)}{lead.name}: the engine lists its "
            "most likely ids once",
        )
    yield (
        bool(grouped) and (len(grouped) > 1 or any(term.needs_advantage for term in terms)),
        f"{grouped[0].told('objective.group_normalize') if grouped else ''}: a token has one "
        "advantage, which another term wants too; keep one of them",
    )


def misfits(
    o: "Objective", head: Head, batch: Microbatch, teacher: Scores | None, base: Scores | None
) -> Rules:
    """Yield (is it so, what to say) of what the call brings."""
    for name, scores, needed in (
        ("teacher", teacher, o.needs_teacher),
        ("base", base, o.needs_base),
    ):
        yield (
            (scores is not None) != needed,
            f"{name}: got {'none' if scores is None else 'one'}, but "
            f"{asked_by(o, name)} {'needs one' if needed else 'uses none'}",
        )
        yield from _unserved(o, name, scores, head)
    yield (
        "rollout_ids_CK" in o.wants and batch.rollout_ids_NK is None,
        "objective.support: rollout_topk needs the engine's top ids with every rollout, and "
        "these have none",
    )
    yield (
        o.needs_reward and (batch.reward_N is None or batch.advantage_N is None),
        "reward: these responses have none, but the objective wants them; set reward.function",
    )
    yield (
        o.group_normalize != "none" and batch.advantage_N is None,
        "objective.group_normalize: the tokens' rewards were not compared over their prompts",
    )
    yield (
        o.needs_teacher and o.k > head.vocab_size,
        f"objective.k: got {o.k}, expected at most the vocabulary's {head.vocab_size}",
    )


def asked_by(o: "Objective", what: str) -> str:
    """Return the setting for which a frozen model is there, or is not; or a reward."""
    if what == "reward":
        wants = [w.name for w in o.token_weights if {"reward_N", "advantage_N"} & set(w.wants)]
        alone = "divergence=outcome" if o.divergence == "outcome" else f"outcome={o.outcome:g}"
        return f"objective.{alone}" if o.outcome_weight else f"objective.weights.{wants[0]}"
    if what == "base":
        return f"objective.extrapolation={o.extrapolation}"
    if o.divergence in WITHOUT_TEACHER and o.needs_teacher:
        return "objective.weights"
    return f"objective.divergence={getattr(o.divergence, '__name__', o.divergence)}"


def _unserved(o: "Objective", name: str, scores: Scores | None, head: Head) -> Rules:
    """Yield what these scores cannot say."""
    if isinstance(scores, HiddenScores):
        yield (
            scores.head.vocab_size != head.vocab_size,
            f"{name}: got a head of {scores.head.vocab_size} entries, expected the student's "
            f"{head.vocab_size}; give both the tokenizer's size",
        )
        yield (
            (o.support == "full" or o.baseline == "kl" or o.mixes_vocabulary)
            and Ranks(head.group).size > 1
            and len(scores.head.weight_VH) != len(head.weight_VH),
            f"{name}: got {len(scores.head.weight_VH)} head rows on this rank, expected the "
            f"student's {len(head.weight_VH)}: entries of the whole vocabulary are compared "
            "where they are; build it with the student's padded vocabulary",
        )
    elif scores is not None:
        for obstacle in o.needs_hidden(topk=isinstance(scores, TopKScores)):
            yield True, f"{name}: got {type(scores).__name__}, but {obstacle}"
        yield (
            scores.temperature != o.teacher_temperature,
            f"{name}: scored at temperature {scores.temperature:g}, but objective."
            f"teacher_temperature={o.teacher_temperature:g}",
        )
