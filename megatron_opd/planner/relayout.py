"""What travels between the student's mesh and one of the judges' own."""

from typing import Any, NamedTuple

from megatron_opd.planner.layout import Layout
from megatron_opd.planner.traffic import INT, Flow, Load
from megatron_opd.teacher.relayout import Meshes, Size


def sent(student: Layout, judging: Layout, load: Load, row: float, rank: int) -> Flow:
    """Return what a rank sends for judges on another mesh: token ids there, answers back.

    `row`: bytes of the answer to a token; `load`: of a replica of the student, all microbatches
    alike. They are dealt out as by the teacher itself.
    """
    tokens = round(load.tokens * student.cp / load.microbatches)
    size = Size(tokens, 2, (round(load.supervised / load.microbatches),) * student.cp)
    meshes = Meshes(_seat(student, rank), _seat(judging, rank))
    deal = meshes.deal([[size] * load.microbatches] * student.world)
    rows = sum(rows.stop - rows.start for _, rows, _ in deal.answers_out())
    asked = [tokens + sum(size.sources) for _ in deal.ids_out()]
    return Flow("world", "send", rows * row + sum(asked) * INT, rows > 0)


def _seat(layout: Layout, rank: int) -> Any:
    """Return what `Meshes` wants to know of a rank."""
    stage = rank % (layout.world // layout.pp)
    return Seat(
        layout.world,
        layout.tp,
        layout.pp,
        layout.dp,
        layout.cp,
        rank,
        cp_rank=stage // layout.tp % layout.cp,
        dp_rank=stage // (layout.tp * layout.cp),
    )


class Seat(NamedTuple):
    """A rank of a mesh that nobody has joined."""

    world: int
    tp: int
    pp: int
    dp: int
    cp: int
    rank: int
    cp_rank: int
    dp_rank: int
