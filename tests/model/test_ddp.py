"""The `ddp:` section: what is passed on, and one line about what is not."""

import pytest

from megatron_opd.model.ddp import ddp_config


def test_what_is_passed_on():
    plain = ddp_config({}, distributed=True)
    assert plain.grad_reduce_in_fp32 and plain.use_distributed_optimizer
    assert not plain.overlap_grad_reduce
    told = {"overlap_grad_reduce": True, "bucket_size": 1000}
    config = ddp_config(told, distributed=False)
    assert config.overlap_grad_reduce and config.bucket_size == 1000
    assert not config.use_distributed_optimizer


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (
            {"overlap_grad_reduc": True},
            "ddp.overlap_grad_reduc: not a field of .*; did you mean 'overlap_grad_reduce'",
        ),
        ({"overlap_param_gather": True}, "the rollout engine reads the weights as soon as they"),
        ({"use_distributed_optimizer": True}, "set optimizer.distributed; remove it"),
        ({"use_megatron_fsdp": True}, "not passed on; expected one of overlap_grad_reduce, bucket"),
        ({"overlap_grad_reduce": 1}, "ddp.overlap_grad_reduce: got 1, expected true or false"),
        ({"bucket_size": 0, "overlap_grad_reduce": True}, "got 0, expected a positive number"),
        ({"bucket_size": 9}, "ddp.bucket_size=9: without ddp.overlap_grad_reduce=true all"),
        ({"pad_buckets_for_high_nccl_busbw": True}, "no effect with optimizer.distributed=false"),
    ],
)
def test_what_is_refused_is_one_line(told, line):
    with pytest.raises(ValueError, match=line) as raised:
        ddp_config(told, distributed=False)
    assert "\n" not in str(raised.value)
