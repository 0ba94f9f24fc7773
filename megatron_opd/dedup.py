"""Questions that were asked before: word for word, or nearly, by the cosine of their embeddings.

Shape suffixes: N questions · B of them in a block · D dimensions of an embedding.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opd import templates

MODEL = "sentence-transformers/all-mpnet-base-v2"  # of the paper's dedup
THRESHOLD = 0.6


@dataclass(frozen=True)
class Twin:
    """A question that goes, and the earlier one that stays; both by their place in the list."""

    index: int
    partner: int
    cosine: float  # 1 where they are equal


def question_of(messages: Sequence[dict[str, Any]]) -> str:
    """Return what is compared: the bare last question, after the turns that lead to it."""
    last = templates.asked(messages)
    if last is None:
        return "\n".join(message["content"] for message in messages)
    turns = [m["content"] for m in messages[:last] if m["role"] != "system"]
    return "\n".join([*turns, templates.bare(messages[last]["content"])])


def equal(questions: Sequence[str], *, known: int = 0) -> list[Twin]:
    """Find the questions that equal an earlier one; the first `known` are not asked about."""
    first: dict[str, int] = {}
    twins = []
    for index, question in enumerate(questions):
        partner = first.setdefault(question, index)
        if partner != index and index >= known:
            twins.append(Twin(index, partner, 1.0))
    return twins


def alike(
    vectors_ND: np.ndarray, *, known: int = 0, threshold: float = THRESHOLD, block: int = 1024
) -> list[Twin]:
    """Find the questions whose nearest earlier one that stays has a cosine of at least `threshold`.

    `vectors_ND` are fp32 of length 1; the first `known` all stay and are not asked about. The
    result is that of asking one by one, in order; blocks, of so many, only make it fast.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss  # large, and seldom wanted
    except ImportError as problem:
        raise _absent("faiss-cpu", problem) from None
    index = faiss.IndexFlatIP(vectors_ND.shape[1])
    index.add(vectors_ND[:known])
    place = [*range(known)]  # of each vector in the index
    twins = []
    for start in range(known, len(vectors_ND), block):
        block_BD = vectors_ND[start : start + block]
        cosine_B1, nearest_B1 = index.search(block_BD, 1)
        earlier = [
            (float(cosine), place[nearest] if nearest >= 0 else -1)  # -1: the index is empty
            for (cosine,), (nearest,) in zip(cosine_B1, nearest_B1, strict=True)
        ]
        found = _alike_in_block(block_BD, start, earlier, threshold)
        twins += found
        gone = {twin.index - start for twin in found}
        stay = [i for i in range(len(block_BD)) if i not in gone]
        index.add(block_BD[stay])
        place += [start + i for i in stay]
    return twins


def _alike_in_block(
    block_BD: np.ndarray, start: int, earlier: Sequence[tuple[float, int]], threshold: float
) -> list[Twin]:
    """Decide on a block in order, knowing each one's nearest (cosine, place) before the block."""
    cosine_BB = block_BD @ block_BD.T
    stay: list[int] = []
    twins = []
    for i, best in enumerate(earlier):
        if stay:
            nearest = stay[int(cosine_BB[i, stay].argmax())]
            best = max(best, (float(cosine_BB[i, nearest]), start + nearest), key=lambda x: x[0])
        if best[0] >= threshold:
            twins.append(Twin(start + i, best[1], best[0]))
        else:
            stay.append(i)
    return twins


def embed(questions: Sequence[str], model: str = MODEL) -> tuple[np.ndarray, int]:
    """Return the embeddings, [N, D] fp32 of length 1, and how many questions the model cut.

    `model` is what sentence-transformers loads: a folder, or a name that it has or can fetch.

    Raises:
        ValueError: sentence-transformers is not installed, or has no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer  # takes seconds
    except ImportError as problem:
        raise _absent("sentence-transformers", problem) from None
    try:
        encoder = SentenceTransformer(model)
    except Exception as problem:  # of what type depends on what is wrong with the files
        told = str(problem).strip().splitlines()[0]
        raise ValueError(
            f"model: got '{model}', expected the folder or name of a sentence-transformers model: "
            f"{told}"
        ) from None
    vectors_ND = encoder.encode(
        list(questions),
        batch_size=64,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=sys.stderr.isatty(),
    )
    tokens = encoder.tokenizer(list(questions), truncation=False, verbose=False)["input_ids"]
    limit = encoder.max_seq_length or sys.maxsize
    return np.ascontiguousarray(vectors_ND, np.float32), sum(len(ids) > limit for ids in tokens)


def _absent(library: str, problem: ImportError) -> ValueError:
    return ValueError(f"dedup: needs {library} ({problem}); pip install 'megatron_opd[data]'")
