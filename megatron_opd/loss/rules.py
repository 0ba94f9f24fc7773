"""What goes with what among the settings of the loss.

Each rule is (is it so, what to tell the user), the line in terms of the config's keys.
"""

import math
from typing import TYPE_CHECKING

from megatron_opd.loss import names, reward_rules
from megatron_opd.loss.names import WITHOUT_TEACHER, Rules, shown

if TYPE_CHECKING:
    from megatron_opd.loss.objective import Objective


def contradictions(o: "Objective") -> Rules:
    """Yield what excludes what among the settings."""
    yield from names.unknown(o)
    yield from _numbers(o)
    yield from _divergence_and_form(o)
    yield from _sets(o)
    yield from reward_rules.contradictions(o)
    yield from _target(o)
    yield from _correction(o)
    yield (
        o.rollout_temperature is None and any("log_ratio_N" in w.wants for w in o.token_weights),
        "objective.weights: one compares the student with the engine that drew the responses, but "
        "rollout_temperature is None: none did (rollout.engine=replay); leave it out",
    )
    yield (
        (o.aggregation == "seq-mean-token-sum-norm") != (o.fixed_length is not None),
        f"objective.fixed_length: got {o.fixed_length}, expected a length exactly when "
        "aggregation=seq-mean-token-sum-norm, which divides by it",
    )
    yield (
        bool(o.position_bucket) and o.max_tokens is None,
        "max_tokens: missing, but position_bucket needs the length of the longest response",
    )


def _numbers(o: "Objective") -> Rules:
    for name in ("k", "chunk_tokens", "fixed_length"):
        value = getattr(o, name)
        wrong = value is not None and value < 1
        yield wrong, f"objective.{name}: got {value}, expected 1 or more"
    for name in ("student_temperature", "teacher_temperature", "rollout_temperature"):
        value = getattr(o, name)
        wrong = value is not None and not value > 0
        yield wrong, f"objective.{name}: got {value}, expected more than 0"
    for name in ("weight", "outcome"):
        value = getattr(o, name)
        yield not math.isfinite(value), f"objective.{name}: got {value}, expected a number"


def _divergence_and_form(o: "Objective") -> Rules:
    hard, user = o.divergence == "cross_entropy", callable(o.divergence)
    pg, sampled = o.form == "policy_gradient", o.support == "sampled"
    of_one = o.divergence in ("reverse_kl", *WITHOUT_TEACHER)
    yield (
        o.divergence in WITHOUT_TEACHER and not sampled,
        f"objective.support: got {shown(o.support)}, expected 'sampled' with "
        f"objective.divergence={o.divergence}",
    )
    yield (
        sampled and not (of_one or user),
        f"objective.divergence: got '{o.divergence}', expected reverse_kl, cross_entropy or "
        "outcome with objective.support=sampled: the others need more of the distribution than "
        "one token",
    )
    yield (
        o.divergence == "outcome" and not pg,
        "objective.form: got 'direct', expected 'policy_gradient' with divergence=outcome: an "
        "advantage is a number that has no gradient of its own",
    )
    yield (
        sampled and not pg and o.divergence == "reverse_kl" and o.estimator == "k1",
        "objective.estimator: got 'k1' with form=direct, which cannot learn: the gradient of "
        "log p(y) − log q(y) is that of log p(y), whose mean over y ~ p is zero whatever the "
        "teacher says; set objective.form=policy_gradient, or estimator=k2 (reverse KL)",
    )
    yield (
        pg and hard,
        "objective.form: got 'policy_gradient', expected 'direct' with divergence=cross_entropy",
    )
    yield (
        pg and not user and o.divergence not in ("reverse_kl", "outcome"),
        f"objective.divergence: got '{o.divergence}', expected reverse_kl or outcome with "
        "form=policy_gradient, or a function f(s, t) that is the cost of a candidate",
    )


def _sets(o: "Objective") -> Rules:
    one_entry = o.over_set and o.normalize == "support" and o.k == 1 and not o.append_sampled
    may_be_more = o.support in ("union", "union-intersection") or callable(o.support)
    yield (
        one_entry and not may_be_more,
        "objective.k: got 1, expected 2 or more: renormalised over one entry both models give it "
        "probability 1 and the gradient is zero; for one token a position set support=sampled",
    )
    yield (
        o.append_sampled and not o.over_set,
        f"objective.append_sampled: got true, expected false with support={shown(o.support)}, "
        "which has the sampled token already",
    )
    nothing_left = not o.over_set or o.normalize != "vocab"
    yield (
        o.tail and (nothing_left or o.form == "policy_gradient"),
        "objective.tail: got true, expected false unless a top-k support is normalised over the "
        "vocabulary (normalize=vocab) in the direct form: elsewhere nothing is left for a tail",
    )


def _target(o: "Objective") -> Rules:
    yield (
        o.divergence in WITHOUT_TEACHER and (o.extrapolation != 1.0 or o.veto != 0.0),
        f"objective.extrapolation, objective.veto: {o.divergence} has no teacher to change",
    )
    yield (
        not math.isfinite(o.extrapolation),
        f"objective.extrapolation: got {o.extrapolation}, expected a number",
    )
    yield (
        not 0 <= o.veto < 1,
        f"objective.veto: got {o.veto:g}, expected 0 or more and less than 1, where the target "
        "would be the student itself",
    )
    rescaled = o.jsd_rescale and 0 <= o.jsd_beta <= 1
    yield (
        o.divergence == "jsd" and not (0 < o.jsd_beta < 1 or rescaled),
        f"objective.jsd_beta: got {o.jsd_beta:g}, expected between 0 and 1: at the ends JSD is "
        "zero; set jsd_rescale=true for its limits, or divergence=forward_kl (0), reverse_kl (1)",
    )
    yield (
        o.divergence == "skew_kl" and not 0 < o.skew_alpha < 1,
        f"objective.skew_alpha: got {o.skew_alpha:g}, expected between 0 and 1; 0 is forward_kl",
    )


def _correction(o: "Objective") -> Rules:
    kind, low, high = o.correction, o.correction_low, o.correction_high
    yield (
        kind != "none" and o.rollout_temperature is None,
        f"rollout.correction: got '{kind}', expected none: no engine drew the responses "
        "(rollout.engine=replay), and so there is none to correct",
    )
    yield (
        not 0 < low <= 1,
        f"rollout.correction_low: got {low:g}, expected more than 0 and at most 1, the ratio of an "
        "engine that agrees with the trainer",
    )
    yield (
        not high >= 1,
        f"rollout.correction_high: got {high:g}, expected 1 or more: 1 is the ratio of an engine "
        "that agrees with the trainer",
    )
    yield (
        kind in ("icepop", "mask") and low == high,
        f"rollout.correction_low, rollout.correction_high: got {low:g} twice, between which "
        f"{kind} keeps no token; lower the one or raise the other",
    )
