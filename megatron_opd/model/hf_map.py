"""The map between Hugging Face tensors and Megatron parameters: every name and shape, once.

Megatron fuses q, k and v into one matrix, interleaved by query group (q … q k v | q … q k v | …),
and gate and up into another (gate | up). Cutting over tensor-parallel ranks commutes with both: a
rank's shard is the fusion of its slices, so the map needs one cut and one interleaving per entry.
Experts are dealt out whole, in blocks of consecutive ones, and each is cut over ranks of its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from megatron_opd.model.config import Architecture, Experts

Shape = tuple[int, ...]
_CORRECTION = "mlp.router.expert_bias"  # Megatron keeps it as a buffer, in fp32
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)")


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron: tuple[str, ...]  # its names: some depend on the layer spec or the pipeline stage
    hf: Mapping[str, Shape]  # whole tensors, in the order they are fused
    layer: int = 0  # the decoder layer whose pipeline stage owns it
    cut: int | None = None  # dim divided over tensor-parallel ranks; None: every rank has it all
    groups: int = 1  # interleaved groups over all ranks
    vocab: bool = False  # rows are tokens, padded to the model's width
    expert: int | None = None  # of a routed expert: which one; the ranks are etp instead of tp
    start: float | None = None  # what all entries of an untrained model are; None: random
    fp32: bool = False  # whatever the dtype of the model

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        return torch.float32 if self.fp32 else of_model

    def shard_shape(self, tp: int) -> Shape:
        """Return the shape that one of `tp` ranks has of it (not of a table, which is padded)."""
        shape = [sum(rows for rows, *_ in self.hf.values()), *next(iter(self.hf.values()))[1:]]
        if self.cut is not None:
            shape[self.cut] //= tp
        return tuple(shape)

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


def spare_layers(arch: Architecture) -> tuple[str, ...]:
    """Return how tensors begin that a checkpoint may have besides: of multi-token prediction."""
    return tuple(f"model.layers.{arch.layers + extra}." for extra in range(arch.predictors))


def stage_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's weights, layers and experts numbered as in the whole model.

    `model` is a `Stage`. Besides the parameters there are the biases that correct the choice of
    experts, which are buffers.
    """
    layers, found = "decoder.layers.", {}
    for chunk in cast(Any, model):
        decoder = chunk.decoder.layers
        first = decoder[0].layer_number - 1
        biases = [(k, v) for k, v in chunk.named_buffers() if k.endswith(_CORRECTION)]
        for name, parameter in [*chunk.named_parameters(), *biases]:
            if name.startswith(layers):
                local, rest = name.removeprefix(layers).split(".", 1)
                rest = _count_experts(rest, decoder[int(local)].mlp)
                name = f"{layers}{int(local) + first}.{rest}"
            found[name] = parameter
    return found


def _count_experts(name: str, mlp: nn.Module) -> str:
    """Renumber the expert in a parameter's name, which counts those of its rank."""
    if not isinstance(mlp, MoELayer):
        return name
    return _EXPERT.sub(lambda found: f"{found[1]}{mlp.local_expert_indices[int(found[2])]}", name)


def _weights(arch: Architecture) -> Iterator[Weight]:
    table, last = (arch.vocab_rows, arch.hidden), arch.layers - 1
    embedding = ("embedding.word_embeddings.weight",)
    head = ("output_layer.weight",)
    tied = embedding + head if arch.tied else embedding  # the last stage keeps a copy
    yield Weight(tied, {"model.embed_tokens.weight": table}, 0, cut=0, vocab=True)
    for layer in range(arch.layers):
        for row in _layer(arch, sparse=bool(arch.experts and arch.experts.layers[layer])):
            here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            names = tuple(here + name for name in row.megatron)
            hf = {there + name: shape for name, shape in row.hf.items()}
            yield replace(row, megatron=names, hf=hf, layer=layer)
    final = ("decoder.final_layernorm.weight",)
    yield replace(_norm(arch, final, "model.norm.weight"), layer=last)
    if not arch.tied:
        yield Weight(head, {"lm_head.weight": table}, last, cut=0, vocab=True)


def _norm(
    arch: Architecture, megatron: tuple[str, ...], hf: str, size: int | None = None
) -> Weight:
    start = 0.0 if arch.zero_centered else 1.0
    return Weight(megatron, {hf: (size or arch.hidden,)}, start=start)


def _layer(arch: Architecture, *, sparse: bool) -> Iterator[Weight]:
    # Transformer Engine fuses each norm with the projection after it; the portable spec does not
    before = ("input_layernorm.weight",)
    if arch.latent is None:
        before += ("self_attention.linear_qkv.layer_norm_weight",)
    yield _norm(arch, before, "input_layernorm.weight")
    yield from _attention(arch) if arch.latent is None else _latent_attention(arch)
    between = ("pre_mlp_layernorm.weight",)
    if not sparse:
        between += ("mlp.linear_fc1.layer_norm_weight",)
    yield _norm(arch, between, "post_attention_layernorm.weight")
    if sparse and arch.experts:
        yield from _mixture(arch, arch.experts)
    else:
        yield from _mlp(arch, "mlp.", "mlp.", arch.ffn)


