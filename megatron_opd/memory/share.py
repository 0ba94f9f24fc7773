"""What one rank has of a network: layers, parameters and their shares of the optimizer."""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_opd.config import Mesh
from megatron_opd.model import Architecture, architecture, padded_vocab
from megatron_opd.model.hf_map import manifest, weights
from megatron_opd.parallel import place

WIDTH = {"bfloat16": 2, "float32": 4}  # bytes


def count_parameters(path: str) -> int:
    """Return the parameters of a Hugging Face directory's network, tied ones once."""
    return sum(math.prod(shape) for shape in manifest(architecture(path)).values())


@dataclass(frozen=True)
class Share:
    """The part of a network that a rank of one pipeline stage has; all of the stage are alike."""

    arch: Architecture
    mesh: Mesh
    stage: int
    world: int
    cp: int
    width: int  # bytes of a weight
    device: str  # "cpu" or "cuda": they keep different tensors for the backward
    rows: int  # of the vocabulary, before padding

    @property
    def tp(self) -> int:
        return self.mesh.tp

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.mesh.pp - 1

    @property
    def replicas(self) -> int:
        """Ranks that have the same dense weights and other tokens."""
        return self.world // (self.tp * self.mesh.pp)

    @cached_property
    def layers(self) -> list[int]:
        """The decoder layers of this stage, in all its chunks."""
        every = range(self.arch.layers)
        return [i for i in every if self._place(i) == self.stage]

    def _place(self, layer: int) -> int:
        return place(layer, self.arch.layers, self.mesh.pp, self.mesh.vpp)[0]

    @property
    def sparse(self) -> list[bool]:
        """Say of each layer of this stage whether it has experts."""
        experts = self.arch.experts
        return [bool(experts and experts.layers[i]) for i in self.layers]

    @property
    def columns(self) -> int:
        """Rows of the vocabulary tables on a rank, with padding."""
        return padded_vocab(self.rows, self.tp) // self.tp

    @property
    def etp(self) -> int:
        return self.mesh.etp or self.tp

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Return how many are dense, and how many are of experts."""
        dense = experts = 0
        for weight in weights(self.arch):
            on_last = weight.vocab and self.arch.tied and self.is_last  # a copy, as its head
            if self._place(weight.layer) != self.stage and not on_last:
                continue
            if weight.vocab:
                dense += self.columns * self.arch.hidden
            elif weight.expert is not None:
                experts += math.prod(weight.shard_shape(self.etp))
            else:
                dense += math.prod(weight.shard_shape(self.tp))
        return dense, experts // self.mesh.ep

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return sum(self.parameters) * self.width

    def optimized(self, *, distributed: bool) -> int:
        """Return the parameters whose optimizer states are here."""
        dense, experts = self.parameters
        if not distributed:
            return dense + experts
        expert_replicas = self.world // self.mesh.pp // (self.mesh.ep * self.etp)
        return dense // self.replicas + experts // expert_replicas
