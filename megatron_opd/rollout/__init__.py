"""Who writes the responses: the student itself (embedded engine), vLLM, or a file (replay)."""

from typing import Protocol

from megatron_opd.rollout.sampling import Sampling, request_seed
from megatron_opd.types import Prompt, Rollout


class RolloutEngine(Protocol):
    """Write `n` responses to every prompt."""

    def sync(self) -> None:
        """Take over the student's current weights."""
        ...

    def generate(
        self, prompts: list[Prompt], *, n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """Return `n` rollouts per prompt, in prompt order, on every rank of the replica."""
        ...

    def close(self) -> None:
        """Give back what outlives the process, or does not outlive the process groups."""
        ...


__all__ = ["RolloutEngine", "Sampling", "request_seed"]
