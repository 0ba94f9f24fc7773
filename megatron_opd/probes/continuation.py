"""How much does the teacher still help after the student has written so many tokens?

Responses of the student are cut after L tokens; from there the teacher goes on, and so does the
student; the verifier judges both. Where the teacher's advantage is gone, so is what a reward for
later tokens could teach: Rethinking OPD finds +0.37 after 1k tokens and +0.02 after 16k.

A prefix goes on as the token ids that were drawn, after the prompt's: no text in between. Every L
cuts the same responses, those longer than the longest L, so that a difference between two L is not
one between two sets of responses; long ones are right less often, and all figures are theirs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_opd.probes.pair import Pair, Who
from megatron_opd.probes.statistics import mean
from megatron_opd.told import Array
from megatron_opd.types import Prompt, Rollout

WRITERS: tuple[Who, ...] = ("teacher", "student")


def probe(pair: Pair, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Return both models' accuracy after prefixes of `lengths` tokens.

    Default: 0, ¼, ½ and ¾ of the median response.

    Raises:
        ValueError: no response is longer than the longest prefix.
    """
    written = pair.write("student", pair.prompts, n=pair.config.rollout.n)
    median = int(np.median([len(rollout.response_ids) for rollout in written]))
    lengths = sorted(set(lengths or (median * part // 4 for part in range(4))))
    cut = [rollout for rollout in written if len(rollout.response_ids) > lengths[-1]]
    if not cut:
        longest = max(len(rollout.response_ids) for rollout in written)
        raise ValueError(
            f"--lengths: got {lengths[-1]}, expected less than {longest}, the tokens of the "
            f"longest of {len(written)} responses: only longer responses can be cut there"
        )
    return {
        "responses": len(written),
        "cut": len(cut),
        "right_uncut": float(np.mean([pair.is_right(r.prompt, r.response_ids) for r in cut])),
        "by_length": [_after(pair, cut, length, draw) for draw, length in enumerate(lengths, 1)],
    }


def _after(pair: Pair, cut: list[Rollout], length: int, draw: int) -> dict[str, Any]:
    """Let both go on after `length` tokens, once per response, and verify what comes of it."""
    prefixes = [prefix(rollout, index, length) for index, rollout in enumerate(cut)]
    right: dict[str, Array] = {}
    for who in WRITERS:
        goes_on = pair.write(who, prefixes, n=1, draw=draw, shorter=length)
        whole = [
            r.response_ids[:length] + g.response_ids for r, g in zip(cut, goes_on, strict=True)
        ]
        verdicts = [pair.is_right(r.prompt, ids) for r, ids in zip(cut, whole, strict=True)]
        right[who] = np.array(verdicts, float)
    prompt_R = np.array([rollout.prompt.index for rollout in cut])
    return {
        "length": length,
        **{who: mean(right[who], prompt_R) for who in WRITERS},
        "advantage": mean(right["teacher"] - right["student"], prompt_R),
    }


def prefix(rollout: Rollout, index: int, length: int) -> Prompt:
    """Return the prompt that ends with the first `length` tokens of a response, to both models."""
    own, read = rollout.prompt.token_ids, rollout.prompt.teacher_token_ids
    begun = rollout.response_ids[:length]
    return replace(
        rollout.prompt,
        index=index,
        copy=0,
        token_ids=own + begun,
        teacher_token_ids=None if read is None else read + begun,
    )


def table(found: dict[str, Any]) -> list[str]:
    """Return the figures as lines."""
    lines = [
        f"{found['cut']} of {found['responses']} responses are long enough to be cut everywhere, "
        f"and {found['right_uncut']:.1%} of them are right as they are",
        "after tokens   teacher goes on   student goes on   advantage",
    ]
    for row in found["by_length"]:
        low, high = row["advantage"].low, row["advantage"].high
        lines.append(
            f"{row['length']:>12} {row['teacher'].value:>17.1%} {row['student'].value:>17.1%}   "
            f"{row['advantage'].value:+.3f} ({low:+.3f} to {high:+.3f})"
        )
    return lines
