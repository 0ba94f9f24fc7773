"""What the loss has of logits at a time: chunks of tokens, and the wide arithmetic on them."""

from megatron_opd.loss import Objective, Total
from megatron_opd.loss.shard import ARITHMETIC, chunk_tokens
from megatron_opd.memory.share import Share


def logits(
    objective: Objective | Total,
    share: Share,
    supervised: int,
    *,
    judges: int,
    fraction: float,
    heard: bool,
) -> dict[str, int]:
    """Return the loss's memory on a microbatch with so many supervised tokens.

    `judges` send hidden states, which are multiplied with their heads; `heard`: there are any.
    """
    tokens = max(_tokens(term, share, supervised, judges, fraction) for term in objective.terms)
    # of the part of a chunk that arithmetic works on: its own, and float32 copies of bfloat16
    buffers = (8 if heard else 4) + (1 + judges if share.width == 2 else 0)
    worked_on = min(tokens * share.columns, ARITHMETIC[share.device])
    return {
        "supervised hidden states": 2 * supervised * share.arch.hidden * share.width,
        "logits of a chunk": tokens * share.columns * share.width,
        "arithmetic on them, float32": buffers * worked_on * 4,
    }


def summary(objective: Objective | Total, share: Share, supervised: int) -> int:
    """Return the memory of a judge that sums up its logits: a chunk, and arithmetic on a part."""
    limit = objective.chunk_tokens or chunk_tokens(
        share.columns, share.width, share.device, dense_gradient=False
    )
    entries = min(limit, supervised) * share.columns
    return entries * share.width + 3 * min(entries, ARITHMETIC[share.device]) * 4


def _tokens(term: Objective, share: Share, supervised: int, judges: int, fraction: float) -> int:
    """Return how many rows of logits exist at a time, of all models together."""
    limit = term.chunk_tokens or chunk_tokens(
        share.columns, share.width, share.device, dense_gradient=term.over_vocabulary
    )
    chunk = -(-supervised // -(-supervised // limit))  # chunks of one size
    measured = min(limit, int(supervised * fraction))
    student = term.over_vocabulary or "student_ids_CK" in term.wants
    teacher = term.over_vocabulary or "teacher_ids_CK" in term.wants
    return (chunk if student else measured) + judges * (chunk if teacher else measured)
