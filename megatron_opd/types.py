"""The nouns: Prompt, Rollout, Microbatch, Scores.

Shape suffixes: S sequences · T packed tokens of a microbatch · N supervised tokens (response
tokens) of a microbatch · H hidden size · K support size · V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One question as the model sees it, and what the dataset knows about it."""

    index: int  # row in the mixed prompt list; stable over epochs
    token_ids: tuple[int, ...]
    text: str  # what token_ids decode from: the rendered chat template
    source: str = ""  # data_source column, or the file's name
    answer: str | None = None  # ground truth, for rewards
    response: str | None = None  # a response from the dataset, for the replay engine
    reward: float | None = None  # of that response, where the dataset says it
    question: str = ""  # the last message of the user, before templates
    copy: int = 0  # 0, 1, … where a step has the same prompt several times: its samples differ
    teacher: str = ""  # which of several teachers judges it
    teacher_token_ids: tuple[int, ...] | None = None  # what it reads instead; None: the same prompt


@dataclass(frozen=True)
class Rollout:
    """A prompt and one response to it, with the engine's own log-probabilities.

    `logp[i]` is the log-probability, in nats, with which `response_ids[i]` was drawn (temperature
    and truncation applied); zeros where nothing was drawn (a dataset's response).
    """

    prompt: Prompt
    sample: int  # 0, 1, … within the prompt's group
    response_ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish: Literal["stop", "length"]
    top_ids: np.ndarray | None = field(default=None, compare=False)
    """[T, k] int32: the student's k most likely ids at every response token, best first, as the
    engine saw them before it truncated; None: not asked for."""
    top_logp: np.ndarray | None = field(default=None, compare=False)
    """[T, k] fp32: their log-probabilities, in nats, where the engine says them."""
    version: int = 0  # of the student's weights that wrote it; 0: of those of the moment
    masked: bool = False  # generated and packed, but not supervised
    drawn: bool = True  # by an engine, at `logp`; False: the dataset's own response
    reward: float | None = None  # None: nobody scored it
    advantage: float = 0.0  # of the reward over those of the prompt's other responses


@dataclass(frozen=True)
class Microbatch:
    """Packed sequences of one forward: no padding between them, each attends to itself only.

    `source_N[i]` is the packed position whose hidden state predicts `target_N[i]`; every response
    token of every sequence appears exactly once among the targets.
    Sequences are numbered from 0, in the order of their targets.

    Under context parallelism this is one rank's part: T and N count its tokens, `source_N` points
    among them; `cu_seqlens`, `max_seqlen` and the numbers of sequences are those of the whole.
    """

    token_T: Tensor  # [T] int64
    position_T: Tensor  # [T] int64, restarting at 0 in every sequence
    cu_seqlens: Tensor  # [S + 1] int32, boundaries in T
    max_seqlen: int
    source_N: Tensor  # [N] int64
    target_N: Tensor  # [N] int64
    mask_N: Tensor  # [N] fp32: 1 supervised, 0 not
    rollout_logp_N: Tensor  # [N] fp32, the engine's log p of the target
    position_N: Tensor  # [N] int64, of the target in its response, from 0
    sequence_N: Tensor  # [N] int64, the sequence of the target
    measured_M: Tensor  # [M] int64, ascending: the targets that metrics look at; on the host
    rollout_ids_NK: Tensor | None = None  # [N, K] int64, the engine's top ids
    drawn_N: Tensor | None = None  # [N] fp32: 1 drawn by the engine, 0 not; None: all were
    reward_N: Tensor | None = None  # [N] fp32, of the response; None: nobody scored them
    advantage_N: Tensor | None = None  # [N] fp32, of the response, or of the token itself
    group_N: Tensor | None = None  # [N] int64: alike for all responses to one prompt of a step
    teacher: str = ""  # which of several judges all of it
    context: "Microbatch | None" = None
    """The same responses in the same order after the prompts that the teacher reads: equal but in
    what comes before each response. None: the teacher reads what the student reads."""
    part: "Part | None" = None  # what it is a part of; None: it is whole

    def to(self, device: torch.device) -> "Microbatch":
        """Return the same microbatch with every tensor but `measured_M` on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            if isinstance(value, Tensor) and name != "measured_M"
            else value
            for name, value in vars(self).items()
        }
        if self.context is not None:
            moved["context"] = self.context.to(device)
        if self.part is not None:
            whole, index_N = self.part.whole.to(device), self.part.index_N.to(device)
            moved["part"] = replace(self.part, whole=whole, index_N=index_N)
        return Microbatch(**moved)

    def as_judged(self) -> "Microbatch":
        """Return what the teacher reads: position by position the same targets."""
        return self.context or self

    @property
    def whole(self) -> "Microbatch":
        """Return the microbatch that this is a part of, or all of."""
        return self if self.part is None else self.part.whole

    def gathered(self, x_N: Tensor) -> Tensor:
        """Return what is known of each rank's targets for those of the whole, in its order.

        Collective over the ranks that have its parts; they have the same dtype.
        """
        if self.part is None:
            return x_N
        whole_N = x_N.new_zeros(len(self.whole.target_N), *x_N.shape[1:])
        whole_N[self.part.index_N] = x_N
        dist.all_reduce(whole_N, group=self.part.group)
        return whole_N

    def own(self, x_N: Tensor) -> Tensor:
        """Return what is known of the whole's targets for those that are here."""
        return x_N if self.part is None else x_N[self.part.index_N]


@dataclass(frozen=True)
class Part:
    """Which of a microbatch's targets one of several ranks has."""

    whole: Microbatch
    index_N: Tensor  # [N] int64, ascending: places among the targets of the whole
    group: Any  # of the ranks that have its parts
    leads: bool  # says for all of them what is to be counted once


@dataclass(frozen=True)
class Head:
    """A vocabulary-parallel output projection, this rank's rows:

        logits = h @ weight.T + bias, and then softcap · tanh(logits / softcap)

    Rank r of `group` holds rows r·V_local … (r+1)·V_local of the padded vocabulary. Rows at or
    above `vocab_size` are padding and belong to nobody.
    """

    weight_VH: Tensor  # [V_local, H]
    vocab_size: int  # real entries, over all ranks
    group: Any = None  # tensor-parallel process group; None: one rank holds all
    bias_V: Tensor | None = None  # [V_local]
    softcap: float | None = None
    gradient_VH: Tensor | None = None
    """Where the loss adds the gradient of `weight_VH`, at once (Megatron's main_grad); the loss is
    then to be back-propagated with a factor of 1. None: autograd gets it."""


@dataclass(frozen=True)
class HiddenScores:
    """The teacher's judgement of one microbatch as hidden states, plus its own head.

    The exact distribution is produced chunk by chunk when the loss needs it: H numbers a token
    travel instead of V.
    """

    hidden_NH: Tensor  # [N, H_teacher], aligned with Microbatch.target_N
    head: Head


@dataclass(frozen=True)
class TopKScores:
    """The teacher's k most probable entries at every supervised token: 12·k bytes a token."""

    ids_NK: Tensor  # [N, K] int64, most probable first
    logp_NK: Tensor  # [N, K] log-probabilities over the whole vocabulary, at `temperature`
    temperature: float = 1.0


@dataclass(frozen=True)
class SampledScores:
    """The teacher's log-probability of every supervised token: 4 bytes a token."""

    logp_N: Tensor  # [N], at `temperature`
    temperature: float = 1.0


Scores = HiddenScores | TopKScores | SampledScores

Reward = Callable[[str, Prompt], float]  # (response text, prompt) → score
