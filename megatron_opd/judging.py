"""All models that judge a step: each teacher its own samples, the base all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_opd.step import Judgement
from megatron_opd.teacher import Teacher
from megatron_opd.teacher.ema import EmaTeacher
from megatron_opd.teacher.mesh import MeshTeacher
from megatron_opd.types import Microbatch, Scores


class Judges:
    """Teachers by the name that prompts give them (the only one has none), and the base."""

    def __init__(self, teachers: Mapping[str, Teacher], base: Teacher | None = None):
        self.teachers, self.base = teachers, base

    @property
    def followers(self) -> dict[str, EmaTeacher]:
        """The teachers that change with the student: checkpoints keep them."""
        return {n: t for n, t in self.teachers.items() if isinstance(t, EmaTeacher)}

    def score(self, microbatches: Sequence[Microbatch]) -> list[Judgement]:
        """Ask each microbatch's teacher, after the prompt that this one reads, and the base.

        Collective: all ranks ask all judges in one order, about nothing perhaps.
        """
        heard: list[Scores | None] = [None] * len(microbatches)
        for name, teacher in self.teachers.items():
            own = [i for i, batch in enumerate(microbatches) if batch.teacher == name]
            scores = teacher.score([microbatches[i].as_judged() for i in own])
            for index, one in zip(own, scores, strict=True):
                heard[index] = _aligned(one, microbatches[index])
        base = self.base.score(list(microbatches)) if self.base else [None] * len(microbatches)
        return [Judgement(*both) for both in zip(heard, base, strict=True)]

    def traffic(self) -> int | None:
        """Return the bytes that this rank has sent for judges on meshes of their own since asked.

        None where there are no such judges.
        """
        moving = [judge for judge in self._all if isinstance(judge, MeshTeacher)]
        sent = sum(judge.bytes_sent for judge in moving)
        for judge in moving:
            judge.bytes_sent = 0
        return sent if moving else None

    @property
    def _all(self) -> list[Teacher]:
        return [*self.teachers.values(), *([self.base] if self.base else [])]

    def follow(self) -> dict[str, float]:
        """Let the averaged teachers follow the student, and say how far behind they are."""
        return {
            f"teacher/ema_distance{'@' if name else ''}{name}": teacher.follow()
            for name, teacher in self.followers.items()
        }

    def close(self) -> None:
        """Give back what is held beyond this process."""
        for judge in self._all:
            judge.close()


def _aligned(scores: Scores | None, batch: Microbatch) -> Scores | None:
    """Return what is said of a rank's tokens where it has others of what the teacher reads.

    Collective over context-parallel ranks: with another prompt, a response is cut elsewhere.
    """
    read = batch.context
    if scores is None or read is None or read.part is None:
        return scores
    own = {
        name: batch.own(read.gathered(x_N))
        for name, x_N in vars(scores).items()
        if name.endswith(("_N", "_NH", "_NK"))
    }
    return replace(scores, **own)
