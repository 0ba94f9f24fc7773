"""Ways to lay a model out over ranks, for every test that wants the same numbers from all."""

from typing import NamedTuple

from megatron_opd import parallel as mesh
from megatron_opd.packing import pack
from megatron_opd.types import Microbatch
from megatron_opd.zigzag import part_of


class Layout(NamedTuple):
    """Sizes of the axes; `Layout()` is one process."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1
    sp: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        """Name the axes that are not 1: TP2×PP2·VPP2+SP."""
        vpp = f"·VPP{self.vpp}" if self.vpp > 1 else ""
        sizes = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "EP": self.ep, "DP": self.dp}
        names = [f"{k}{n}{vpp if k == 'PP' else ''}" for k, n in sizes.items() if n > 1]
        names += [f"ETP{self.etp}"] if self.etp is not None else []
        return ("×".join(names) or "one") + ("+SP" if self.sp else "")

    def join(self) -> mesh.Parallel:
        """Initialise the mesh on this rank."""
        return mesh.initialize(
            self.tp,
            self.pp,
            cp=self.cp,
            ep=self.ep,
            etp=self.etp,
            vpp=self.vpp,
            sequence_parallel=self.sp,
        )


def pack_here(rollouts, parallel: mesh.Parallel, **how) -> list[Microbatch]:
    """Pack a replica's rollouts as a run does, and return this rank's parts."""
    multiple = parallel.tp if parallel.sequence_parallel else 1
    whole = pack(rollouts, multiple=multiple, cp=parallel.cp, **how)
    cp = {"size": parallel.cp, "rank": parallel.cp_rank, "group": parallel.cp_group}
    return [part_of(batch, **cp) for batch in whole]
