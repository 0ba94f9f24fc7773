"""One call from a Hugging Face configuration to this rank's part of a Megatron model."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd import platform
from megatron_opd.model import config as hf_config
from megatron_opd.model.config import Architecture, HFConfig
from megatron_opd.model.gpt import HiddenGPT, Stage
from megatron_opd.model.spec import block_spec
from megatron_opd.model.transformer import transformer_config
from megatron_opd.model.weights import init_random
from megatron_opd.parallel import Parallel

log = logging.getLogger("megatron_opd")


def build_model(
    hf: HFConfig,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    padded_vocab: int | None = None,
    megatron: Mapping[str, Any] | None = None,
    trainable: bool = True,
    seed: int | None = 0,
) -> Stage:
    """Build this rank's part of the model on its device.

    Args:
        padded_vocab: rows of the vocabulary tables over all ranks; default: the checkpoint's rows
            rounded up to a multiple of 128 × tp.
        megatron: fields of `TransformerConfig` to set; see `check_overrides`.
        trainable: False freezes every parameter and switches to evaluation mode.
        seed: of the random weights, the same at every layout; None leaves them unset (`load_hf`
            sets all of them, and a large model takes a while to draw).
    Raises:
        ValueError: the configuration is not supported, or does not divide over the ranks.
    """
    arch = hf_config.architecture(hf)
    hf_config.check_layout(
        hf,
        parallel.tp,
        parallel.pp,
        vpp=parallel.vpp,
        ep=parallel.ep,
        etp=parallel.etp,
        sequence_parallel=parallel.sequence_parallel or not trainable,
    )
    config = transformer_config(
        arch,
        megatron or {},
        dtype=dtype,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        ep=parallel.ep if arch.experts else 1,
        etp=parallel.etp if arch.experts else None,
        sequence_parallel=parallel.sequence_parallel,
    )
    if (
        parallel.is_main
        and platform.has_transformer_engine()
        and config.transformer_impl == "local"
    ):
        log.warning(
            "model: Transformer Engine attends in 16-bit types and heads of a multiple of 8, got "
            "%s and %d; the slower portable layers take its place",
            dtype,
            arch.head_dim,
        )
    rows = padded_vocab or hf_config.padded_vocab(arch.vocab_rows, parallel.tp)
    model = Stage([_chunk(arch, config, parallel, chunk, rows) for chunk in range(parallel.vpp)])
    if arch.experts and parallel.ep > 1 and parallel.etp > 1:
        _refuse_on_gloo(parallel)
    if parallel.etp != parallel.tp:
        _reduce_as_experts(model)
    model.to(parallel.device)
    if seed is not None:
        init_random(model, seed=seed)
    return model if trainable else model.requires_grad_(False).eval()


def _chunk(
    arch: Architecture, config: TransformerConfig, parallel: Parallel, chunk: int, rows: int
) -> HiddenGPT:
    """Build one of the runs of layers that this rank holds."""
    virtual = chunk if parallel.vpp > 1 else None
    model = HiddenGPT(
        config=config,
        transformer_layer_spec=block_spec(config, virtual),
        vocab_size=rows,
        max_sequence_length=arch.max_positions,
        pre_process=parallel.is_first_stage and chunk == 0,
        post_process=parallel.is_last_stage and chunk == parallel.vpp - 1,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        vp_stage=virtual,
    )
    model.architecture = arch
    if arch.scaled_embeddings and model.pre_process:
        model.embedding.register_forward_hook(_scaled)
    if arch.latent is None:  # else every layer has its own
        # a plain attribute, so no cast of the module reaches it: it stays fp32
        model.rotary_pos_emb.inv_freq = arch.inv_freq().to(parallel.device)
    return model


def _scaled(embedding: Any, given: Any, embedded: Tensor) -> Tensor:
    """Multiply by √hidden, rounded to the dtype as transformers does."""
    return embedded * torch.tensor(embedded.size(-1) ** 0.5, dtype=embedded.dtype)


def _refuse_on_gloo(parallel: Parallel) -> None:
    """Refuse what gloo does on CPUs alone, where `platform` gathers in its place."""
    if dist.get_backend(parallel.etp_group) == "gloo" and parallel.device.type != "cpu":
        raise ValueError(
            f"parallel: ep={parallel.ep} with etp={parallel.etp} needs NCCL: gloo does not gather "
            "unlike numbers of tokens; set parallel.etp to 1"
        )


def _reduce_as_experts(model: Stage) -> None:
    """Let the gradients of experts be summed over the ranks that have the same ones.

    Megatron marks them so with ep > 1 alone; with etp < tp those are not the data-parallel ranks
    either.
    """
    parameter: Any
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
