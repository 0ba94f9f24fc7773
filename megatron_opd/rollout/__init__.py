"""Who writes the responses: the student itself (embedded engine) or a file (replay engine)."""

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


__all__ = ["RolloutEngine", "Sampling", "request_seed"]
