"""An instrument that sees every collective of a process: what is called, among whom, how large."""

from collections import defaultdict

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opd.parallel import Parallel

# operator → kind, and which of its arguments has the size that `Flow` speaks of
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "gather_": ("gather", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "barrier": ("barrier", 0),
}


class Seen(TorchDispatchMode):
    """Adds up (axis, kind) → [bytes, calls] of groups with more than one rank."""

    def __init__(self, parallel: Parallel):
        super().__init__()
        groups = {
            "embedding": mpu.get_embedding_group(check_initialized=False),
            "tp": parallel.tp_group,
            "pp": parallel.pp_group,
            "cp": parallel.cp_group,
            "ep": parallel.ep_group,
            "etp": parallel.etp_group,
            "tp_ep": mpu.get_expert_tensor_and_model_parallel_group(),
            "dp": parallel.dp_group,
            "stage": mpu.get_tensor_and_data_parallel_group(with_context_parallel=True),
            "dp_cp": mpu.get_data_parallel_group(with_context_parallel=True),
            "expert_dp": mpu.get_expert_data_parallel_group(),
            "model": mpu.get_model_parallel_group(),
        }
        self.names = {g.group_name: axis for axis, g in groups.items() if _is_group(g)}
        self.flows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._note(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: tuple) -> None:
        kind, which = KINDS[operator]  # an unknown one must not go unseen
        group = next(_groups(args))
        if kind not in ("recv", "barrier") and group.size() > 1:
            axis = self.names.get(group.group_name, "world")
            if kind == "send":  # between stages, through whatever group
                axis = "pp"
            flow = self.flows[axis, kind]
            flow[0] += sum(t.numel() * t.element_size() for t in _tensors(args[which]))
            flow[1] += 1


def _is_group(group) -> bool:
    return isinstance(group, dist.ProcessGroup)


def _groups(args: tuple):
    return (dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))


def _tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for y in x:
            yield from _tensors(y)