def _attention(arch: Architecture) -> Iterator[Weight]:
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

    def qkv(kind: str, *width: int, **how: Any) -> Weight:
        rows = {"q": q, "k": kv, "v": kv}
        hf = {f"self_attn.{x}_proj.{kind}": (n, *width) for x, n in rows.items()}
        name = f"self_attention.linear_qkv.{kind}"
        return Weight((name,), hf, cut=0, groups=arch.kv_heads, **how)

    yield qkv("weight", arch.hidden)
    if arch.qkv_bias:
        yield qkv("bias", start=0.0)
    if arch.qk_norm:
        for x in "qk":
            names = (f"self_attention.{x}_layernorm.weight",)
            yield _norm(arch, names, f"self_attn.{x}_norm.weight", arch.head_dim)
    yield _projection("linear_proj", "o_proj", (arch.hidden, q), cut=1)


def _latent_attention(arch: Architecture) -> Iterator[Weight]:
    latent = arch.latent
    assert latent is not None
    q = arch.heads * arch.head_dim
    if latent.q_rank is None:
        yield _projection("linear_q_proj", "q_proj", (q, arch.hidden), cut=0)
    else:
        yield _projection("linear_q_down_proj", "q_a_proj", (latent.q_rank, arch.hidden))
        yield _latent_norm(arch, "q", "q_a_layernorm", latent.q_rank)
        yield _projection("linear_q_up_proj", "q_b_proj", (q, latent.q_rank), cut=0)
    down = (latent.kv_rank + latent.rotated, arch.hidden)
    yield _projection("linear_kv_down_proj", "kv_a_proj_with_mqa", down)
    yield _latent_norm(arch, "kv", "kv_a_layernorm", latent.kv_rank)
    up = (arch.heads * (latent.plain + latent.value), latent.kv_rank)
    yield _projection("linear_kv_up_proj", "kv_b_proj", up, cut=0)
    yield _projection("linear_proj", "o_proj", (arch.hidden, arch.heads * latent.value), cut=1)


def _latent_norm(arch: Architecture, x: str, hf: str, size: int) -> Weight:
    portable = f"self_attention.{x}_layernorm.weight"
    fused = f"self_attention.linear_{x}_up_proj.layer_norm_weight"
    return _norm(arch, (portable, fused), f"self_attn.{hf}.weight", size)


def _projection(megatron: str, hf: str, shape: Shape, cut: int | None = None) -> Weight:
    names = (f"self_attention.{megatron}.weight",)
    return Weight(names, {f"self_attn.{hf}.weight": shape}, cut=cut)


def _mlp(arch: Architecture, here: str, there: str, ffn: int) -> Iterator[Weight]:
    gate_up = {f"{there}{x}_proj.weight": (ffn, arch.hidden) for x in ("gate", "up")}
    yield Weight((f"{here}linear_fc1.weight",), gate_up, cut=0)
    down = {f"{there}down_proj.weight": (arch.hidden, ffn)}
    yield Weight((f"{here}linear_fc2.weight",), down, cut=1)


def _mixture(arch: Architecture, experts: Experts) -> Iterator[Weight]:
    names, hidden = experts.names, arch.hidden
    router = {f"{names.block}.gate.weight": (experts.count, hidden)}
    yield Weight(("mlp.router.weight",), router)
    if experts.sigmoid:
        bias = {f"{names.block}.gate.e_score_correction_bias": (experts.count,)}
        yield Weight((_CORRECTION,), bias, start=0.0, fp32=True)
    for expert in range(experts.count):
        there = f"{names.block}.experts.{expert}."
        wide = (experts.ffn, hidden)
        gate_up = {f"{there}{names.gate}.weight": wide, f"{there}{names.up}.weight": wide}
        yield Weight(_expert_names("linear_fc1", expert), gate_up, cut=0, expert=expert)
        down = {f"{there}{names.down}.weight": (hidden, experts.ffn)}
        yield Weight(_expert_names("linear_fc2", expert), down, cut=1, expert=expert)
    if experts.shared_ffn:
        there = f"{names.block}.{names.shared}"
        yield from _mlp(arch, "mlp.shared_experts.", f"{there}.", experts.shared_ffn)
        if experts.shared_gate:
            yield Weight(("mlp.shared_experts.gate_weight",), {f"{there}_gate.weight": (1, hidden)})


def _expert_names(projection: str, expert: int) -> tuple[str, str]:
    """Return what one by one and what Transformer Engine's grouped experts call it."""
    one_by_one = f"mlp.experts.local_experts.{expert}.{projection}.weight"
    return one_by_one, f"mlp.experts.{projection}.weight{expert}"
