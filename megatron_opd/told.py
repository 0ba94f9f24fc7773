"""What is known of a set of responses: the noun that probes and the doctor count in.

Shape suffixes: R responses · T tokens of them all, one response after the other.
"""

from dataclasses import dataclass

import numpy as np

from megatron_opd.types import Rollout

Array = np.ndarray


@dataclass(frozen=True)
class Told:
    """Responses, the verifier's word on each, and what both models say of every token."""

    rollouts: list[Rollout]
    right_R: Array  # bool
    metric_T: dict[str, Array]  # by the names of `loss.dynamics`

    @property
    def prompt_R(self) -> Array:
        """Index of each response's prompt."""
        return np.array([rollout.prompt.index for rollout in self.rollouts])

    @property
    def length_R(self) -> Array:
        """Tokens of each response."""
        return np.array([len(rollout.response_ids) for rollout in self.rollouts])

    @property
    def finished_R(self) -> Array:
        """Whether each response came to its end."""
        return np.array([rollout.finish == "stop" for rollout in self.rollouts])

    @property
    def rollout_T(self) -> Array:
        """Whose token each is."""
        return np.repeat(np.arange(len(self.rollouts)), self.length_R)

    @property
    def position_T(self) -> Array:
        """Place of each token in its response, from 0."""
        return np.concatenate([np.arange(length) for length in self.length_R])

    def split(self, value_T: Array) -> list[Array]:
        """Return what is said of every token, response by response."""
        return np.split(value_T, self.length_R.cumsum()[:-1])

    @property
    def reward_T(self) -> Array:
        """log q(y) − log p(y) of every token, in nats."""
        return self.metric_T["student/nll"] - self.metric_T["teacher/nll"]
