"""The replay engine: responses that a dataset already holds. SFT and the cold start are this."""

from collections.abc import Callable

from megatron_opd.rollout.sampling import Sampling
from megatron_opd.types import Prompt, Rollout


class ReplayEngine:
    """Return each prompt's own response, followed by the end-of-sequence token."""

    def __init__(self, encode: Callable[[str], tuple[int, ...]]):
        self.encode = encode  # response text → token ids with the end token

    def sync(self) -> None:
        """Do nothing: a file has no weights."""

    def close(self) -> None:
        """Do nothing: nothing was opened."""

    def generate(
        self, prompts: list[Prompt], *, n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """Return one rollout per prompt; a response over `sampling.max_tokens` is cut ("length").

        Raises:
            ValueError: n ≠ 1, or a prompt without a response.
        """
        if n != 1:
            raise ValueError(f"rollout.n: got {n}, expected 1; a dataset has one response a prompt")
        return [self._rollout(prompt, sampling.max_tokens) for prompt in prompts]

    def _rollout(self, prompt: Prompt, max_tokens: int) -> Rollout:
        if prompt.response is None:
            raise ValueError(
                f"data.response_key: prompt {prompt.index} of {prompt.source!r} has no response; "
                "rollout.engine=replay needs one in every row"
            )
        ids = self.encode(prompt.response)
        kept = ids[:max_tokens]
        return Rollout(
            prompt=prompt,
            sample=0,
            response_ids=kept,
            logp=(0.0,) * len(kept),
            finish="stop" if len(kept) == len(ids) else "length",
            drawn=False,
            reward=prompt.reward,
        )
