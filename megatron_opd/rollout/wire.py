"""What a vLLM server is sent as JSON, and the checks of what it answers.

A reading raises `ValueError`, `KeyError`, `TypeError`, `IndexError` or `AttributeError` for what is
not an answer to what was asked: whoever asks takes any of them for a wrong one.

Shape suffixes: T tokens that were drawn or scored · K most likely ids · E entries a token.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_opd.rollout.requests import Request
from megatron_opd.rollout.sampling import Sampling

_NOTHING = -9999.0  # what vLLM sends for a log-probability that is not finite, or not there


@dataclass(frozen=True)
class Answer:
    """A response, and the log-probabilities that it was drawn with."""

    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish: Literal["stop", "length"]
    top_ids_TK: np.ndarray | None = None  # int32, best first
    top_logp_TK: np.ndarray | None = None  # fp32


@dataclass(frozen=True)
class Passage:
    """A sequence of tokens, of which those from `start` on are to be scored."""

    token_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Scored:
    """What a model thinks of the tokens of a passage, at temperature 1."""

    logp_T: np.ndarray  # fp32
    ids_TK: np.ndarray  # int64, most likely first
    top_logp_TK: np.ndarray  # fp32


def generate_body(request: Request, sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    """Ask for one response.

    The drawn token takes a place among the most likely ids, so there is one more of them.

    Raises:
        ValueError: an id that the model has no row for: a server without a tokenizer dies of it.
    """
    _check_ids(np.array(request.prompt.token_ids), vocab_size)
    top = min(sampling.top_ids + 1, vocab_size) if sampling.top_ids else 0
    return {
        "token_ids": request.prompt.token_ids,
        "sampling_params": {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": request.seed,
            "stop_token_ids": sampling.stop_ids,
            "ignore_eos": True,  # `stop_ids` has all that end a response
            "logprobs": top,
            "detokenize": False,
        },
    }


def read_answer(reply: Any, sampling: Sampling, *, vocab_size: int, version: str) -> Answer:
    """Read one response, all of it drawn by the weights `version`."""
    (choice,) = reply["choices"]
    ids, entries = choice["token_ids"], choice["logprobs"]["content"]
    if [entry["token_id"] for entry in entries] != ids:
        raise ValueError(f"{len(entries)} log-probabilities that are not of its {len(ids)} tokens")
    logp = [entry["logprob"] for entry in entries]
    _check_ids(np.array(ids), vocab_size)
    _check_logp(np.array(logp))
    _check_end(ids, choice["finish_reason"], sampling)
    _check_version(choice, version)
    top_ids_TK = top_logp_TK = None
    if sampling.top_ids:
        tops = [[(e["token_id"], e) for e in entry["top_logprobs"]] for entry in entries]
        top_ids_TK, top_logp_TK = _most_likely(tops, sampling.top_ids, vocab_size)
        top_ids_TK = top_ids_TK.astype(np.int32)
    return Answer(tuple(ids), tuple(logp), choice["finish_reason"], top_ids_TK, top_logp_TK)


def score_body(passage: Passage, k: int, vocab_size: int) -> dict[str, Any]:
    """Ask for the log-probabilities of a passage; the one token that is drawn is not looked at.

    Raises:
        ValueError: an id that the model has no row for.
    """
    _check_ids(np.array(passage.token_ids), vocab_size)
    return {
        "token_ids": passage.token_ids,
        "sampling_params": {
            "max_tokens": 1,
            "prompt_logprobs": k,
            "flat_logprobs": True,  # the server's own memory; what comes is the same
            "detokenize": False,
        },
    }


def read_scored(
    reply: Any, passage: Passage, k: int, *, vocab_size: int, version: str | None
) -> Scored:
    """Read the scores of a passage; the weights' `version` None: any."""
    entries = reply["prompt_logprobs"]
    if len(entries) != len(passage.token_ids):
        raise ValueError(f"{len(entries)} scores for {len(passage.token_ids)} tokens")
    entries, ids = entries[passage.start :], passage.token_ids[passage.start :]
    logp_T = np.array([e[str(token)]["logprob"] for e, token in zip(entries, ids, strict=True)])
    _check_logp(logp_T)
    if version is not None:
        _check_version(reply["choices"][0], version)
    tops = [[(int(token), e) for token, e in entry.items()] for entry in entries]
    ids_TK, top_logp_TK = _most_likely(tops, k, vocab_size)
    return Scored(logp_T.astype(np.float32), ids_TK, top_logp_TK)


def _most_likely(
    tops: list[list[tuple[int, Any]]], k: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order the entries of every token by rank: ids int64 and log-probabilities fp32, [T, K].

    The token itself is one of the entries, wherever it ranks: beyond k it is left out.
    """
    flat = [
        (token, entry["rank"], entry["logprob"])
        for top in tops
        for token, entry in top
        if entry["rank"] <= k
    ]
    found_TK3 = np.array(flat, np.float64).reshape(len(tops), k, 3)
    order_TK = found_TK3[:, :, 1].argsort(axis=1)
    found_TK3 = np.take_along_axis(found_TK3, order_TK[:, :, None], axis=1)
    if (found_TK3[:, :, 1] != np.arange(1, k + 1)).any():
        raise ValueError(f"most likely ids that do not rank 1 to {k}")
    ids_TK, logp_TK = found_TK3[:, :, 0].astype(np.int64), found_TK3[:, :, 2]
    _check_ids(ids_TK, vocab_size)
    _check_logp(logp_TK)
    return ids_TK, logp_TK.astype(np.float32)


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if ids.dtype.kind != "i":
        raise ValueError(f"token ids of type {ids.dtype}, or none")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"token id {wrong[0]}, of a vocabulary of {vocab_size}")


def _check_logp(logp: np.ndarray) -> None:
    if logp.dtype.kind not in "if":
        raise ValueError(f"log-probabilities of type {logp.dtype}")
    wrong = logp[~((logp > _NOTHING) & (logp <= 1e-6))]
    if wrong.size:
        raise ValueError(f"{wrong[0]:g} as a log-probability")


def _check_end(ids: list[int], finish: str, sampling: Sampling) -> None:
    """Check that a response ends where it has to, and nowhere before."""
    stops = [token in sampling.stop_ids for token in ids]
    right = {
        "stop": stops[-1] and len(ids) <= sampling.max_tokens,
        "length": not stops[-1] and len(ids) == sampling.max_tokens,
    }
    if any(stops[:-1]) or not right.get(finish):
        raise ValueError(
            f"a response that ends ({finish!r}) after {len(ids)} tokens, of at most "
            f"{sampling.max_tokens}, or has a stop id elsewhere than at its end"
        )


def _check_version(choice: Any, version: str) -> None:
    spans = [(s["version"], s["start"], s["end"]) for s in choice["weight_versions"]]
    if spans != [(version, 0, len(choice["token_ids"]))]:
        raise ValueError(f"weights of version {spans}, not {version!r} throughout")
