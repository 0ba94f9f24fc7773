"""What would a shorter rollout.max_tokens leave of the student's responses, and of the signal?

From one set of responses: those that come to their end in time, those that are right, the tokens
beyond the limit, and what the teacher has to say there. Tokens that both models agree on teach
nothing; where the teacher's word on the student's late tokens is noise, they do harm (Rethinking
OPD's sweep of 0.5k to 15k tokens is best at 3k to 7k, and collapses from the suffix at 10k).
A cut response is one that a model was not trained to shorten: `sweep` has the runs that train it.

Shape suffixes: R responses · T tokens of them all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.probes.pair import Pair
from megatron_opd.probes.statistics import FEWEST, mean
from megatron_opd.told import Array, Told

SIGNALS = {
    "reverse_kl": "distill/reverse_kl",
    "entropy_gap": "distill/entropy_gap",
    "overlap": "distill/overlap_ratio",
    "student_entropy": "student/entropy",
    "teacher_entropy": "teacher/entropy",
}
BUCKETS = 8  # where metrics.position_bucket says nothing


def probe(pair: Pair, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Return what limits of `lengths` tokens leave (default: eighths of a long response)."""
    told = pair.look(pair.write("student", pair.prompts, n=pair.config.rollout.n))
    width, longest = bucket(pair, told), int(told.length_R.max())
    limits = sorted(set(lengths or (*range(width, BUCKETS * width, width), longest)))
    return {
        "responses": len(told.rollouts),
        "tokens": {"mean": float(told.length_R.mean()), "longest": longest},
        "by_limit": [limited(told, limit) for limit in limits],
        "by_position": [
            {"from": start, "to": start + width, **_signals(told, in_T)}
            for start in range(0, longest, width)
            if enough(told, in_T := told.position_T // width == start // width)
        ],
    }


def bucket(pair: Pair, told: Told) -> int:
    """Return the tokens of a position bucket: metrics.position_bucket, or a part of a response."""
    usual = int(np.quantile(told.length_R, 0.95))  # the longest may be one of its kind
    return pair.config.metrics.position_bucket or -(-usual // BUCKETS)


def enough(told: Told, chosen_T: Array) -> bool:
    """Say whether some tokens are of prompts enough for a mean."""
    return len(np.unique(told.prompt_R[told.rollout_T[chosen_T]])) >= FEWEST


def limited(told: Told, limit: int) -> dict[str, Any]:
    """Return what a limit leaves of responses, and the signal of the tokens beyond it."""
    in_time_R = told.finished_R & (told.length_R <= limit)
    beyond_T, kl_T = told.position_T >= limit, told.metric_T["distill/reverse_kl"]
    return {
        "limit": limit,
        "finished": mean(in_time_R.astype(float), told.prompt_R),
        "accuracy": mean((in_time_R & told.right_R).astype(float), told.prompt_R),
        "tokens_beyond": float(beyond_T.mean()),
        "reverse_kl_beyond": float(kl_T[beyond_T].sum() / kl_T.sum()) if kl_T.sum() else None,
        "beyond": _signals(told, beyond_T) if enough(told, beyond_T) else None,
    }


def _signals(told: Told, chosen_T: Array) -> dict[str, Any]:
    """Return the means over some tokens."""
    means = {
        name: mean(told.metric_T[metric][chosen_T], told.prompt_R[told.rollout_T[chosen_T]])
        for name, metric in SIGNALS.items()
    }
    return {"tokens": int(np.count_nonzero(chosen_T)), **means}


def sweep(words: Sequence[str], found: dict[str, Any]) -> list[str]:
    """Return the commands that train at each limit; `words`: the config and its overrides."""
    return [
        f"python -m megatron_opd {' '.join(words)} rollout.max_tokens={row['limit']} "
        f"run.dir=runs/length_{row['limit']}"
        for row in found["by_limit"]
    ]


def table(found: dict[str, Any]) -> list[str]:
    """Return the figures as lines."""
    size = found["tokens"]
    lines = [
        f"{found['responses']} responses of {size['mean']:.0f} tokens, the longest "
        f"{size['longest']}",
        "limit   finished   right   tokens beyond   of the KL   KL a token   entropy gap   overlap",
    ]
    for row in found["by_limit"]:
        line = f"{row['limit']:>5} {row['finished'].value:>10.1%} {row['accuracy'].value:>7.1%}"
        if row["beyond"]:
            gone, share = row["beyond"], row["reverse_kl_beyond"]
            line += f" {row['tokens_beyond']:>15.1%} " + (
                f"{share:>11.1%}" if share is not None else f"{'-':>11}"
            )
            line += "".join(
                f"{gone[name].value:>{width}.3f}"
                for name, width in (("reverse_kl", 13), ("entropy_gap", 14), ("overlap", 10))
            )
        lines.append(line)
    return [*lines, "the last four columns are of the tokens beyond the limit"]
