"""Objective = support × divergence × weight: the settings, and what follows from them.

L = Σ_t a_t·w_t·D_t: D compares student p and teacher q on the support, w are the token weights, a
the aggregation. Every setting is a choice of detached coefficients on log p over a set of entries;
so is a reward of the whole response, whose advantage is a coefficient of its tokens (GRPO, PPO).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

from torch import Tensor

from megatron_opd.loss import divergences, fits, names, rules, supports
from megatron_opd.loss.candidates import Clip, PolicyGradient
from megatron_opd.loss.engine import Loss, Pass, divisor
from megatron_opd.loss.weights import CORRECTIONS, FROM_THE_TEACHER, WEIGHTS, Weight, bind
from megatron_opd.types import Head, Microbatch, Scores


@dataclass(frozen=True)
class Objective:
    """L = Σ_t a_t·w_t·D_t over supervised tokens, its exact gradient, and what is measured.

    A sum: `Loss.count`, added up over the global step, divides it later. A function in the place of
    a name is the user's: see `supports`, `divergences` and `weights` for what they take.

    Raises:
        ValueError: a combination that does not exist, or that cannot learn anything.
    """

    support: str | Callable[..., tuple[Tensor, Tensor]] = "student_topk"
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "reverse_kl"
    k: int = 16  # of top-k supports, and of every metric over top-k sets
    append_sampled: bool = False  # to a top-k support
    normalize: Literal["support", "vocab"] = "support"  # a top-k support's probabilities
    tail: bool = False  # all other mass is one more category; wants normalize=vocab
    jsd_beta: float = 0.5  # the teacher's share of the mixture
    jsd_rescale: bool = False  # divide by β(1−β), whose limits are the KLs
    skew_alpha: float = 0.1  # the teacher's share of the mixture
    estimator: Literal["k1", "k2", "k3"] = "k1"  # of the reverse KL, from the sampled token
    form: Literal["direct", "policy_gradient"] = "direct"
    reward_weight: Literal["student_p", "teacher_p", "none"] = "student_p"  # of a candidate
    reward_weight_normalize: bool = True  # on the support
    center_on_support: bool = False  # subtract the weighted mean of the costs
    baseline: Literal["none", "kl", "topk_kl", "mean"] = "none"
    reward_floor: float | None = None
    reward_cap: float | None = None
    discount: float = 0.0  # γ of the reward-to-go
    group_normalize: Literal["none", "mean", "std"] = "none"  # rewards are the batch's advantage_N
    outcome: float = 0.0  # of the response's advantage, added to a drawn token's reward
    clip_low: float | None = None  # PPO: of the ratio π/μ of a drawn token
    clip_high: float | None = None
    dual_clip: float | None = None
    extrapolation: float = 1.0  # λ: the target is λ·log q + (1−λ)·log of a base model
    veto: float = 0.0  # β: and + β·log p, detached
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0  # and the base's
    rollout_temperature: float | None = 1.0  # None: no engine drew the responses
    temperature_squared: bool = False  # multiply the loss by both temperatures
    correction: Literal["none", "tis", "icepop", "mask"] = "none"  # of the rollout engine
    correction_low: float = 0.5
    correction_high: float = 2.0
    weights: Mapping[str | Callable[..., Tensor], Mapping[str, Any]] = field(default_factory=dict)
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    fixed_length: int | None = None  # L of seq-mean-token-sum-norm
    position_bucket: int = 0  # metrics also by position, in buckets of this many tokens; 0: not
    max_tokens: int | None = None  # the longest response, for position_bucket
    chunk_tokens: int | None = None  # tokens whose logits exist at once; None: a fixed memory
    weight: float = 1.0  # of this loss in a sum
    name: str = "objective"  # of its section; that of a term otherwise

    def __post_init__(self):
        try:
            for wrong, line in rules.contradictions(self):
                if wrong:
                    raise ValueError(line)
            _ = self.slope, self.choose, self.token_weights  # raise what they have to, now
        except ValueError as error:
            raise ValueError(self.told(str(error))) from None

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
        for wrong, line in fits.misfits(self, head, batch, teacher, base):
            if wrong:
                raise ValueError(self.told(line))
        return Pass(self, hidden_NH, head, batch, teacher, base).run()

    def count(self, batch: Microbatch) -> Tensor:
        """Return `Loss.count` of a microbatch, without judging it."""
        return divisor(batch, self.aggregation)

    def told(self, line: str) -> str:
        """Return a line about the objective section as one about this one."""
        mine = self.name == "objective"
        return line if mine else line.replace("objective.", f"terms.{self.name}.")

    @property
    def terms(self) -> tuple["Objective", ...]:
        """Return what is summed: itself alone."""
        return (self,)

    @property
    def lead(self) -> "Objective":
        """Return the term whose k and temperatures count: itself."""
        return self

    @property
    def suffix(self) -> str:
        """Return what tells the metrics of a term from the objective's."""
        return "" if self.name == "objective" else f".{self.name}"

    @property
    def needs_teacher(self) -> bool:
        """Whether divergence or weights ask a teacher."""
        asks = any(name in FROM_THE_TEACHER for w in self.token_weights for name in w.wants)
        return asks or self.divergence not in names.WITHOUT_TEACHER

    @property
    def needs_reward(self) -> bool:
        """Whether it wants rewards of whole responses."""
        return self.needs_advantage or any("reward_N" in w.wants for w in self.token_weights)

    @property
    def needs_advantage(self) -> bool:
        """Whether it wants how much more than the others of their prompt they are worth."""
        asks = any("advantage_N" in weight.wants for weight in self.token_weights)
        return asks or self.outcome_weight != 0

    @property
    def needs_drawn(self) -> bool:
        """Whether the student must have drawn every token that counts, or the mean is another's.

        So it is of rewards of drawn tokens, unless the weight rollout_only leaves others out.
        """
        estimates = self.divergence == "reverse_kl" or self.outcome_weight or self.clip
        return self.support == "sampled" and bool(estimates) and "rollout_only" not in self.weights

    @property
    def outcome_weight(self) -> float:
        """Return the factor of the response's advantage."""
        return 1.0 if self.divergence == "outcome" else self.outcome

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
        if self.divergence in names.WITHOUT_TEACHER:
            alone = {"cross_entropy": divergences.cross_entropy, "outcome": divergences.nothing}
            return alone[self.divergence]
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

    @property
    def clip(self) -> Clip | None:
        """Return where PPO's surrogate is flat; None: there is no ratio."""
        bounds = self.clip_low, self.clip_high, self.dual_clip
        return None if bounds == (None, None, None) else Clip(*bounds)

    @cached_property
    def token_weights(self) -> tuple[Weight, ...]:
        """Return the weight functions with their options, the correction among them."""
        weights = [
            bind(WEIGHTS[name] if isinstance(name, str) else name, options)
            for name, options in self.weights.items()
        ]
        if self.correction != "none":
            function, (low, high) = CORRECTIONS[self.correction], self.trusted
            options = {"low": low, "high": high}
            weights.append(Weight(self.correction, function, ("log_ratio_N",), options))
        return tuple(weights)

    @property
    def trusted(self) -> tuple[float, float]:
        """Return the lowest and the highest π/μ that the correction leaves alone."""
        return 0.0 if self.correction == "tis" else self.correction_low, self.correction_high

    @property
    def looks(self) -> bool:
        """Whether weights or baseline look at a model's whole distribution."""
        return self.baseline in ("kl", "topk_kl") or any(w.looks for w in self.token_weights)

    @property
    def mixes_vocabulary(self) -> bool:
        """Whether the target is made of whole distributions."""
        mixed = self.extrapolation != 1.0 or self.veto != 0.0
        return mixed and self.support != "sampled" and self.over_vocabulary

    def needs_hidden(self, *, topk: bool) -> Iterator[str]:
        """Yield why the teacher's top k, or its word on the sampled token, does not do."""
        serves = "teacher_topk" if topk else "sampled"
        if self.support != serves:
            yield f"objective.support={self.support} wants more than {serves}; send hidden states"
        if self.append_sampled:
            yield "objective.append_sampled wants the sampled token too; send hidden states"
        if self.mixes_vocabulary or (topk and self.needs_base):
            yield "the target is mixed from whole distributions; send hidden states"
        if self.baseline in ("kl", "topk_kl"):
            yield f"objective.baseline={self.baseline} wants its distribution; send hidden states"
        for weight in self.token_weights:
            seen = {"teacher_entropy_N"} | ({"teacher_logp_N"} if topk else {"overlap_N"})
            for name in seen.intersection(weight.wants):
                yield f"objective.weights.{weight.name} wants its {name}; send hidden states"
