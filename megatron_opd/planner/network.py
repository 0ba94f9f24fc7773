"""A network on the ranks of a layout: parameters and operations, counted from config.json."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

from megatron_opd.model import Architecture, padded_vocab
from megatron_opd.model.hf_map import Weight, weights
from megatron_opd.parallel import place
from megatron_opd.planner.layout import Layout

MATRIX = 2  # dims of a weight that is multiplied with


@dataclass(frozen=True)
class Network:
    """One model at one layout, with `width` bytes a weight and an activation."""

    arch: Architecture
    layout: Layout
    width: int
    rows: tuple[Weight, ...] = ()  # of the weight map; of experts, the first stands for all

    def __post_init__(self):
        if not self.rows:
            rows = tuple(weight for weight in weights(self.arch) if not weight.expert)
            object.__setattr__(self, "rows", rows)

    def at(self, layout: Layout) -> "Network":
        """Return the same network at another layout."""
        return replace(self, layout=layout)

    def stage_of(self, layer: int) -> int:
        """Return the pipeline stage that holds a layer."""
        return self._stages[layer]

    @cached_property
    def _stages(self) -> list[int]:
        layers, layout = self.arch.layers, self.layout
        return [place(n, layers, layout.pp, layout.vpp)[0] for n in range(layers)]

    def layers(self, stage: int) -> list[int]:
        """Return the layers that a stage holds."""
        return [n for n in range(self.arch.layers) if self.stage_of(n) == stage]

    def sparse_layers(self, stage: int) -> int:
        """Return how many layers of a stage have experts."""
        experts = self.arch.experts
        return sum(experts.layers[layer] for layer in self.layers(stage)) if experts else 0

    def of_stage(self, stage: int) -> Iterator[tuple[Weight, int]]:
        """Yield the weights on one rank of a stage, and how many there are alike.

        Of tied embeddings the last stage holds a copy.
        """
        last, tied = self.layout.pp - 1, self.arch.tied and self.layout.pp > 1
        for weight in self.rows:
            if self.stage_of(weight.layer) == stage or (weight.vocab and tied and stage == last):
                yield weight, self._copies(weight) // self.layout.ep if weight.expert == 0 else 1

    def _copies(self, weight: Weight) -> int:
        return self.arch.experts.count if weight.expert == 0 and self.arch.experts else 1

    def elements(self, weight: Weight) -> int:
        """Return the elements of a weight on one rank, the padding of a vocabulary with them."""
        size = _size(weight)
        if weight.vocab:
            rows = self.arch.vocab_rows
            size = size // rows * padded_vocab(rows, self.layout.tp)
        if weight.cut is None:
            return size
        return size // (self.layout.tp if weight.expert is None else self.layout.etp)

    def parameters(self, stage: int) -> int:
        """Return the parameters on one rank of a stage."""
        return sum(self.elements(weight) * copies for weight, copies in self.of_stage(stage))

    @cached_property
    def bytes(self) -> int:
        """Bytes of the whole model's weights, tied ones once."""
        return sum(_size(weight) * self._copies(weight) for weight in self.rows) * self.width

    def matrix_flops(self, stage: int) -> float:
        """Return the operations a token of its weights' products on one rank: 2 an element.

        A token goes through some of the experts, whose ranks share all tokens evenly. Without the
        vocabulary's: an embedding is looked up, and heads are the loss's.
        """
        layout, experts, flops = self.layout, self.arch.experts, 0.0
        for weight in self.rows:
            if weight.vocab or not _is_matrix(weight) or self.stage_of(weight.layer) != stage:
                continue
            passes = experts.per_token if weight.expert == 0 and experts else 1
            shared = weight.cut is not None or layout.sequence_parallel
            flops += 2 * _size(weight) * passes / (layout.tp if shared else 1)
        return flops

    def attention_flops(self, stage: int) -> float:
        """Return what a pair of positions costs on one rank: q·k and the sum of v, of all heads."""
        arch, layers = self.arch, len(self.layers(stage))
        value = arch.latent.value if arch.latent else arch.head_dim
        return 2 * arch.heads * (arch.head_dim + value) * layers / self.layout.tp

    def head_flops(self) -> float:
        """Return the operations a token of all logits on one rank."""
        columns = padded_vocab(self.arch.vocab_rows, self.layout.tp) // self.layout.tp
        return 2 * columns * self.arch.hidden

    def cache_bytes(self) -> float:
        """Return the bytes of a token's keys and values on one tensor-parallel rank, all layers."""
        return self.arch.cache_elements(self.layout.tp) * self.width

    def read_bytes(self, tokens: float) -> float:
        """Return the bytes of weights that decoding so many tokens at once reads on one rank.

        Of the experts, those that some token comes to when all are as likely.
        """
        experts, size = self.arch.experts, 0.0
        for weight in self.rows:
            if weight.vocab and not self.arch.tied and weight.megatron[0].startswith("embedding"):
                continue  # some rows of it
            own = _size(weight) * self._copies(weight) * self.width
            if weight.expert == 0 and experts:
                own *= 1 - (1 - experts.per_token / experts.count) ** tokens
            size += own / (self.layout.tp if weight.cut is not None else 1)
        return size


def _size(weight: Weight) -> int:
    return _product(tuple(weight.hf.values()))


@cache
def _product(shapes: tuple[tuple[int, ...], ...]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _is_matrix(weight: Weight) -> bool:
    return len(next(iter(weight.hf.values()))) == MATRIX
