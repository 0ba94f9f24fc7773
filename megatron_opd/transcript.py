"""Rollouts as text, one JSON object a line: for people who look at what a run writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opd.types import Rollout


def write(path: Path, rollouts: Sequence[Rollout], tokenizer: Any) -> None:
    """Write prompt, response and what is known of it; the folder is made."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        for rollout in rollouts:
            file.write(json.dumps(_as_text(rollout, tokenizer), ensure_ascii=False) + "\n")


def _as_text(rollout: Rollout, tokenizer: Any) -> dict[str, Any]:
    return {
        "prompt": rollout.prompt.text,
        "response": tokenizer.decode(rollout.response_ids),
        "answer": rollout.prompt.answer,
        "finish": rollout.finish,
        "drawn": rollout.drawn,
        "masked": rollout.masked,
        **({} if rollout.reward is None else {"reward": rollout.reward}),
        "tokens": len(rollout.response_ids),
        "logp_mean": sum(rollout.logp) / len(rollout.logp),
        **_top(rollout),
    }


def _top(rollout: Rollout) -> dict[str, list]:
    """Return the engine's most likely ids and their log-probabilities, where they were kept."""
    kept = {"top_ids": rollout.top_ids, "top_logp": rollout.top_logp}
    return {name: x.tolist() for name, x in kept.items() if x is not None}
