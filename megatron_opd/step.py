"""One optimiser update: microbatch schedule, global token normaliser, clip, scheduler.

Gradients are sums until the very end, where Megatron divides them once by the number of supervised
tokens, or sequences, of the whole step (`calculate_per_token_loss`): a token weighs the same
wherever it was packed and whichever replica holds it.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_opd import config as cfg
from megatron_opd.loss import Objective, Total
from megatron_opd.metrics import Metrics
from megatron_opd.model import Stage, enter_head
from megatron_opd.model.pipeline import run_schedule
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
        return replace(head, gradient_VH=head.weight_VH.main_grad)


def make_student(
    model: Stage, parallel: Parallel, optimizer: cfg.Optimizer, *, steps: int, vocab_size: int
) -> Student:
    """Give `model` gradient buffers in fp32, AdamW on fp32 main parameters, and a schedule."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optimizer.distributed,
    )
    ddp = [DistributedDataParallel(model.config, ddp_config, chunk) for chunk in model.chunks]
    adamw = get_megatron_optimizer(_optimizer_config(optimizer, model.config.params_dtype), ddp)
    assert float(adamw.get_loss_scale()) == 1.0, "the head's gradient would be without it"
    model.config.grad_scale_func = adamw.scale_loss
    no_sync = [chunk.no_sync for chunk in ddp]
    model.config.no_sync_func = no_sync if len(ddp) > 1 else no_sync[0]
    return Student(
        model=model,
        ddp=ddp,
        optimizer=adamw,
        scheduler=_scheduler(adamw, optimizer, steps),
        parallel=parallel,
        vocab_size=vocab_size,
        away=UpdateMemory(ddp, adamw, parallel.device) if optimizer.offload else None,
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
        finalize_model_grads(chunks, count, **how)
        counts.append(count)  # by now the sum over all ranks

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


def _stand_still(student: Student) -> None:
    """Keep the weights where they are: without a gradient, momentum and decay would move them."""
    if student.parallel.is_main:
        log.warning("no token of this step is supervised: nothing is learned from it")
    for group in student.optimizer.param_groups:
        group["lr"] = 0.0  # until the scheduler's next step
