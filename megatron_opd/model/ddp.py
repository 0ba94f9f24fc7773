"""The user's `ddp:` section: which fields of Megatron's `DistributedDataParallelConfig` it sets."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig

_KINDS = {"overlap_grad_reduce": bool, "bucket_size": int, "pad_buckets_for_high_nccl_busbw": bool}
_REASONS = {  # for the fields that are asked for most
    "align_param_gather": "parameters are gathered in the update, whole before anybody reads them",
    "average_in_collective": "gradients are sums, divided once by the tokens of the step",
    "grad_reduce_in_fp32": "gradients are always added up in float32",
    "overlap_param_gather": "the rollout engine reads the weights as soon as they are updated",
    "use_distributed_optimizer": "set optimizer.distributed",
}


def ddp_config(ddp: Mapping[str, Any], *, distributed: bool) -> DistributedDataParallelConfig:
    """Return how gradients are added up over data-parallel ranks: in float32.

    Raises:
        ValueError: a field that is unknown, may not be set, or has no effect; a value of another
            type.
    """
    known = [field.name for field in dataclasses.fields(DistributedDataParallelConfig)]
    for key, value in ddp.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"ddp.{key}: not a field of DistributedDataParallelConfig{hint}")
        if key not in _KINDS:
            reason = _REASONS.get(key, f"not passed on; expected one of {', '.join(_KINDS)}")
            raise ValueError(f"ddp.{key}={value!r}: {reason}; remove it")
        if type(value) is not _KINDS[key] or (_KINDS[key] is int and value < 1):
            expected = "true or false" if _KINDS[key] is bool else "a positive number of parameters"
            raise ValueError(f"ddp.{key}: got {value!r}, expected {expected}")
    if ddp.get("bucket_size") and not ddp.get("overlap_grad_reduce"):
        raise ValueError(
            f"ddp.bucket_size={ddp['bucket_size']}: without ddp.overlap_grad_reduce=true all "
            "gradients are one bucket; set that, or remove it"
        )
    if ddp.get("pad_buckets_for_high_nccl_busbw") and not distributed:
        raise ValueError(
            "ddp.pad_buckets_for_high_nccl_busbw=True: has no effect with "
            "optimizer.distributed=false; remove it"
        )
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, **ddp
    )
