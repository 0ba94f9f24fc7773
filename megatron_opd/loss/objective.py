"""Objective = support × divergence × weight, and the rules of what goes with what.

L = Σ_t a_t·w_t·D_t: D compares student p and teacher q on the support, w are the token weights, a
the aggregation. Every setting is a choice of detached coefficients on log p over a set of entries.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from megatron_opd.loss import divergences, supports
from megatron_opd.loss.candidates import PolicyGradient
from megatron_opd.loss.engine import Loss, Pass
from megatron_opd.loss.shard import Ranks
from megatron_opd.loss.weights import WEIGHTS, Weight, bind
from megatron_opd.types import Head, HiddenScores, Microbatch, Scores, TopKScores

TOP_K = tuple(name for name in supports.SUPPORTS if name != "sampled")
SUPPORTS = ("sampled", *TOP_K, "full")
DIVERGENCES = (*divergences.OVER_A_SET, "cross_entropy")


@dataclass(frozen=True)
class Objective:
    """L = Σ_t a_t·w_t·D_t over supervised tokens, its exact gradient, and what is measured.

    A sum: `Loss.count`, added up over the global step, divides it later. The meaning and the source
    of every field is in the README's table of the `objective:` section.

    Raises:
        ValueError: a combination that does not exist, or that cannot learn anything.
    """

    support: str | Callable[..., tuple[Tensor, Tensor]] = "student_topk"
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "reverse_kl"
    k: int = 16  # of top-k supports, and of every metric over top-k sets
    append_sampled: bool = False
    normalize: Literal["support", "vocab"] = "support"
    tail: bool = False
    jsd_beta: float = 0.5
    jsd_rescale: bool = False
    skew_alpha: float = 0.1
    estimator: Literal["k1", "k2", "k3"] = "k1"
    form: Literal["direct", "policy_gradient"] = "direct"
    reward_weight: Literal["student_p", "teacher_p", "none"] = "student_p"
    reward_weight_normalize: bool = True
    center_on_support: bool = False
    baseline: Literal["none", "kl", "topk_kl", "mean"] = "none"
    reward_floor: float | None = None
    reward_cap: float | None = None
    discount: float = 0.0
    extrapolation: float = 1.0
    veto: float = 0.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    rollout_temperature: float | None = 1.0  # None: no engine drew the responses
    temperature_squared: bool = False
    weights: Mapping[str | Callable[..., Tensor], Mapping[str, Any]] = field(default_factory=dict)
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    fixed_length: int | None = None
    position_bucket: int = 0  # metrics also by position, in buckets of this many tokens; 0: not
    max_tokens: int | None = None  # the longest response, for position_bucket
    chunk_tokens: int | None = None  # tokens whose logits exist at once; None: a fixed memory

    def __post_init__(self):
        for wrong, line in _contradictions(self):
            if wrong:
                raise ValueError(line)
        _ = self.slope, self.choose, self.token_weights  # raise what they have to, now

    def __call__(
        self,
        hidden_NH: Tensor,
        head: Head,
        batch: Microbatch,
        teacher: Scores | None = None,
        base: Scores | None = None,
    ) -> Loss:
        """Judge the student's hidden states at the supervised tokens, [N, H].

        Called by every rank of `head.group` with the same tokens. The gradient is complete for
        `head.weight_VH`; for `hidden_NH` it is this rank's share, from its rows of the vocabulary,
        and the caller enters the head through a mapping whose backward sums the shares.

        Raises:
            ValueError: a teacher or base too many or too few, or one that cannot serve.
        """
        for wrong, line in self._misfits(head, batch, teacher, base):
            if wrong:
                raise ValueError(line)
        return Pass(self, hidden_NH, head, batch, teacher, base).run()

    @property
    def needs_teacher(self) -> bool:
        return self.divergence != "cross_entropy"

    @property
    def needs_base(self) -> bool:
        return self.extrapolation != 1.0

    @property
    def over_set(self) -> bool:
        """Whether a set of ids is compared, rather than one token or all."""
        return self.support not in ("sampled", "full")

    @property
    def over_vocabulary(self) -> bool:
        """Whether log p needs the normaliser of the vocabulary, and thereby every logit."""
        return not self.over_set or self.normalize == "vocab"

    @cached_property
    def choose(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """Return the function that picks the set; None: the whole vocabulary."""
        if callable(self.support):
            supports.inputs(self.support)
            return self.support
        return supports.SUPPORTS.get(self.support)

    @cached_property
    def wants(self) -> tuple[str, ...]:
        """Return which ids the support is chosen from."""
        return supports.inputs(self.choose) if self.choose else ()

    @cached_property
    def slope(self) -> divergences.Slope:
        """Return f(s, t) with ∂f/∂s, which a cost does not need."""
        if callable(self.divergence):
            return divergences.of_user(self.divergence, sloped=self.form == "direct")
        if self.divergence == "cross_entropy":
            return divergences.cross_entropy
        if self.support == "sampled":
            return divergences.OF_ONE_DRAW[self.estimator]
        if self.form == "policy_gradient":
            return divergences.k1  # what a candidate costs: f / p of reverse_kl
        options: dict[str, dict[str, Any]] = {
            "jsd": {"beta": self.jsd_beta, "rescale": self.jsd_rescale},
            "skew_kl": {"alpha": self.skew_alpha},
        }
        return partial(divergences.OVER_A_SET[self.divergence], **options.get(self.divergence, {}))

    @cached_property
    def policy_gradient(self) -> PolicyGradient | None:
        """Return how costs become coefficients; None: the direct form, by ∂f/∂s."""
        if self.form == "direct":
            return None
        return PolicyGradient(
            cost=self.slope,
            weight="none" if self.support == "sampled" else self.reward_weight,
            normalize_weight=self.reward_weight_normalize,
            center=self.center_on_support,
            floor=self.reward_floor,
            cap=self.reward_cap,
        )

    @cached_property
    def token_weights(self) -> tuple[Weight, ...]:
        """Return the weight functions with their options."""
        return tuple(
            bind(WEIGHTS[name] if isinstance(name, str) else name, options)
            for name, options in self.weights.items()
        )

    @property
    def looks(self) -> bool:
        """Whether weights or baseline look at a model's whole distribution."""
        return self.baseline in ("kl", "topk_kl") or any(w.looks for w in self.token_weights)

    def _misfits(
        self, head: Head, batch: Microbatch, teacher: Scores | None, base: Scores | None
    ) -> Iterator[tuple[bool, str]]:
        """Yield (is it so, what to say) of what the call brings."""
        for name, scores, needed in (
            ("teacher", teacher, self.needs_teacher),
            ("base", base, self.needs_base),
        ):
            key = "divergence" if name == "teacher" else "extrapolation"
            yield (
                (scores is not None) != needed,
                f"{name}: got {'none' if scores is None else 'one'}, but objective.{key}="
                f"{getattr(self, key)} {'needs one' if needed else 'uses none'}",
            )
            yield from self._unserved(name, scores, head)
        yield (
            "rollout_ids_CK" in self.wants and batch.rollout_ids_NK is None,
            "objective.support: rollout_topk needs the engine's top ids with every rollout, and "
            "these have none",
        )
        yield (
            self.needs_teacher and self.k > head.vocab_size,
            f"objective.k: got {self.k}, expected at most the vocabulary's {head.vocab_size}",
        )

    def _unserved(self, name: str, scores: Scores | None, head: Head) -> Iterator[tuple[bool, str]]:
        """Yield what these scores cannot say."""
        if isinstance(scores, HiddenScores):
            yield (
                scores.head.vocab_size != head.vocab_size,
                f"{name}: got a head of {scores.head.vocab_size} entries, expected the student's "
                f"{head.vocab_size}; give both the tokenizer's size",
            )
            yield (
                (self.support == "full" or self.baseline == "kl" or self._mixes_vocabulary)
                and Ranks(head.group).size > 1
                and len(scores.head.weight_VH) != len(head.weight_VH),
                f"{name}: got {len(scores.head.weight_VH)} head rows on this rank, expected the "
                f"student's {len(head.weight_VH)}: entries of the whole vocabulary are compared "
                "where they are; build it with the student's padded vocabulary",
            )
        elif scores is not None:
            for obstacle in self.needs_hidden(topk=isinstance(scores, TopKScores)):
                yield True, f"{name}: got {type(scores).__name__}, but {obstacle}"
            yield (
                scores.temperature != self.teacher_temperature,
                f"{name}: scored at temperature {scores.temperature:g}, but objective."
                f"teacher_temperature={self.teacher_temperature:g}",
            )

    @property
    def _mixes_vocabulary(self) -> bool:
        mixed = self.extrapolation != 1.0 or self.veto != 0.0
        return mixed and self.support != "sampled" and self.over_vocabulary

    def needs_hidden(self, *, topk: bool) -> Iterator[str]:
        """Yield why the teacher's top k, or its word on the sampled token, does not do."""
        serves = "teacher_topk" if topk else "sampled"
        if self.support != serves:
            yield f"objective.support={self.support} wants more than {serves}; send hidden states"
        if self.append_sampled:
            yield "objective.append_sampled wants the sampled token too; send hidden states"
        if self._mixes_vocabulary or (topk and self.needs_base):
            yield "the target is mixed from whole distributions; send hidden states"
        if self.baseline in ("kl", "topk_kl"):
            yield f"objective.baseline={self.baseline} wants its distribution; send hidden states"
        for weight in self.token_weights:
            seen = {"teacher_entropy_N"} | ({"teacher_logp_N"} if topk else {"overlap_N"})
            for name in seen.intersection(weight.wants):
                yield f"objective.weights.{weight.name} wants its {name}; send hidden states"


