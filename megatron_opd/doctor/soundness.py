"""Is everything there, and does it work? Figures → rows: pure functions that know no model.

Thresholds that are not here are in `signs`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_opd import signs
from megatron_opd.doctor.report import Row, Verdict

# Judgement, by dtype: largest difference of log p of a token of real text between two programs
# that compute the same network. Measured in fp32: below 4e-6. bfloat16 has 8 bits, and text has
# tokens with log p of −20.
LOGITS = {"float32": 1e-3, "bfloat16": 0.5}
CONTROL = 1e-4  # judgement: what rounding may leave of a loss that is 0
FULL = 0.9  # judgement: of the memory; the estimate leaves out communication and fragmentation


def tokenizers(differences: Sequence[str], *, ids: int, allowed: bool) -> Row:
    """Judge two tokenizers by the ids that are other tokens to them."""
    if not differences:
        return Row("tokenizers", "ok", f"all {ids:,} ids are the same tokens")
    first = ", ".join(differences[:5]) + (", …" if len(differences) > 5 else "")
    return Row(
        "tokenizers",
        "warn" if allowed else "fail",
        f"{len(differences):,} of {ids:,} ids differ ({first})",
        "distributions are compared id by id: take a teacher with the student's tokenizer, or set "
        "teacher.allow_tokenizer_mismatch=true if these ids never occur",
    )


def stop_ids(student: Mapping[int, str], teacher: Mapping[int, str]) -> Row:
    """Judge what ends a response: id → token of the run's stops, and of the teacher's own."""
    value = f"student {_named(student)}; teacher {_named(teacher)}"
    missing = {i: token for i, token in teacher.items() if i not in student}
    if missing:
        advice = (
            f"the teacher may end with {_named(missing)}, where the student goes on; add "
            f"{sorted(missing)} to rollout.stop_token_ids"
        )
        return Row("stop ids", "warn", value, advice)
    extra = {i: token for i, token in student.items() if i not in teacher}
    if extra:
        advice = (
            f"the teacher does not end with {_named(extra)}: its verdict on that last token may "
            "dominate; read student/nll and teacher/nll at the end of responses"
        )
        return Row("stop ids", "warn", value, advice)
    return Row("stop ids", "ok", value)


def _named(ids: Mapping[int, str]) -> str:
    return ", ".join(f"{index} {token!r}" for index, token in sorted(ids.items()))


@dataclass(frozen=True)
class Sanity:
    """What a model says of texts that it did not write."""

    finite: bool
    vocab_size: int
    entropy: float  # nats, mean over all tokens
    nll: Mapping[str, float]  # text → nats a token
    choices: int  # different tokens that it finds most likely, somewhere
    tokens: int


def loads(who: str, found: Sanity) -> Row:
    """Judge whether a model is one: finite, with preferences, and with some that are right.

    The best text counts: a model that was trained on responses alone knows nothing of prompts.
    """
    most, best = math.log(found.vocab_size), min(found.nll.values())
    told = ", ".join(f"{text} {value:.2f}" for text, value in found.nll.items())
    value = f"nats a token: {told}; ln V = {most:.2f}, entropy {found.entropy:.2f}"
    problem = ""
    if not found.finite:
        problem = "its log-probabilities are not finite"
    elif signs.prefers_nothing(found.entropy, found.vocab_size):
        problem = "it prefers hardly any token: zeroed or untrained weights look like this"
    elif found.choices == 1 and found.tokens > 20:
        problem = "it says the same whatever came before: weights are missing or constant"
    elif best > signs.UNINFORMED * most:
        problem = "real text surprises it as if it knew nothing: random or mixed-up weights"
    if not problem:
        return Row(f"{who} loads", "ok", value)
    return Row(f"{who} loads", "fail", value, f"{problem}; look at {who}.path")


def same_logits(who: str, largest: float, *, dtype: str, tokens: int) -> Row:
    """Judge the largest difference of log p between `transformers` in fp32 and our network."""
    value = f"largest difference of log p {largest:.1e} over {tokens} tokens, {dtype}"
    if largest <= LOGITS[dtype]:
        return Row(f"{who} logits", "ok", value)
    advice = (
        f"transformers and Megatron disagree about {who}.path: compare its config.json (rope, "
        "norms, tied embeddings) with what the README lists as supported, and report it"
    )
    return Row(f"{who} logits", "fail", value, advice)


def engine(name: str, kl: float, largest: float) -> Row:
    """Judge the k3 estimate of KL(engine ‖ trainer), and the largest log-ratio, in nats."""
    value = f"{name}: KL {kl:.1e}, largest log-ratio {largest:.1e}"
    verdict: Verdict = "ok" if kl < signs.MISMATCH_HIGH else "warn"
    if not kl < signs.MISMATCH_FAILING:
        verdict = "fail"
    advice = (
        "engine and trainer disagree about the tokens that the engine drew: check its dtype, or "
        "set rollout.correction=tis"
    )
    return Row("engine = trainer", verdict, value, "" if verdict == "ok" else advice)


def control(loss: float) -> Row:
    """Judge the objective of a student that is its own teacher."""
    if abs(loss) <= CONTROL:
        return Row("teacher = student", "ok", f"loss {loss:.1e}")
    return Row(
        "teacher = student",
        "fail",
        f"loss {loss:.3g}",
        "the objective is not 0 where both models agree: a function of your own that is no "
        "divergence, or a model whose output differs from one forward to the next",
    )


def memory(needed: int, available: int, *, device: str) -> Row:
    """Judge the estimated bytes of the fullest rank against those of its device."""
    value = f"{needed / 2**30:.2f} GiB estimated, {available / 2**30:.2f} GiB on {device}"
    if needed <= FULL * available:
        return Row("memory", "ok", value)
    advice = (
        "raise parallel.tp, lower train.microbatch_tokens or rollout.batch_size, or set "
        "train.recompute=full; --dry-run shows what takes how much"
    )
    return Row("memory", "warn" if needed <= available else "fail", value, advice)
