"""What goes with what among rewards: those of drawn tokens, of responses, and PPO's clipping.

Each rule is (is it so, what to tell the user), the line in terms of the config's keys.
"""

import math
from dataclasses import fields
from typing import TYPE_CHECKING

from megatron_opd.loss.names import Rules, shown

if TYPE_CHECKING:
    from megatron_opd.loss.objective import Objective

REWARDS = ("baseline", "reward_floor", "reward_cap")  # what is done to a token's own


def contradictions(o: "Objective") -> Rules:
    """Yield what excludes what among the settings of rewards."""
    yield from _rewards(o)
    yield from _outcome(o)
    yield from _groups(o)
    yield from _clip(o)


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
            f"support, got {shown(o.support)}",
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
