"""What is planned, and what a phase of it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from megatron_opd.config import Config
from megatron_opd.loss import Objective, Total
from megatron_opd.planner import traffic
from megatron_opd.planner.layout import Layout
from megatron_opd.planner.machine import Achieved, Gpu
from megatron_opd.planner.network import Network
from megatron_opd.planner.traffic import Flow, Load


class Judge(NamedTuple):
    """A frozen model on our ranks."""

    network: Network
    payload: str  # hidden, topk or sampled
    offload: bool  # its weights come from the host's memory each time


@dataclass(frozen=True)
class Setting:
    """What is planned: a config, on so many GPUs of a kind."""

    config: Config
    gpu: Gpu
    achieved: Achieved
    ranks: int
    per_node: int
    prompt: int  # tokens
    response: int  # tokens
    objective: Objective | Total
    student: Network
    judges: dict[str, Judge]

    @property
    def sequence(self) -> int:
        """Packed tokens of one sequence."""
        return self.prompt + self.response - 1

    @property
    def sequences(self) -> int:
        """Sequences of one step."""
        return self.config.train.prompts_per_step * self.config.rollout.n

    def rate(self, of: str) -> float:
        """Return what is reached of a peak rate: operations or bytes a second."""
        gpu, got = self.gpu, self.achieved
        return {
            "train": gpu.flops * got.train,
            "score": gpu.flops * got.score,
            "prefill": gpu.flops * got.prefill,
            "hbm": gpu.hbm * got.hbm,
            "nvlink": gpu.nvlink * got.link,
            "network": gpu.network * got.link,
            "host": gpu.host * got.link,
        }[of]

    def load(self, layout: Layout) -> Load:
        """Return what a replica works on in one step, a context-parallel rank's part of it."""
        own = self.sequences / layout.dp
        fit = max(1, self.config.train.microbatch_tokens // self.sequence)
        targets, metrics = own * self.response / layout.cp, self.config.metrics
        return Load(
            tokens=own * self.sequence / layout.cp,
            supervised=targets,
            microbatches=ceil(own / fit),
            measured=targets * metrics.token_fraction / metrics.every,
        )


@dataclass(frozen=True)
class Phase:
    """One phase on the rank that takes longest."""

    parts: dict[str, float]  # seconds, by what they are spent on
    flows: tuple[Flow, ...] = ()
    sent: float = 0.0  # bytes that leave the rank

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def exchange(setting: Setting, layout: Layout, flows: Sequence[Flow]) -> Phase:
    """Return the time that flows take, by axis, and what they send."""
    parts: dict[str, float] = {}
    for flow in flows:
        inside = layout.span(flow.axis) <= setting.per_node
        rate = setting.rate("nvlink" if inside else "network")
        seconds = flow.sent(layout.ranks(flow.axis)) / rate
        seconds += flow.calls * setting.achieved.latency_s
        parts[flow.axis] = parts.get(flow.axis, 0.0) + seconds
    sent = sum(flow.sent(layout.ranks(flow.axis)) for flow in flows)
    return Phase(parts, tuple(flows), sent)


def joined(phases: Sequence[Phase]) -> Phase:
    """Return phases one after the other as one."""
    parts: dict[str, float] = {}
    for phase in phases:
        for name, seconds in phase.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds
    flows = traffic.total(flow for phase in phases for flow in phase.flows)
    return Phase(parts, tuple(flows), sum(phase.sent for phase in phases))
