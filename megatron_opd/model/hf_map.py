"""The map between Hugging Face tensors and Megatron parameters: every name and shape, once.

Megatron fuses q, k and v into one matrix, interleaved by query group (q … q k v | q … q k v | …),
and gate and up into another (gate | up). Cutting over tensor-parallel ranks commutes with both: a
rank's shard is the fusion of its slices, so the map needs one cut and one interleaving per entry.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_opd.model.config import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron: tuple[str, ...]  # its names: some depend on the layer spec or the pipeline stage
    hf: Mapping[str, Shape]  # whole tensors, in the order they are fused
    layer: int  # the decoder layer whose pipeline stage owns it
    cut: int | None = None  # dim divided over tensor-parallel ranks; None: every rank has it all
    groups: int = 1  # interleaved groups over all ranks
    vocab: bool = False  # rows are tokens, padded to the model's width

    def fuse(self, parts: list[Tensor], tp: int) -> Tensor:
        """Interleave one rank's slices of the Hugging Face tensors into its Megatron shard."""
        groups = max(self.groups // tp, 1)
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    def split(self, shard: Tensor, tp: int) -> list[Tensor]:
        """Undo `fuse`."""
        groups = max(self.groups // tp, 1)
        rows = [shape[0] for shape in self.hf.values()]
        per_group = [shard.size(0) * n // sum(rows) // groups for n in rows]
        return [x.flatten(0, 1) for x in shard.unflatten(0, (groups, -1)).split(per_group, 1)]


def weights(arch: Architecture) -> list[Weight]:
    """Return the whole model's map, in the order of the network."""
    return list(_weights(arch))


def manifest(arch: Architecture) -> dict[str, Shape]:
    """Return name → shape of every tensor of the Hugging Face checkpoint, in order."""
    return {name: shape for weight in weights(arch) for name, shape in weight.hf.items()}


def stage_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return this rank's parameters, layers numbered as in the whole model; `model`: a `Stage`."""
    layers, found = "decoder.layers.", {}
    for chunk in cast(Any, model):
        first = chunk.decoder.layers[0].layer_number - 1
        for name, parameter in chunk.named_parameters():
            if name.startswith(layers):
                local, rest = name.removeprefix(layers).split(".", 1)
                name = f"{layers}{int(local) + first}.{rest}"
            found[name] = parameter
    return found


def _weights(arch: Architecture) -> Iterator[Weight]:
    table, last = (arch.vocab_rows, arch.hidden), arch.layers - 1
    embedding = ("embedding.word_embeddings.weight",)
    head = ("output_layer.weight",)
    tied = embedding + head if arch.tied else embedding  # the last stage keeps a copy
    yield Weight(tied, {"model.embed_tokens.weight": table}, 0, cut=0, vocab=True)
    for layer in range(arch.layers):
        yield from _layer(arch, layer)
    yield Weight(("decoder.final_layernorm.weight",), {"model.norm.weight": (arch.hidden,)}, last)
    if not arch.tied:
        yield Weight(head, {"lm_head.weight": table}, last, cut=0, vocab=True)


def _layer(arch: Architecture, layer: int) -> Iterator[Weight]:
    here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    hidden, ffn = arch.hidden, arch.ffn

    def weight(megatron: tuple[str, ...], hf: dict[str, Shape], **how) -> Weight:
        return Weight(
            tuple(here + name for name in megatron),
            {there + name: shape for name, shape in hf.items()},
            layer,
            **how,
        )

    def qkv(kind: str, *width: int) -> Weight:
        rows = {"q": q, "k": kv, "v": kv}
        hf = {f"self_attn.{x}_proj.{kind}": (n, *width) for x, n in rows.items()}
        return weight((f"self_attention.linear_qkv.{kind}",), hf, cut=0, groups=arch.kv_heads)

    # Transformer Engine fuses each norm with the projection after it; the portable spec does not
    yield weight(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": (hidden,)},
    )
    yield qkv("weight", hidden)
    if arch.qkv_bias:
        yield qkv("bias")
    if arch.qk_norm:
        for x in "qk":
            name, shape = f"self_attn.{x}_norm.weight", (arch.head_dim,)
            yield weight((f"self_attention.{x}_layernorm.weight",), {name: shape})
    yield weight(
        ("self_attention.linear_proj.weight",), {"self_attn.o_proj.weight": (hidden, q)}, cut=1
    )
    yield weight(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": (hidden,)},
    )
    gate_up = {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
    yield weight(("mlp.linear_fc1.weight",), gate_up, cut=0)
    yield weight(("mlp.linear_fc2.weight",), {"mlp.down_proj.weight": (hidden, ffn)}, cut=1)
