"""Drive a model through Megatron's pipeline schedule, for training and for scoring alike."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
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
    """

    models = list(chunks)

    def forward_step(indices, model):
        index = next(indices)

        def finish(hidden: Tensor, non_loss_data: bool = False):
            return last_stage(index, hidden)

        return forward(model, microbatches[index]), finish

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(len(microbatches))) for _ in models],
        model=models,
        num_microbatches=len(microbatches),
        seq_length=1,  # not used: variable_seq_lengths exchanges shapes
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
