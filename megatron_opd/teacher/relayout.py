"""Two meshes on the same ranks: who judges which microbatch, and what travels for it.

The microbatches of the student's replicas are dealt out to the teacher's; token ids travel there,
and what the teacher says of each supervised token travels back, each from a rank that has it
straight to a rank that needs it. A rank that is both copies nothing.

Shapes: P pipeline stages · D replicas · C context-parallel · R tensor-parallel ranks of a mesh.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.parallel import Parallel


class Size(NamedTuple):
    """How much there is of a microbatch."""

    tokens: int
    bounds: int  # of sequences: one more than there are
    sources: tuple[int, ...]  # supervised tokens of each context-parallel rank


class Item(NamedTuple):
    """A microbatch of the student, whoever has it."""

    replica: int
    index: int  # among those of its replica
    size: Size

    def rows(self, part: int) -> slice:
        """Return which rows of the answer a context-parallel rank needs."""
        before = sum(self.size.sources[:part])
        return slice(before, before + self.size.sources[part])


class Meshes:
    """Where the ranks of the student's replicas and of the teacher's are."""

    def __init__(self, student: Parallel, teacher: Parallel):
        world = torch.arange(student.world)
        self.rank, self.part = student.rank, student.cp_rank
        self.mine, self.judging = student.dp_rank, teacher.dp_rank  # the replicas of this rank
        self.student_PDCR = world.view(student.pp, student.dp, student.cp, student.tp)
        self.teacher_PDR = world.view(teacher.pp, teacher.dp, teacher.tp)
        self.members = [set(self.judges(replica)) for replica in range(teacher.dp)]

    def holders(self, replica: int) -> list[int]:
        """Return the ranks of a replica of the student: each knows its whole microbatches."""
        return self.student_PDCR[:, replica].flatten().tolist()

    def askers(self, replica: int) -> list[list[int]]:
        """Return those of them that need the answer: the last stage, each context-parallel part."""
        return self.student_PDCR[-1, replica].tolist()

    def judges(self, replica: int) -> list[int]:
        """Return the ranks of a replica of the teacher."""
        return self.teacher_PDR[:, replica].flatten().tolist()

    def speakers(self, replica: int) -> list[int]:
        """Return those of them that have the answer: the last stage."""
        return self.teacher_PDR[-1, replica].tolist()

    def near(self, replica: int) -> list[int]:
        """Return the replicas of the teacher that have a rank of one of the student's."""
        ranks = set(self.holders(replica))
        return [i for i, judges in enumerate(self.members) if not ranks.isdisjoint(judges)]

    def deal(self, sizes: Sequence[Sequence[Size]]) -> "Deal":
        """Deal all microbatches out to the replicas of the teacher; `sizes[rank]`: of each rank.

        The largest first, each to the replica with the fewest tokens: that is how many one must
        take. Within this, a microbatch stays with a replica that has one of its ranks.
        """
        heads = self.student_PDCR[0, :, 0, 0].tolist()
        items = [Item(d, i, x) for d, rank in enumerate(heads) for i, x in enumerate(sizes[rank])]
        items.sort(key=lambda item: -item.size.tokens)
        replicas, near = range(len(self.members)), [self.near(d) for d in range(len(heads))]
        loads = [0] * len(replicas)
        for item in items:
            loads[min(replicas, key=loads.__getitem__)] += item.size.tokens
        most, loads, places = max(loads), [0] * len(replicas), {}
        for item in items:
            free = [i for i in near[item.replica] if loads[i] + item.size.tokens <= most]
            places[item] = min(free or replicas, key=loads.__getitem__)
            loads[places[item]] += item.size.tokens
        return Deal(self, dict(sorted(places.items())))


class Deal:
    """Which replica of the teacher judges each microbatch, and so what this rank moves.

    Every list is in the order of the items: two ranks that exchange several things agree on which
    comes first.
    """

    def __init__(self, meshes: Meshes, places: dict[Item, int]):
        self.meshes = meshes
        self.asked = [
            (item, place) for item, place in places.items() if item.replica == meshes.mine
        ]
        self.judged = [item for item, place in places.items() if place == meshes.judging]

    def ids_out(self) -> Iterator[tuple[Item, int]]:
        """Yield what this rank sends of its microbatches' ids, and where: a share of the work."""
        for item, place in self.asked:
            holders = self.meshes.holders(item.replica)
            for i, target in enumerate(self.meshes.judges(place)):
                if target not in holders and holders[i % len(holders)] == self.meshes.rank:
                    yield item, target

    def ids_in(self) -> Iterator[tuple[Item, int]]:
        """Yield whose ids this rank gets, and from where."""
        here = self.meshes.judges(self.meshes.judging).index(self.meshes.rank)
        for item in self.judged:
            if item.replica != self.meshes.mine:
                holders = self.meshes.holders(item.replica)
                yield item, holders[here % len(holders)]

    def answers_out(self) -> Iterator[tuple[Item, slice, int]]:
        """Yield which rows of its answers this rank sends, and where."""
        speakers = self.meshes.speakers(self.meshes.judging)
        if self.meshes.rank not in speakers:
            return
        for item in self.judged:
            for part, targets in enumerate(self.meshes.askers(item.replica)):
                rows = share(item.rows(part), speakers, self.meshes.rank)
                yield from ((item, rows, target) for target in targets if target not in speakers)

    def answers_in(self) -> Iterator[tuple[Item, slice, int]]:
        """Yield which rows of the answers this rank gets, and from where: perhaps from itself.

        Else each tensor-parallel rank of the teacher's last stage sends as much.
        """
        for item, place in self.asked:
            rows, speakers = item.rows(self.meshes.part), self.meshes.speakers(place)
            if self.meshes.rank in speakers:
                yield item, rows, self.meshes.rank
            else:
                yield from ((item, share(rows, speakers, source), source) for source in speakers)


def share(rows: slice, speakers: Sequence[int], rank: int) -> slice:
    """Return which of some rows one of several ranks sends: about as many as any other."""
    index, count = speakers.index(rank), rows.stop - rows.start
    start, stop = (rows.start + count * i // len(speakers) for i in (index, index + 1))
    return slice(start, stop)


def exchange(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> int:
    """Send each tensor to its rank, fill each from its rank, and return the bytes that left.

    What one rank sends another arrives in the order in which it is sent. Tensors without entries
    do not travel.
    """
    sends, receives = ([(x, rank) for x, rank in some if len(x)] for some in (sends, receives))
    operations = [dist.P2POp(dist.isend, tensor, rank) for tensor, rank in sends]
    operations += [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in receives]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    return sum(tensor.nbytes for tensor, _ in sends)
