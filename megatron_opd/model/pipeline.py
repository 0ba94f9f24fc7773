"""Drive a model through Megatron's pipeline schedule, for training and for scoring alike."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd.model.gpt import forward
from megatron_opd.types import Microbatch


def run_schedule(
    chunks: Iterable[Any],
    microbatches: Sequence[Microbatch],
    last_stage: Callable[[int, Tensor], Any],
    *,
    forward_only: bool,
) -> list:
    """Drive the chunks of a model over `microbatches` through Megatron's pipeline schedule.

    `chunks` are a `Stage`, or Megatron's DistributedDataParallel around each of its chunks.
    `last_stage(i, hidden)` receives the final hidden states of microbatch i on the last stage:
    it returns (loss sum, token count, log) when training and anything when `forward_only`.
    Returns what it returned (its log when training), one per microbatch; [] on earlier stages.

    Collective over the ranks that share weights of the model; any number of microbatches will do,
    another one on every replica, or none. Where the schedule needs more, empty ones follow.
    """
    models = list(chunks)
    config, device = models[0].config, next(models[0].parameters()).device
    count = _count(len(microbatches), config, device, training=not forward_only)
    if not count:
        return []
    run = [*microbatches, *[_empty(config, device)] * (count - len(microbatches))]

    def forward_step(indices, model):
        index = next(indices)
        real = index < len(microbatches)
        if count == len(microbatches):
            hidden = forward(model, run[index])
        else:
            hidden = _forward_beside_empty(model, run[index], counts=real)
        if real:
            return hidden, lambda hidden, **_: last_stage(index, hidden)
        return hidden, lambda hidden, **_: None if forward_only else _nothing(hidden)

    told = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(count)) for _ in models],
        model=models,
        num_microbatches=count,
        seq_length=1,  # not used: variable_seq_lengths exchanges shapes
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **_messages(config, run),
    )
    return told[: len(microbatches)]


def _count(own: int, config: TransformerConfig, device: torch.device, *, training: bool) -> int:
    """Return how many microbatches the schedule runs.

    Every replica must have one whose backward hands the gradients on. Replicas that share experts
    meet in every layer. Virtual stages take turns in groups of pp microbatches.
    """
    count = max(own, 1) if training else own
    ep, tp = config.expert_model_parallel_size, config.tensor_model_parallel_size
    if config.num_moe_experts and (ep > 1 or (config.expert_tensor_parallel_size or tp) > tp):
        most = torch.tensor(count, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        count = int(most)
    if config.virtual_pipeline_model_parallel_size:
        count += -count % config.pipeline_model_parallel_size
    return count


def _empty(config: TransformerConfig, device: torch.device) -> Microbatch:
    """Return a microbatch of as few tokens as a forward takes, nothing supervised."""
    own = 2 * config.tensor_model_parallel_size  # on each context-parallel rank
    whole = own * config.context_parallel_size
    tokens, none = torch.zeros(own, dtype=torch.long, device=device), torch.zeros(0, device=device)
    return Microbatch(
        token_T=tokens,
        position_T=tokens,
        cu_seqlens=torch.tensor([0, whole], dtype=torch.int32, device=device),
        max_seqlen=whole,
        source_N=none.long(),
        target_N=none.long(),
        mask_N=none,
        rollout_logp_N=none,
        position_N=none.long(),
        sequence_N=none.long(),
        measured_M=none.long().cpu(),
    )


def _forward_beside_empty(model: Any, microbatch: Microbatch, *, counts: bool) -> Tensor:
    """Run a microbatch of a schedule where some are empty: their tokens are not for routers to
    balance, neither now nor where activations are computed again in the backward."""
    routers = [m for m in model.modules() if isinstance(m, TopKRouter) and model.training]

    def switch(*_: Tensor) -> None:
        for router in routers:
            router.train(counts)  # only then do they have losses of their own

    switch()
    hidden = forward(model, microbatch)
    if hidden.requires_grad:
        hidden.register_hook(switch)
    return hidden


def _nothing(hidden: Tensor) -> tuple[Tensor, Tensor, None]:
    """Return a loss of 0 over no tokens, through whose backward zeros go."""
    return hidden.sum() * 0, torch.zeros((), dtype=torch.int, device=hidden.device), None


class _KnownShapes(P2PCommunicator):
    """Messages between stages, whose shapes all of them know: `lengths` of each microbatch.

    Megatron would send the shapes ahead. With virtual stages, messages of both directions then wait
    for each other; between two stages, each of which is the other's next and previous one, those of
    one direction are taken for those of the other.
    """

    def __init__(self, pp_group: Any, config: TransformerConfig, lengths: Sequence[int]):
        super().__init__(pp_group, config)
        self._width = 1, config.hidden_size
        chunks = config.virtual_pipeline_model_parallel_size or 1
        at_once = config.microbatch_group_size_per_vp_stage
        order = get_schedule_table(len(lengths), chunks, at_once)
        first, last = self.pp_group.rank() == 0, self.pp_group.rank() == self.pp_group.size() - 1
        # backwards, chunks come from the last to the first
        self._from_prev = iter([lengths[i] for i, chunk in order if chunk or not first])
        self._from_next = iter([lengths[i] for i, chunk in order if chunk or not last])

    def _communicate_shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
        """Return the shapes of what comes from the previous stage, and from the next."""
        hidden = self._width
        prev = (next(self._from_prev), *hidden) if recv_prev else (0, *hidden)
        return prev, (next(self._from_next), *hidden) if recv_next else (0, *hidden)


def _messages(config: TransformerConfig, microbatches: Sequence[Microbatch]) -> dict[str, Any]:
    """Return what Megatron's schedule asks for, where there are several stages."""
    if config.pipeline_model_parallel_size == 1:
        return {}
    tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
    lengths = [batch.token_T.numel() // tp for batch in microbatches]
    groups = ProcessGroupCollection.use_mpu_process_groups(
        ["tp", "cp", "pp", "embd", "pos_embd", "dp_cp"]
    )
    shapes = _KnownShapes(groups.pp, config, lengths)
    return {"p2p_communicator": shapes, "pg_collection": groups}
