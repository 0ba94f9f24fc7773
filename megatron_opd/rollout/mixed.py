"""Some responses of the dataset among those that are drawn: GKD's mix, by prompt or by step."""

from typing import Literal

from megatron_opd.rollout import RolloutEngine
from megatron_opd.rollout.sampling import Sampling, request_seed
from megatron_opd.types import Prompt, Rollout


class MixedEngine:
    """Let the dataset answer a share of the prompts, once each, and `engine` the others.

    A coin of (seed, prompt) decides, so neither batches nor ranks matter; with `by="step"` one coin
    decides for all prompts of a step. `fraction` may change from step to step.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        dataset: RolloutEngine,
        *,
        fraction: float,
        by: Literal["prompt", "step"],
    ):
        self.engine, self.dataset, self.fraction, self.by = engine, dataset, fraction, by

    def sync(self) -> None:
        """Take over the student's current weights."""
        self.engine.sync()

    def close(self) -> None:
        """Let the engine go."""
        self.engine.close()

    def generate(
        self, prompts: list[Prompt], *, n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """Return one rollout per prompt that the dataset answers and `n` per other, in order."""
        given = [prompt for prompt in prompts if self._is_given(prompt, seed)]
        drawn = [prompt for prompt in prompts if not self._is_given(prompt, seed)]
        how = {"sampling": sampling, "seed": seed}
        rollouts = self.dataset.generate(given, n=1, **how)
        rollouts += self.engine.generate(drawn, n=n, **how)
        order = {(prompt.index, prompt.copy): place for place, prompt in enumerate(prompts)}
        return sorted(rollouts, key=lambda r: order[r.prompt.index, r.prompt.copy])

    def _is_given(self, prompt: Prompt, seed: int) -> bool:
        coin = (prompt.index, prompt.copy) if self.by == "prompt" else ()
        # two numbers more than a request's seed has: a coin of its own
        return request_seed(seed, *coin, -1, -1) < self.fraction * 2**63
