"""What Megatron-Core needs to run without a GPU, and which device and backend a rank has.

Megatron-Core's local path is written for CUDA but needs little of it. `activate()` substitutes just
that little when no GPU is present, so that the same program runs on gloo and on NCCL. Two kinds of
substitution only: `torch.cuda` functions that raise on a CPU build, and a `TorchFunctionMode`
(torch's own extension point) for the literal `device="cuda"`. Nothing in Megatron-Core is edited,
and with CUDA present nothing is substituted. Line numbers in comments: megatron-core 0.16.1.
"""

import importlib.util
import logging
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_mode: "_CudaLiterals | None" = None
_CUDA, _TYPE = torch.Tensor.cuda, torch.Tensor.type


def device() -> torch.device:
    """Return the device of this rank: its GPU, or the CPU when there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def backend() -> str:
    """Return the process-group backend: NCCL when every local rank has a GPU of its own."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    return "nccl" if 0 < local_ranks <= torch.cuda.device_count() else "gloo"


def has_transformer_engine() -> bool:
    """Say whether Transformer Engine can run here: installed, and a GPU to run it on."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    return torch.cuda.is_available() and installed


class _CudaLiterals(TorchFunctionMode):
    """Rewrite Megatron-Core's literal CUDA devices and types for a machine without one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is _CUDA:  # language_module.py:244, rope_utils.py:62
            return args[0]
        if func is _TYPE and len(args) == 1 and not kwargs:
            name = func(*args)  # clip_grads.py:167, optimizer.py:671, distrib_optimizer.py:361
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer"):
                name = name.replace("torch.", "torch.cuda.", 1)
            return name
        if kwargs:  # schedules.py:596,983,2138, clip_grads.py:103,115,174, optimizer.py:481,485
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):  # rope_utils.py:62
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        return func(*args)


class _Stream:
    """Stand in for `torch.cuda.Stream` and `Event` where every operation is already ordered."""

    def __init__(self, *args, **kwargs):
        self.at = 0.0

    def record(self, *args):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


def quiet_imports() -> None:
    """Hide the warnings about what is absent by design; nothing else is hidden."""
    for message in (
        r"(Transformer Engine and Apex are not|Apex is not|absl\.logging is not) installed",
        # torch 2.13 on Megatron-Core's own calls
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        # torch 2.13 on every load of a distributed checkpoint
        r"`load_state_dict` is deprecated and will be removed",
        r"Please use DTensor instead and we are deprecating ShardedTensor",
        # said of selective recomputation, which is asked for by name here
        r"If you are using transformer_engine as the transformer implementation",
        # buffers that are emptied and made again in _ParamAndGradBuffer
        r"TypedStorage is deprecated",
        # fp32 shards in DistributedOptimizer
        r"The \.grad attribute of a Tensor that is not a leaf",
        # experts that are not cut, between layers that are
        r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
        r"When using (sequence parallelism|async grad allreduce) it is recommended to set .* CUDA_",
    ):
        warnings.filterwarnings("ignore", message=message)


def _substitute_cuda() -> None:
    """Replace the `torch.cuda` functions that Megatron-Core calls and a CPU build refuses."""
    cuda: Any = torch.cuda
    cpu, stream = torch.device("cpu"), _Stream()
    cuda.current_device = lambda: cpu  # param_and_grad_buffer.py:800, mappings.py:91, ...
    cuda.synchronize = lambda device=None: None  # p2p_communication.py:242, filesystem_async.py
    cuda.manual_seed = torch.manual_seed  # tensor_parallel/random.py:237,422
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda device=None: stream  # token_dispatcher.py:871


def _gather(own: Tensor, group: Any, sizes: list[int]) -> Tensor:
    """Return all ranks' rows, one rank's after another's; each has as many as `sizes` says."""
    count = len(sizes)
    gathered = own.new_empty(sum(sizes), *own.shape[1:])
    mine = torch.cat([own] * count)
    dist.all_to_all_single(gathered, mine, sizes, [len(own)] * count, group=group)
    return gathered


def _reduce_scatter(parts: Tensor, group: Any, sizes: list[int]) -> Tensor:
    """Return the sum of what all ranks have for this one, `sizes[r]` rows for rank r."""
    own, count = sizes[group.rank()], len(sizes)
    received = parts.new_empty(count * own, *parts.shape[1:])
    dist.all_to_all_single(received, parts.contiguous(), [own] * count, sizes, group=group)
    return received.unflatten(0, (count, own)).sum(0)


def _substitute_uneven(name: str, ours: Callable[[Tensor, Any, list[int]], Tensor]) -> None:
    """Replace a collective of tensor parallelism where ranks have other numbers of rows.

    Experts that are cut over ranks want it, and gloo's own is for equal ones: mappings.py:150,193.
    """
    from megatron.core.tensor_parallel import mappings

    theirs = getattr(mappings, name)

    def either(tensor, group, sizes=None, use_global_buffer=False):
        if sizes is None:
            return theirs(tensor, group, None, use_global_buffer)
        return ours(tensor, group, sizes)

    setattr(mappings, name, either)


def _substitute_megatron() -> None:
    """Replace the few Megatron-Core helpers that assume a CUDA tensor."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # queued on torch's lazy CUDA init and so never run: random.py:240,255,277,457
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # "CPU RNG state changed within GPU RNG context"
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    # all-to-all split sizes become numpy only for tensor.is_cuda: moe_utils.py:1093
    token_dispatcher.maybe_move_tensor_to_cpu = lambda t, as_numpy=False, record_stream=False: (
        t.numpy() if as_numpy and torch.is_tensor(t) else t
    )
    if not hasattr(moe_utils, "te_general_gemm"):  # NameError without TE: moe_utils.py:1192
        moe_utils.te_general_gemm = None
    _substitute_uneven("_gather_along_first_dim", _gather)
    _substitute_uneven("_reduce_scatter_along_first_dim", _reduce_scatter)


@contextmanager
def suspended() -> Iterator[None]:
    """Run code that is not Megatron's without the function mode, which every call passes through.

    The substituted functions stay: they do what a CPU build can do.
    """
    if _mode is None:
        yield
        return
    _mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _mode.__enter__()


def activate() -> None:
    """Make Megatron-Core importable, quiet and runnable here. Idempotent; call before importing it.

    The function mode is thread-local: Megatron code runs on the thread that called this.
    """
    global _mode
    quiet_imports()
    if _mode is not None or torch.cuda.is_available():
        return
    if importlib.util.find_spec("triton") is None:
        # 0.19.2 imports triton unconditionally: transformer/moe/ops/paged_stash.py:4
        absent = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        for name in ("GLOBAL_BLOCK_SIZE", "paged_stash_copy_kernel", "paged_stash_pop_kernel"):
            setattr(absent, name, None)
        sys.modules.setdefault(absent.__name__, absent)
    _substitute_cuda()
    _substitute_megatron()
    _mode = _CudaLiterals()
    _mode.__enter__()
