"""Supports: which entries of the vocabulary student and teacher are compared on.

A support is a function to `(ids_CK, valid_CK)`, [C, K] both; entries that are not valid play no
part, so a set may be smaller than K, or empty. Its parameters say what it wants, by name:

    student_ids_CK  the student's k most likely ids, best first
    teacher_ids_CK  the teacher's
    rollout_ids_CK  the student's, as the rollout engine saw them
    target_C        the token of the response

Valid ids of a token must be different ones. C tokens · K entries.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

Ids = tuple[Tensor, Tensor]


def student_topk(student_ids_CK: Tensor) -> Ids:
    """The student's k most likely (the paper's)."""
    return _all(student_ids_CK)


def teacher_topk(teacher_ids_CK: Tensor) -> Ids:
    """The teacher's k most likely."""
    return _all(teacher_ids_CK)


def rollout_topk(rollout_ids_CK: Tensor) -> Ids:
    """The student's k most likely, from the engine that drew the response: on-policy the same ids
    as student_topk, without multiplying by the student's head to find them."""
    return _all(rollout_ids_CK)


def intersection(student_ids_CK: Tensor, teacher_ids_CK: Tensor) -> Ids:
    """What both find likely; may be empty."""
    return student_ids_CK, among(student_ids_CK, teacher_ids_CK)


def union(student_ids_CK: Tensor, teacher_ids_CK: Tensor) -> Ids:
    """What either finds likely."""
    new_CK = ~among(teacher_ids_CK, student_ids_CK)
    ids_CK = torch.cat([student_ids_CK, teacher_ids_CK], dim=-1)
    return ids_CK, torch.cat([torch.ones_like(new_CK), new_CK], dim=-1)


def union_intersection(student_ids_CK: Tensor, teacher_ids_CK: Tensor) -> Ids:
    """What exactly one finds likely (the paper's non-overlap); may be empty."""
    ids_CK = torch.cat([student_ids_CK, teacher_ids_CK], dim=-1)
    only_s_CK = ~among(student_ids_CK, teacher_ids_CK)
    only_t_CK = ~among(teacher_ids_CK, student_ids_CK)
    return ids_CK, torch.cat([only_s_CK, only_t_CK], dim=-1)


def sampled(target_C: Tensor) -> Ids:
    """The token of the response alone."""
    return _all(target_C.unsqueeze(-1))


def among(ids_CK: Tensor, others_CL: Tensor) -> Tensor:
    """Say which ids are among the others of their token, [C, K]."""
    return (ids_CK.unsqueeze(-1) == others_CL.unsqueeze(-2)).any(-1)


def append(ids_CK: Tensor, valid_CK: Tensor, target_C: Tensor) -> Ids:
    """Add the response's token where it is not there yet, [C, K + 1]."""
    target_C1 = target_C.unsqueeze(-1)
    new_C1 = ~((ids_CK == target_C1) & valid_CK).any(-1, keepdim=True)
    return torch.cat([ids_CK, target_C1], dim=-1), torch.cat([valid_CK, new_C1], dim=-1)


def _all(ids_CK: Tensor) -> Ids:
    return ids_CK, torch.ones_like(ids_CK, dtype=torch.bool)


SUPPORTS: dict[str, Callable[..., Ids]] = {
    "sampled": sampled,
    "student_topk": student_topk,
    "rollout_topk": rollout_topk,
    "teacher_topk": teacher_topk,
    "intersection": intersection,
    "union": union,
    "union-intersection": union_intersection,
}
INPUTS = ("student_ids_CK", "teacher_ids_CK", "rollout_ids_CK", "target_C")


def inputs(support: Callable[..., Ids]) -> tuple[str, ...]:
    """Return what a support wants, by the names of its parameters.

    Raises:
        ValueError: a parameter is none of `INPUTS`.
    """
    names = tuple(inspect.signature(support).parameters)
    for name in names:
        if name not in INPUTS:
            raise ValueError(
                f"objective.support: {support.__name__} has a parameter '{name}', expected some of "
                + ", ".join(INPUTS)
            )
    return names
