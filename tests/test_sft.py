"""Supervised training is what it is elsewhere: loss and gradient of `transformers` on one batch."""

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, load_hf
from megatron_opd.packing import needed_microbatches, pack
from megatron_opd.step import Judgement, make_student, train_step
from tests.distributed import run_ranks
from tests.hf import hf_model, write_checkpoint
from tests.tiny import make_rollouts

SHAPES = [(3, 5), (7, 2), (4, 9), (2, 1), (6, 6), (5, 12)]
SFT = Objective("sampled", "cross_entropy", rollout_temperature=None)


def theirs(family):
    """Return their loss of a padded batch, −100 where nothing counts, and the gradient's norm."""
    model, rollouts = hf_model(family), make_rollouts(SHAPES)
    width = max(map(sum, SHAPES))
    rows, labels, mask = (torch.full((len(SHAPES), width), x) for x in (0, -100, 0))
    for i, r in enumerate(rollouts):
        prompt, ids = len(r.prompt.token_ids), [*r.prompt.token_ids, *r.response_ids]
        rows[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
        labels[i, prompt : len(ids)] = torch.tensor(r.response_ids)
    loss = model(input_ids=rows, labels=labels, attention_mask=mask).loss
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()


def ours(rank, folder, layout):
    """Return the same of one step, packed into microbatches and shared out over replicas."""
    parallel = mesh.initialize(*layout)
    model = build_model(str(folder), parallel, dtype=torch.float32, seed=None)
    load_hf(model, str(folder), parallel, vocab_size=203)
    student = make_student(model, parallel, cfg.Optimizer(clip_norm=0), steps=9, vocab_size=203)
    mine = make_rollouts(SHAPES)[parallel.dp_rank :: parallel.dp]
    count = max(parallel.agree(lambda: needed_microbatches(mine, 20)))
    batches = pack(mine, microbatch_tokens=20, count=count)
    metrics = train_step(student, batches, [Judgement()] * count, SFT)
    record = metrics.reduce(None, parallel.device)
    return record["loss/objective"], record["optim/grad_norm"]


@pytest.mark.parametrize(
    ("family", "layout", "world"),
    [("qwen3", (1, 1), 1), ("qwen3_tied", (2, 1), 4), ("qwen3", (1, 2), 2)],
)
def test_supervised_training_is_that_of_transformers(tmp_path, family, layout, world):
    folder = write_checkpoint(tmp_path / "model", family)
    want = theirs(family)
    for got in run_ranks(ours, world, folder, layout):
        assert got == pytest.approx(want, rel=2e-6)
