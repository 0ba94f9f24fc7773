"""One optimiser update: microbatch schedule, global token normaliser, clip, scheduler.

Gradients are sums until the very end, where Megatron divides them once by the number of supervised
tokens, or sequences, of the whole step (`calculate_per_token_loss`): a token weighs the same
wherever it was packed and whichever replica holds it.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_opd import config as cfg
from megatron_opd.loss import Objective, Total
from megatron_opd.metrics import Metrics
from megatron_opd.model import Stage, enter_head
from megatron_opd.model.ddp import ddp_config
from megatron_opd.model.pipeline import run_schedule
from megatron_opd.model.router import set_auxiliary_weight
from megatron_opd.offload import UpdateMemory
from megatron_opd.parallel import Parallel
from megatron_opd.types import Head, Microbatch, Scores

log = logging.getLogger("megatron_opd")
OF_EACH_TEACHER = (  # what is also known of each of several, as name@teacher
    "loss/objective",
    "distill/reverse_kl",
    "distill/support_kl",
    "distill/overlap_ratio",
    "student/nll",
    "teacher/nll",
    "teacher/entropy",
)


class Judgement(NamedTuple):
    """What the frozen models say of one microbatch (last pipeline stage; elsewhere None)."""

    teacher: Scores | None = None
    base: Scores | None = None


@dataclass(frozen=True)
class Student:
    """The trained model with what trains it: gradient buffers, optimiser and schedule."""

    model: Stage  # the bare model: generation, export
    ddp: Sequence[Any]  # its chunks with gradient buffers: training
    optimizer: Any
    scheduler: OptimizerParamScheduler
    parallel: Parallel
    vocab_size: int
    away: UpdateMemory | None = None  # where gradients and optimiser leave the device between steps

    def states(self) -> AbstractContextManager[None]:
        """Have the optimiser's tensors on the device, for whoever reads or replaces them."""
        return self.away.present() if self.away else nullcontext()

    def head(self) -> Head:
        """Return the output projection to train (last pipeline stage only).

        The loss adds the weight's gradient to Megatron's buffer at once, where the embedding's, if
        they are tied, is added in the backward.
        """
        head = self.model.head(self.vocab_size)
        weight: Any = head.weight_VH
        return replace(head, gradient_VH=weight.main_grad)

    def hand_over_head(self) -> None:
        """Say that the head's gradient is complete, to whom the others' hooks in autograd say it.

        With one stage and tied embeddings, the embedding's hook does.
        """
        if not self.ddp[-1].ddp_config.overlap_grad_reduce or not self.parallel.is_last_stage:
            return
        if self.parallel.pp > 1 or not self.model.architecture.tied:
            weight = self.model.head(self.vocab_size).weight_VH
            self.ddp[-1].param_to_bucket_group[weight].register_grad_ready(weight)


def make_student(
    model: Stage,
    parallel: Parallel,
    optimizer: cfg.Optimizer,
    *,
    steps: int,
    vocab_size: int,
    ddp: Mapping[str, Any] | None = None,
) -> Student:
    """Give `model` gradient buffers in fp32, AdamW on fp32 main parameters, and a schedule.

    `ddp` sets fields of `DistributedDataParallelConfig`: see `ddp_config`.
    """
    how = ddp_config(ddp or {}, distributed=optimizer.distributed)
    chunks: list[Any] = [
        DistributedDataParallel(model.config, how, chunk) for chunk in model.chunks
    ]
    adamw = get_megatron_optimizer(_optimizer_config(optimizer, model.config.params_dtype), chunks)
    assert float(adamw.get_loss_scale()) == 1.0, "the head's gradient would be without it"
    model.config.grad_scale_func = adamw.scale_loss
    no_sync: Any = [chunk.no_sync for chunk in chunks]
    model.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return Student(
        model=model,
        ddp=chunks,
        optimizer=adamw,
        scheduler=_scheduler(adamw, optimizer, steps),
        parallel=parallel,
        vocab_size=vocab_size,
        away=UpdateMemory(chunks, adamw, parallel.device) if optimizer.offload else None,
    )


