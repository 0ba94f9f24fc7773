"""All models that judge a step: each teacher its own samples, the base all of them."""

from collections.abc import Mapping, Sequence

from megatron_opd.step import Judgement
from megatron_opd.teacher import Teacher
from megatron_opd.teacher.ema import EmaTeacher
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
                heard[index] = one
        base = self.base.score(list(microbatches)) if self.base else [None] * len(microbatches)
        return [Judgement(*both) for both in zip(heard, base, strict=True)]

    def follow(self) -> dict[str, float]:
        """Let the averaged teachers follow the student, and say how far behind they are."""
        return {
            f"teacher/ema_distance{'@' if name else ''}{name}": teacher.follow()
            for name, teacher in self.followers.items()
        }

    def close(self) -> None:
        """Give back what is held beyond this process."""
        for judge in (*self.teachers.values(), *([self.base] if self.base else [])):
            judge.close()
