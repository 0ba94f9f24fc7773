"""Who judges: a teacher on the student's own ranks, or behind a server."""

from typing import Protocol

from megatron_opd.types import Microbatch, Scores


class Teacher(Protocol):
    """Judge every supervised token of every microbatch."""

    def score(self, microbatches: list[Microbatch]) -> list[Scores | None]:
        """Return one judgement per microbatch on the last pipeline stage, None on the others.

        Collective over all ranks; replicas may have other numbers of microbatches, or none.
        """
        ...

    def close(self) -> None:
        """Give back what is held beyond this process."""
        ...


__all__ = ["Teacher"]