def _optimizer_config(optimizer: cfg.Optimizer, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_norm or math.inf,  # 0 would not even measure the norm
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=optimizer.distributed,
    )


def _scheduler(adamw: Any, optimizer: cfg.Optimizer, steps: int) -> OptimizerParamScheduler:
    """Build the schedule. It is advanced *before* an update: the first one is not wasted on lr 0,
    and the decay ends one step after the last one, which is not wasted either."""
    return OptimizerParamScheduler(
        adamw,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=max(steps, optimizer.warmup_steps) + 1,
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def train_step(
    student: Student,
    microbatches: Sequence[Microbatch],
    judgements: Sequence[Judgement],
    objective: Objective | Total,
) -> Metrics:
    """Take one optimiser step on all microbatches of all replicas; return what it measured.

    Collective over every rank. `judgements[i]` is of `microbatches[i]`. A step without a single
    supervised token changes no weight, and warns.

    Raises:
        FloatingPointError: the gradient is not finite; on every rank.
    """
    model = student.model
    model.train()
    if student.away:
        student.away.make_gradients()
    for chunk in student.ddp:
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()
    metrics, counts = Metrics(), []

    def loss(index: int, hidden: Tensor):
        batch = microbatches[index]
        hidden_NH = enter_head(hidden, student.parallel).index_select(0, batch.source_N)
        judged = objective(hidden_NH, student.head(), batch, *judgements[index])
        metrics.add(judged.means, judged.maxima)
        if batch.teacher:
            own = [name for name in OF_EACH_TEACHER if name in judged.means]
            metrics.add({f"{name}@{batch.teacher}": judged.means[name] for name in own}, {})
        return judged.loss, judged.count, None

    def finalize(chunks: list, count: Tensor, **how):
        student.hand_over_head()
        finalize_model_grads(chunks, count, **how)
        counts.append(count)  # by now the sum over all ranks

    _weigh_routers(student, microbatches, objective)
    model.config.finalize_model_grads_func = finalize
    run_schedule(student.ddp, microbatches, loss, forward_only=False)
    student.scheduler.step(1)
    if not counts[0]:
        _stand_still(student)
    if student.away:
        student.away.fetch_states()
    _, grad_norm, _ = student.optimizer.step()
    if student.away:
        student.away.release()
    if not math.isfinite(grad_norm):  # the norm is global: every rank stops, and none waits
        raise FloatingPointError(
            f"the gradient norm is {grad_norm}: the weights in memory are lost; go on from the "
            "last checkpoint with run.resume=true, with a lower optimizer.lr perhaps"
        )
    metrics.set("optim/grad_norm", float(grad_norm))
    metrics.set("optim/lr", student.optimizer.param_groups[0]["lr"])
    return metrics


def _weigh_routers(
    student: Student, microbatches: Sequence[Microbatch], objective: Objective | Total
) -> None:
    """Let the routers' auxiliary losses, if any, be means over the tokens of the whole step."""
    config = student.model.config
    if not config.num_moe_experts or not (config.moe_aux_loss_coeff or config.moe_z_loss_coeff):
        return
    counted = sum(int(objective.count(batch)) for batch in microbatches)
    routed = sum(batch.token_T.numel() for batch in microbatches)
    both = torch.tensor([counted, routed], dtype=torch.float64, device=student.parallel.device)
    dist.all_reduce(both, group=mpu.get_data_parallel_group(with_context_parallel=True))
    set_auxiliary_weight(student.model, float(both[0] / both[1]))


def _stand_still(student: Student) -> None:
    """Keep the weights where they are: without a gradient, momentum and decay would move them."""
    if student.parallel.is_main:
        log.warning("no token of this step is supervised: nothing is learned from it")
    for group in student.optimizer.param_groups:
        group["lr"] = 0.0  # until the scheduler's next step
