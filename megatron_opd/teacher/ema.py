"""A teacher that follows the student slowly: the running mean of its weights."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_opd.parallel import Parallel
from megatron_opd.teacher.megatron import MegatronTeacher, copy_weights


class EmaTeacher(MegatronTeacher):
    """Judge with θ_T, which starts as the student's weights θ_S and after each of its updates is

        θ_T ← (1 − rate) · θ_T + rate · θ_S

    on every rank's own shards, in fp32 (`masters`, in the order of the parameters): in bf16 a step
    of rate · lr would be rounded away. The forward reads them in the type of `model`; with
    `offload`, they stay in host memory too. θ_S is what the student computes with.
    """

    def __init__(self, model: Any, student: Any, parallel: Parallel, *, rate: float, **how: Any):
        copy_weights(student, model)
        self.student, self.rate = student, rate
        super().__init__(model, parallel, **how)
        self.resting = [self._resting(p) for p in model.parameters()]
        self.masters = [tensor.float() for tensor in self.resting]  # itself, where it is float32

    def _resting(self, parameter: Tensor) -> Tensor:
        """Return where a parameter's values live between uses."""
        if self.away:
            for tensor, host in zip(self.away.tensors, self.away.host, strict=True):
                if tensor is parameter:
                    return host
        return parameter.detach()

    @torch.no_grad()
    def follow(self) -> float:
        """Take one step towards the student; return ‖θ_T − θ_S‖ / ‖θ_S‖ after it; collective."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        for master, theirs in zip(self.masters, self.student.parameters(), strict=True):
            target = theirs.float()
            mean = master.to(target.device).lerp_(target, self.rate)
            master.copy_(mean)  # itself, unless it lives in host memory
            if _is_counted(theirs):
                both = torch.stack([(mean - target).square().sum(), target.square().sum()])
                squares += both / _copies(theirs, self.parallel)
        self._publish()
        dist.all_reduce(squares)
        apart, whole = squares.tolist()
        return (apart / whole) ** 0.5

    @torch.no_grad()
    def restore(self, masters: list[Tensor]) -> None:
        """Go on from what a checkpoint kept of `masters`."""
        for mine, kept in zip(self.masters, masters, strict=True):
            mine.copy_(kept)
        self._publish()

    def _publish(self) -> None:
        """Let the forward read the masters, rounded to its type."""
        for resting, master in zip(self.resting, self.masters, strict=True):
            if resting is not master:
                resting.copy_(master)


def _copies(parameter: Tensor, parallel: Parallel) -> int:
    """Return how many ranks count the same numbers: an expert's lie otherwise than the others'."""
    p = parallel
    spread = not getattr(parameter, "allreduce", True)  # Megatron's mark of such experts
    return p.tp * p.cp * p.dp // (p.ep * p.etp) if spread else p.cp * p.dp


def _is_counted(parameter: Tensor) -> bool:
    """Say whether no other rank of its copy of the model counts the same parameter."""
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
