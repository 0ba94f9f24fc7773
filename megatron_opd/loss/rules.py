"""What goes with what: settings that exclude each other, and calls that do not fit them.

Each rule is (is it so, what to tell the user), the line in terms of the config's keys.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from megatron_opd.loss import divergences, supports
from megatron_opd.loss.weights import WEIGHTS

if TYPE_CHECKING:
    from megatron_opd.loss.objective import Objective

SUPPORTS = (*supports.SUPPORTS, "full")
WITHOUT_TEACHER = ("cross_entropy", "outcome")
DIVERGENCES = (*divergences.OVER_A_SET, *WITHOUT_TEACHER)
REWARDS = ("baseline", "reward_floor", "reward_cap")  # what is done to a token's own
Rules = Iterator[tuple[bool, str]]


def contradictions(o: "Objective") -> Rules:
    """Yield what excludes what among the settings."""
    yield from _unknown_names(o)
    yield from _numbers(o)
    yield from _divergence_and_form(o)
    yield from _sets(o)
    yield from _rewards(o)
    yield from _outcome(o)
    yield from _groups(o)
    yield from _clip(o)
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
        f"objective.support: got {_show(o.support)}, expected 'sampled' with "
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
        f"objective.append_sampled: got true, expected false with support={_show(o.support)}, "
        "which has the sampled token already",
    )
    nothing_left = not o.over_set or o.normalize != "vocab"
    yield (
        o.tail and (nothing_left or o.form == "policy_gradient"),
        "objective.tail: got true, expected false unless a top-k support is normalised over the "
        "vocabulary (normalize=vocab) in the direct form: elsewhere nothing is left for a tail",
    )


def _rewards(o: "Objective") -> Rules:
    pg, sampled = o.form == "policy_gradient", o.support == "sampled"
    given = _given(o, *REWARDS, "discount", "center_on_support")
    yield (
        not pg and bool(given),
        f"objective.{given[0] if given else ''}: only form=policy_gradient has rewards; set that, "
        "or leave it out",
    )
    for name in ("center_on_support", "discount"):
        for_sampled = name == "discount"
        yield (
            name in given and sampled != for_sampled,
            f"objective.{name}: expected a {'sampled' if for_sampled else 'top-k or full'} "
            f"support, got {_show(o.support)}",
        )
    yield (
        o.baseline == "mean" and not sampled,
        "objective.baseline: got 'mean', expected it with support=sampled; over a set, "
        "center_on_support takes the mean",
    )
    yield (
        o.baseline != "none" and o.center_on_support,
        f"objective.baseline: got '{o.baseline}', which center_on_support takes away again; "
        "choose one",
    )
    yield (
        not o.reward_weight_normalize and o.over_set and o.normalize != "vocab",
        "objective.reward_weight_normalize: got false, expected true unless normalize=vocab: "
        "renormalised on the support, probabilities are weights already",
    )
    yield (
        not 0 <= o.discount <= 1,
        f"objective.discount: got {o.discount:g}, expected 0 to 1",
    )
    low, high = o.reward_floor, o.reward_cap
    yield (
        low is not None and high is not None and low >= high,
        f"objective.reward_floor: got {low}, expected less than objective.reward_cap={high}",
    )


def _given(o: "Objective", *names: str) -> list[str]:
    """Return which of these options have another value than they have by default."""
    defaults = {field.name: field.default for field in fields(o)}
    return [name for name in names if getattr(o, name) != defaults[name]]


def _outcome(o: "Objective") -> Rules:
    alone, drawn = o.divergence == "outcome", _of_drawn(o)
    given = _given(o, *REWARDS, "discount")
    yield (
        alone and bool(given),
        f"objective.{''.join(given[:1])}: expected its default with divergence=outcome, whose one "
        "reward is the response's advantage (reward.normalize)",
    )
    yield (
        alone and o.outcome != 0,
        f"objective.outcome: got {o.outcome:g}, expected 0 with divergence=outcome, which is that "
        "advantage alone; set objective.weight",
    )
    yield (
        o.outcome != 0 and not drawn,
        f"objective.outcome: got {o.outcome:g}, expected 0 unless support=sampled and "
        "form=policy_gradient: a response's advantage is of the tokens that were drawn; beside "
        "another support set a term with divergence=outcome",
    )


def _groups(o: "Objective") -> Rules:
    grouped = o.group_normalize != "none"
    ratio = _of_drawn(o) and o.divergence == "reverse_kl" and o.estimator == "k1"
    given = _given(o, *REWARDS, "outcome", "extrapolation", "veto")
    yield (
        grouped and not ratio,
        f"objective.group_normalize: got '{o.group_normalize}', expected 'none' unless "
        "support=sampled, form=policy_gradient, divergence=reverse_kl and estimator=k1: what is "
        "normalised over a prompt's responses is log q − log p of the tokens drawn",
    )
    yield (
        grouped and bool(given),
        f"objective.{''.join(given[:1])}: expected its default with objective.group_normalize: "
        "the rewards that it compares are log q − log p as they are",
    )
    yield (
        grouped and any("advantage_N" in weight.wants for weight in o.token_weights),
        "objective.weights: one wants the response's advantage, but with objective."
        "group_normalize every token has one of its own; leave it out",
    )
    yield (
        grouped and o.rollout_temperature is None,
        f"objective.group_normalize: got '{o.group_normalize}', expected 'none': no engine drew "
        "the responses (rollout.engine=replay), and so there is no log p of theirs",
    )


def _clip(o: "Objective") -> Rules:
    given = _given(o, "clip_low", "clip_high", "dual_clip")
    first, drawn = f"objective.{''.join(given[:1])}", o.rollout_temperature
    yield (
        bool(given) and not _of_drawn(o),
        f"{first}: only a drawn token has a ratio to clip; set support=sampled and "
        "form=policy_gradient, or leave it out",
    )
    yield (
        bool(given) and o.correction != "none",
        f"rollout.correction: got '{o.correction}', expected none with {first}: both weigh a "
        "token by π/μ, and together by its square",
    )
    yield (
        bool(given) and drawn is None,
        f"{first}: expected null: no engine drew the responses (rollout.engine=replay), and so "
        "there is no ratio",
    )
    yield (
        bool(given) and drawn is not None and drawn != o.student_temperature,
        f"objective.student_temperature: got {o.student_temperature:g}, expected rollout."
        f"temperature={drawn or 0:g} with {first}: the ratio is that of what is trained",
    )
    for name, least, most in (("clip_low", 0, 1), ("clip_high", 0, math.inf)):
        value = getattr(o, name)
        bounds = f"{least} to {most}" if math.isfinite(most) else f"{least} or more"
        wrong = value is not None and not least <= value <= most
        yield wrong, f"objective.{name}: got {value}, expected {bounds}"
    yield (
        o.dual_clip is not None and not o.dual_clip > 1,
        f"objective.dual_clip: got {o.dual_clip}, expected more than 1, where π = μ",
    )


def _of_drawn(o: "Objective") -> bool:
    return o.form == "policy_gradient" and o.support == "sampled"


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


def _unknown_names(o: "Objective") -> Rules:
    for key, kind in get_type_hints(type(o)).items():
        known, section = get_args(kind), "rollout" if key == "correction" else "objective"
        if get_origin(kind) is Literal and getattr(o, key) not in known:
            yield True, f"{section}.{key}: got '{getattr(o, key)}', expected {', '.join(known)}"
    named = [("support", o.support, SUPPORTS), ("divergence", o.divergence, DIVERGENCES)]
    named += [("weights", name, tuple(WEIGHTS)) for name in o.weights]
    for key, name, known in named:
        if isinstance(name, str) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            yield (
                True,
                f"objective.{key}: got '{name}', expected {', '.join(known)}, or a function as "
                f"module:name{hint}",
            )


def _show(name: str | Callable) -> str:
    return f"'{name}'" if isinstance(name, str) else getattr(name, "__name__", repr(name))