def _contradictions(o: Objective) -> Iterable[tuple[bool, str]]:
    """Yield (is it so, what to tell the user), in terms of the config's keys."""
    yield from _unknown_names(o)
    yield (
        o.rollout_temperature is None and any("log_ratio_N" in w.wants for w in o.token_weights),
        "objective.weights: one compares the student with the engine that drew the responses, but "
        "rollout_temperature is None: none did (rollout.engine=replay); leave it out",
    )
    hard, user = o.divergence == "cross_entropy", callable(o.divergence)
    pg, sampled, over_set = o.form == "policy_gradient", o.support == "sampled", o.over_set
    for name in ("k", "chunk_tokens", "fixed_length"):
        value = getattr(o, name)
        yield (
            value is not None and value < 1,
            f"objective.{name}: got {value}, expected 1 or more",
        )
    for name in ("student_temperature", "teacher_temperature", "rollout_temperature"):
        value = getattr(o, name)
        yield (
            value is not None and not value > 0,
            f"objective.{name}: got {value}, expected more than 0",
        )
    yield (
        hard and not sampled,
        f"objective.support: got {_show(o.support)}, expected 'sampled' with "
        "objective.divergence=cross_entropy",
    )
    yield (
        sampled and not (hard or user or o.divergence == "reverse_kl"),
        f"objective.divergence: got '{o.divergence}', expected reverse_kl or cross_entropy with "
        "objective.support=sampled: the others need more of the distribution than one token",
    )
    yield (
        sampled and not pg and not hard and not user and o.estimator == "k1",
        "objective.estimator: got 'k1' with form=direct, which cannot learn: the gradient of "
        "log p(y) − log q(y) is that of log p(y), whose mean over y ~ p is zero whatever the "
        "teacher says; set objective.form=policy_gradient, or estimator=k2 (reverse KL)",
    )
    yield (
        pg and hard,
        "objective.form: got 'policy_gradient', expected 'direct' with divergence=cross_entropy",
    )
    yield (
        pg and not user and o.divergence != "reverse_kl",
        f"objective.divergence: got '{o.divergence}', expected reverse_kl with "
        "form=policy_gradient, or a function f(s, t) that is the cost of a candidate",
    )
    yield (
        o.tail and (not over_set or o.normalize != "vocab" or pg),
        "objective.tail: got true, expected false unless a top-k support is normalised over the "
        "vocabulary (normalize=vocab) in the direct form: elsewhere nothing is left for a tail",
    )
    yield (
        over_set
        and o.append_sampled is False
        and o.k == 1
        and o.normalize == "support"
        and o.support in ("student_topk", "teacher_topk", "rollout_topk", "intersection"),
        "objective.k: got 1, expected 2 or more: renormalised over one entry both models give it "
        "probability 1 and the gradient is zero; for one token a position set support=sampled",
    )
    yield (
        o.append_sampled and not over_set,
        f"objective.append_sampled: got true, expected false with support={_show(o.support)}, "
        "which has the sampled token already",
    )
    yield from _reward_contradictions(o, pg, sampled)
    yield from _target_contradictions(o, hard)
    yield (
        (o.aggregation == "seq-mean-token-sum-norm") != (o.fixed_length is not None),
        f"objective.fixed_length: got {o.fixed_length}, expected a length exactly when "
        "aggregation=seq-mean-token-sum-norm, which divides by it",
    )
    yield (
        bool(o.position_bucket) and o.max_tokens is None,
        "max_tokens: missing, but position_bucket needs the length of the longest response",
    )


def _reward_contradictions(o: Objective, pg: bool, sampled: bool) -> Iterator[tuple[bool, str]]:
    given = [
        name
        for name, default in (
            ("baseline", "none"),
            ("reward_floor", None),
            ("reward_cap", None),
            ("discount", 0.0),
            ("center_on_support", False),
        )
        if getattr(o, name) != default
    ]
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


def _target_contradictions(o: Objective, hard: bool) -> Iterator[tuple[bool, str]]:
    yield (
        hard and (o.extrapolation != 1.0 or o.veto != 0.0),
        "objective.extrapolation, objective.veto: cross_entropy has no teacher to change",
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


def _unknown_names(o: Objective) -> Iterator[tuple[bool, str]]:
    for key, kind in get_type_hints(Objective).items():
        known = get_args(kind)
        if get_origin(kind) is Literal and getattr(o, key) not in known:
            yield True, f"objective.{key}: got '{getattr(o, key)}', expected {', '.join(known)}"
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
