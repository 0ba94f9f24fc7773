"""Where each weight lies in Megatron's `torch_dist` format, which knows no layout.

A stored tensor is whole. The layers of a model that has but one kind of layer are stacked in it
(`decoder.layers.mlp.linear_fc2.weight`, `[layers, …]`); otherwise each has its own name
(`decoder.layers.3.…`). Experts are stacked on the next axis, or have their own names as well. Their
rows are those of `Weight.fuse` at tp 1, but newer versions cut gate from up (`…_w`, `…_v`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from megatron_opd.model.config import Architecture, padded_vocab
from megatron_opd.model.hf_map import Shape, Weight, weights

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_OURS = re.compile(r"(embedding|decoder|output_layer|mtp)\.")  # all else is a run's own state
# Megatron's local layers store the norm of a mixture of experts as if it were a dense layer's
_ALSO = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True)
class Place:
    """Where one Hugging Face tensor begins: `stored[key][at][row:]`."""

    key: str
    at: tuple[int, ...]  # its layer and its expert, where they are stacked
    row: int = 0  # of its first group: q, k and v lie interleaved


def find(
    weight: Weight, stored: Mapping[str, Shape], arch: Architecture
) -> list[tuple[Place, Shape]] | None:
    """Return where each Hugging Face tensor of `weight` is, and the shape that belongs there.

    `stored` is what there is. None: nothing has a name of `weight`.
    """
    for name in weight.megatron:
        for key, at, lead in _names(name, weight, arch):
            if key in stored:
                rows = [shape[0] // weight.groups for shape in weight.hf.values()]
                shape = (*lead, *weight.shard_shape(1))
                starts = accumulate(rows[:-1], initial=0)
                return [(Place(key, at, row), shape) for row in starts]
            if f"{key}_w" in stored and f"{key}_v" in stored and len(weight.hf) == 2:
                shapes = [(*lead, *shape) for shape in weight.hf.values()]
                return [
                    (Place(f"{key}_{end}", at), shape)
                    for end, shape in zip("wv", shapes, strict=True)
                ]
    return None


def unread(found: Iterable[Place], stored: Iterable[str]) -> list[str]:
    """Return the names of a model's tensors that are in none of the places."""
    known = {place.key for place in found}
    return [
        key
        for key in stored
        if _OURS.match(key) and key not in known and not key.endswith("_extra_state")
    ]


def places(arch: Architecture) -> list[tuple[Weight, Place, Shape]]:
    """Return where Megatron's own models put each weight, and the shape of the stored tensor."""
    every = weights(arch)
    split = [_split(_spelling(weight), weight) for weight in every]
    uniform = arch.experts is None or all(arch.experts.layers)
    found = []
    for (layer, rest), weight in zip(split, every, strict=True):
        key, at, lead = rest, (), ()
        if layer is not None:
            key = f"decoder.layers.{rest}" if uniform else f"decoder.layers.{layer}.{rest}"
            at, lead = ((layer,), (arch.layers,)) if uniform else ((), ())
        if weight.expert is not None and arch.experts:
            at, lead = (*at, weight.expert), (*lead, arch.experts.count)
        rows, *width = weight.shard_shape(1)
        rows = padded_vocab(rows, 1) if weight.vocab else rows
        found.append((weight, Place(key, at), (*lead, rows, *width)))
    return found


def _spelling(weight: Weight) -> str:
    """Return the name that Megatron stores: of a norm that can be fused, the fused one."""
    fused = [name for name in weight.megatron if name.endswith(".layer_norm_weight")]
    return (fused or weight.megatron)[0]


def _split(name: str, weight: Weight) -> tuple[int | None, str]:
    """Return the layer in a parameter's name, and what is left when the expert is out too."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return None, name
    rest, expert = layer[2], weight.expert
    if expert is not None:  # of the portable layers, or of Transformer Engine's grouped ones
        rest = rest.replace(f"local_experts.{expert}.", "").removesuffix(str(expert))
        rest = rest.replace("mlp.experts.", "mlp.experts.experts.")
    return int(layer[1]), rest


def _names(
    name: str, weight: Weight, arch: Architecture
) -> Iterator[tuple[str, tuple[int, ...], Shape]]:
    """Yield every (key, leading indices, sizes of these axes) a parameter may be stored under."""
    layer, rest = _split(name, weight)
    if layer is None:
        yield rest, (), ()
        return
    expert = () if weight.expert is None else (weight.expert,)
    experts = (arch.experts.count,) if expert and arch.experts else ()
    for kind in filter(None, (rest, _ALSO.get(rest))):
        yield f"decoder.layers.{kind}", (layer, *expert), (arch.layers, *experts)
        yield f"decoder.layers.{layer}.{kind}", expert, experts
        if expert:
            own = kind.replace(".linear_fc", f".{weight.expert}.linear_fc")
            yield f"decoder.layers.{layer}.{own}", (), ()
