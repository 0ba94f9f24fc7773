"""Score a response: used by evaluation."""

from megatron_opd.types import Prompt, Reward


def exact_match(response: str, prompt: Prompt) -> float:
    """Return 1.0 when the response is the prompt's answer, up to surrounding white space."""
    return float(prompt.answer is not None and response.strip() == prompt.answer.strip())


REWARDS: dict[str, Reward] = {"exact_match": exact_match}
