"""What both models say of every token, response by response, and teachers without a file."""

import numpy as np
import torch

from megatron_opd import parallel as mesh
from megatron_opd.model import enter_head, forward
from megatron_opd.packing import pack
from megatron_opd.probes.pair import Pair
from tests.distributed import run_ranks
from tests.probes.home import even, make_models, read

MICROBATCHES = "train.microbatch_tokens=90"  # of several responses each


def _told(rank, folder, overrides):
    """Return what a pair tells of 12 responses."""
    pair = Pair(read(folder, MICROBATCHES, *overrides), mesh.initialize())
    written = pair.write("student", pair.prompts, n=3)
    assert 1 < len(pair.bench.batches(written)) < len(written)
    return pair.look(written), [pair.tokenizer.decode(r.response_ids) for r in written]


def _one_by_one(rank, folder, rollouts):
    """Return log q(y) − log p(y) and KL(p‖q), response by response and over the vocabulary."""
    pair, found = Pair(read(folder), mesh.initialize()), []
    for rollout in rollouts:
        (batch,) = pack([rollout], microbatch_tokens=90)
        with torch.no_grad():
            s_NV, t_NV = (
                (
                    enter_head(forward(model, batch), pair.parallel)[batch.source_N].double()
                    @ model.head(pair.vocab_size).weight_VH[: pair.vocab_size].double().T
                ).log_softmax(-1)
                for model in (pair.models["student"], pair.models["teacher"])
            )
        reward_N = (t_NV - s_NV).gather(1, batch.target_N[:, None])[:, 0]
        found.append((reward_N.numpy(), (s_NV.exp() * (s_NV - t_NV)).sum(-1).numpy()))
    return [np.concatenate(column) for column in zip(*found, strict=True)]


def test_every_token_is_told_of_in_its_place(tmp_path):
    folder = make_models(tmp_path)
    ((told, texts),) = run_ranks(_told, 1, folder, ["objective.chunk_tokens=7"])
    ((reward_T, kl_T),) = run_ranks(_one_by_one, 1, folder, told.rollouts)
    assert len(told.rollouts) == 12 and told.length_R.sum() == len(reward_T) > 50
    assert np.abs(reward_T).max() > 1
    assert np.abs(told.reward_T - reward_T).max() < 1e-4
    assert np.abs(told.metric_T["distill/reverse_kl"] - kl_T).max() < 1e-4
    bare = [text.replace("<|im_end|>", "").replace("<|endoftext|>", "") for text in texts]
    bare = [text.replace("<|im_start|>", "") for text in bare]
    assert told.right_R.tolist() == [bool(even(text, None)) for text in bare]
    assert 0 < told.right_R.sum() < 12


def test_a_teacher_may_be_the_student_and_may_read_another_prompt(tmp_path):
    folder = make_models(tmp_path)
    (folder / "hint.txt").write_text("{question} It is {answer}.")
    own = "teacher={path: null, weights: student}"
    hint = f"teacher={{path: null, weights: student, template: {folder}/hint.txt}}"
    ((told, _),) = run_ranks(_told, 1, folder, [own])
    ((hinted, _),) = run_ranks(_told, 1, folder, [hint])
    assert np.abs(told.reward_T).max() < 1e-5 and told.metric_T["distill/overlap_ratio"].min() == 1
    assert [r.response_ids for r in hinted.rollouts] == [r.response_ids for r in told.rollouts]
    assert np.abs(hinted.reward_T).max() > 0.1
