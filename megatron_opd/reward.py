"""Score a response: in evaluation, in the loss, and in filters of rollouts."""

from collections.abc import Callable
from math import isfinite

from megatron_opd import verifier
from megatron_opd.answers import boxed, canonical, stated
from megatron_opd.types import Prompt, Reward


def exact_match(response: str, prompt: Prompt) -> float:
    """Return 1.0 when the response is the prompt's answer, up to surrounding white space."""
    return float(prompt.answer is not None and response.strip() == prompt.answer.strip())


def math(response: str, prompt: Prompt) -> float:
    r"""Return 1.0 when the last `\boxed{}` holds the prompt's answer; without a box 0.0.

    Equal is what `same_answer` says: 142 is 142.0, \frac12 is 0.5, and (x+1)^2 is x^2+2x+1.
    """
    return _judge(prompt.answer, boxed(response))


def math_line(response: str, prompt: Prompt) -> float:
    """Return 1.0 when the last line is "Answer: " and the prompt's answer (DAPO's own template)."""
    return _judge(prompt.answer, stated(response))


def _judge(expected: str | None, given: str | None) -> float:
    if expected is None or given is None:
        return 0.0
    return float(same_answer(boxed(expected) or expected, given))


def same_answer(expected: str, given: str) -> bool:
    """Say whether two answers are the same mathematics; what is plainly equal or not is not asked.

    Not symmetric where one is an equation: "x=3" is right where 3 is expected.
    """
    one, other = canonical(expected), canonical(given)
    if one == other:
        return True
    if one.lstrip("-").isdecimal() and other.lstrip("-").isdecimal():
        return False
    return verifier.same(expected, given)


def scored(reward: Reward, response: str, prompt: Prompt) -> float:
    """Return the reward of a response.

    Raises:
        ValueError: it is not a finite number.
    """
    value = reward(response, prompt)
    if not isfinite(value):
        raise ValueError(
            f"reward: got {value} for a response to prompt {prompt.index} of {prompt.source!r}, "
            "expected a finite number; mend the reward function"
        )
    return float(value)


def answer_of(text: str) -> str | None:
    r"""Return a response's canonical answer: of its last `\boxed{}`, else of its "Answer:" line."""
    found = boxed(text) or stated(text)
    return None if found is None else canonical(found)


REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "math": math,
    "math_line": math_line,
}


def ballot(reward: Reward) -> tuple[Callable[[str], str | None], Callable[[str, str], bool]]:
    """Return what a response votes for, and when two votes are for the same, under `reward`.

    Mathematics votes with its answers, and without one not at all; other rewards know nothing of
    answers, and their responses are votes as they stand.
    """
    if reward in (math, math_line):
        return answer_of, same_answer
    return str.strip, str.__eq__
