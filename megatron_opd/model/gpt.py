"""Megatron's GPT, stopping at the final norm, and its packed forward.

The vocabulary projection belongs to whoever needs it (the loss, chunk by chunk; the sampler, for
one position), so no `[T, V]` logits ever leave a forward.

Shape suffixes: T packed tokens (T / tp under sequence parallelism) · H hidden · V vocabulary.
"""

from typing import Any, cast

from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor, nn

from megatron_opd.model.attention import packed
from megatron_opd.model.config import Architecture
from megatron_opd.parallel import Parallel
from megatron_opd.types import Head, Microbatch


class HiddenGPT(GPTModel):
    """Megatron's GPT returning hidden states `[L, B, H]`, final norm applied on the last stage."""

    architecture: Architecture

    def _set_attention_backend(self) -> None:
        """Set Transformer Engine's environment variables only for a backend that was asked for.

        They belong to the process: where the student has chosen one, Megatron's own `auto` of the
        teacher asserts that nobody did.
        """
        if self.config.attention_backend != AttnBackend.auto:
            super()._set_attention_backend()

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    def head(self, vocab_size: int) -> Head:
        """Return the output projection (last stage only); `vocab_size` is the tokenizer's."""
        tied = self.share_embeddings_and_output_weights
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight_VH is not None, "the head lives on the last pipeline stage"
        return Head(weight_VH, vocab_size, self.pg_collection.tp)


class Stage(nn.ModuleList):
    """This rank's chunks of a model: one, or with virtual pipeline stages several.

    They are runs of layers in the order of the network; the first chunk of the first stage has the
    embedding, the last chunk of the last stage the head.
    """

    def __init__(self, chunks: list[HiddenGPT]):
        super().__init__(chunks)
        self.config = chunks[0].config
        self.architecture = chunks[0].architecture
        self.vocab_size = chunks[0].vocab_size  # padded, over all ranks

    @property
    def chunks(self) -> list[HiddenGPT]:
        return cast(list[HiddenGPT], list(self))

    def head(self, vocab_size: int) -> Head:
        """Return the output projection (last stage only); `vocab_size` is the tokenizer's."""
        return self.chunks[-1].head(vocab_size)


def forward(model: Any, microbatch: Microbatch) -> Tensor:
    """Run one packed microbatch and return this stage's output, `[T, 1, H]`.

    `model` is a `HiddenGPT`, Megatron's DistributedDataParallel around one, or a `Stage` of one. A
    later pipeline stage reads the input that `set_input_tensor` was given.
    """
    if isinstance(model, Stage):
        (model,) = model.chunks
    config = model.config
    assert (
        not config.sequence_parallel
        or microbatch.token_T.numel() % config.tensor_model_parallel_size == 0
    ), "sequence parallelism needs a packed length divisible by tp"
    # The portable layers read the boundaries on the host, each of them: one copy here instead.
    on_host = config.transformer_impl == "local"
    bounds = microbatch.cu_seqlens.cpu() if on_host else microbatch.cu_seqlens
    packed_seq_params = packed(
        bounds, microbatch.max_seqlen, config.context_parallel_size, microbatch.token_T.device
    )
    return model(
        input_ids=microbatch.token_T[None],
        position_ids=microbatch.position_T[None],
        attention_mask=None,
        packed_seq_params=packed_seq_params,
    )


def enter_head(hidden_T1H: Tensor, parallel: Parallel) -> Tensor:
    """Return the last stage's hidden states as `[T, H]`, whole on every tensor-parallel rank.

    Each rank multiplies them with its own rows of the vocabulary, so what comes back is its part of
    the gradient: the backward sums it over TP (and scatters it under sequence parallelism).
    """
    if parallel.sequence_parallel:
        whole_T1H = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_T1H, tensor_parallel_output_grad=True
        )
    else:
        whole_T1H = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_T1H)
    return whole_T1H.squeeze(1)
