"""The co-located engine on the real vLLM: weights in memory, seeds, top k, its host's peace."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from megatron_opd import parallel as mesh
from megatron_opd.model import build_model, export_hf, load_hf
from megatron_opd.model.hf_map import manifest
from megatron_opd.model.weights import exported
from megatron_opd.rollout import Sampling
from tests.distributed import run_ranks
from tests.hf import write_checkpoint
from tests.rollout.needs_vllm import LATENT, NEEDS_VLLM
from tests.rollout.student import training_logits
from tests.tiny import make_prompts
from tests.tokenizers import train_tokenizer

pytestmark = NEEDS_VLLM

ROWS, VOCAB = 203, 190  # of config.json; of the tokenizer: ids above are never sampled
SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}  # head_dim 32
PROMPTS = make_prompts([5, 9, 3, 7, 5, 12])
SAMPLING = Sampling(max_tokens=12, temperature=0.7, stop_ids=(3,), top_ids=4)
FAMILIES = {
    "untied": "qwen3",
    "tied": "qwen3_tied",
    "qkv-bias": "qwen2",
    "llama": "llama",
    "experts": "qwen3_moe",
    "latent": "deepseek_v2",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return a function from a family to two checkpoints of it with different weights."""
    made = {}

    def make(kind: str):
        if kind not in made:
            root, family = tmp_path_factory.mktemp(kind), FAMILIES[kind]
            sizes = SIZES | ({"head_dim": 32} if "qwen3" in family else {})
            sizes |= {"moe_intermediate_size": 64} if "moe" in family else {}
            if kind == "latent":  # its heads are wide: scores of hundreds would magnify rounding
                sizes |= LATENT | {"std": 0.05}
            for seed in (0, 1):
                write_checkpoint(root / str(seed), family, seed=seed, **sizes)
                train_tokenizer(root / str(seed))
            made[kind] = root / "0", root / "1"
        return made[kind]

    return make


def _model(folder, parallel):
    model = build_model(str(folder), parallel, dtype=torch.float32)
    load_hf(model, folder, parallel, vocab_size=VOCAB)
    return model


def _engine(model, parallel, folder, *, tp=1, **how):
    from megatron_opd.rollout.vllm_engine import VllmEngine

    settings = {"batch_size": 8, "max_length": 64, "seed": parallel.rank, "options": {}, **how}
    return VllmEngine(model, parallel, folder=str(folder), vocab_size=VOCAB, tp=tp, **settings)


def _before_and_after(rank, layout, tp, folders, how):
    """Rollouts with one checkpoint's weights, then with the other's."""
    parallel = mesh.initialize(*layout, sequence_parallel=True)  # experts are not trained without
    model = _model(folders[0], parallel)
    engine, found = _engine(model, parallel, folders[0], tp=tp, **how), []
    for folder in folders:
        load_hf(model, folder, parallel, vocab_size=VOCAB)
        engine.sync()
        found.append(engine.generate(PROMPTS, n=2, sampling=SAMPLING, seed=11))
    return found


def _student(rank, folder, rollouts):
    """What the student itself says of the rollouts: log-probs of their tokens, and its logits."""
    parallel = mesh.initialize()
    logits, batch = training_logits(_model(folder, parallel), parallel, rollouts, VOCAB)
    logp = log_softmax(logits / SAMPLING.temperature, -1)
    top = logp.gather(-1, batch.rollout_ids_NK), logp.topk(SAMPLING.top_ids).values
    return logp.gather(1, batch.target_N[:, None])[:, 0], batch.rollout_logp_N, *top


@pytest.mark.parametrize(
    ("kind", "layout", "tp", "how"),
    [
        ("untied", (1, 1), 1, {}),
        ("untied", (1, 1), 1, {"bucket_bytes": 1}),
        ("tied", (1, 1), 1, {"bucket_bytes": 100_000}),
        ("qkv-bias", (1, 1), 1, {}),
        ("llama", (1, 1), 1, {}),
        ("untied", (2, 1), 2, {}),
        ("tied", (2, 1), 1, {}),
        ("qkv-bias", (2, 1), 2, {"bucket_bytes": 1}),
        ("tied", (1, 2), 1, {}),
        ("qkv-bias", (2, 2), 2, {}),
        ("tied", (2, 2), 1, {"bucket_bytes": 1}),
        ("experts", (1, 1), 1, {}),
        ("experts", (2, 1), 2, {"bucket_bytes": 1}),
        ("latent", (1, 1), 1, {}),
    ],
)
def test_after_a_sync_the_engine_is_the_student(checkpoints, kind, layout, tp, how):
    """Perturb → sync → generate: log-probs to 2e-5 in fp32, and other tokens than before."""
    folders, world = checkpoints(kind), layout[0] * layout[1]
    ranks = run_ranks(_before_and_after, world, layout, tp, folders, how)
    assert all(found == ranks[0] for found in ranks)  # every rank of the replica knows all
    before, after = ranks[0]
    for folder, rollouts in zip(folders, (before, after), strict=True):
        own, said, top, best = run_ranks(_student, 1, folder, rollouts)[0]
        torch.testing.assert_close(said, own, rtol=0, atol=2e-5)
        engine_top = torch.cat([torch.from_numpy(r.top_logp) for r in rollouts])
        torch.testing.assert_close(engine_top, top, rtol=0, atol=2e-5)
        torch.testing.assert_close(top, best, rtol=0, atol=2e-5)  # they are the most likely
    assert [r.response_ids for r in before] != [r.response_ids for r in after]
    assert {r.version for r in before} == {1} and {r.version for r in after} == {2}
    assert [r.prompt.index for r in after] == [i for i in range(len(PROMPTS)) for _ in range(2)]


def _alone_and_together(rank, folder):
    """A request's tokens alone, in a batch, and in a batch of others; the host's random state."""
    parallel = mesh.initialize()
    model = _model(folder, parallel)
    states = []

    def look():
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()))

    look()
    threads = torch.get_num_threads()
    engine, found = _engine(model, parallel, folder), []
    for prompts in (PROMPTS[2:3], PROMPTS, PROMPTS[2:]):
        engine.sync()
        rollouts = engine.generate(prompts, n=2, sampling=SAMPLING, seed=11)
        found.append([r.response_ids for r in rollouts if r.prompt.index == 2])
    look()
    torch.set_num_threads(threads + 1)
    return found, states, torch.get_num_threads() - threads


def test_a_request_is_drawn_alone_as_in_any_batch_and_its_host_does_not_notice(checkpoints):
    ((found, (before, after), more),) = run_ranks(_alone_and_together, 1, checkpoints("tied")[0])
    assert found[0] == found[1] == found[2] and found[0][0] != found[0][1]
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert more == 1  # vLLM on a CPU replaces torch.set_num_threads by nothing


def _replica(rank, folder):
    """What each of two replicas draws for the same prompt of different index."""
    parallel = mesh.initialize()
    model = _model(folder, parallel)
    engine = _engine(model, parallel, folder)
    engine.sync()
    same = [replace(PROMPTS[1], index=index) for index in (2 * rank, 2 * rank + 1)]
    rollouts = engine.generate(same, n=2, sampling=SAMPLING, seed=11)
    return [r.response_ids for r in rollouts]


def test_replicas_draw_different_responses_to_the_same_words(checkpoints):
    one, other = run_ranks(_replica, 2, checkpoints("tied")[0])
    assert len({*one, *other}) == 8


def _limits(rank, folder):
    parallel = mesh.initialize()
    model = _model(folder, parallel)
    engine, found = _engine(model, parallel, folder), {}
    stops = tuple(range(0, VOCAB, 8))
    for name, sampling in {
        "plain": Sampling(max_tokens=6),
        "stops": Sampling(max_tokens=30, stop_ids=stops),
        "greedy": Sampling(max_tokens=6, temperature=0.0),
        "top_k": Sampling(max_tokens=6, top_k=1),
    }.items():
        engine.sync()
        found[name] = engine.generate(PROMPTS, n=1, sampling=sampling, seed=5)
    return found


def test_stops_limits_and_truncation(checkpoints):
    (found,) = run_ranks(_limits, 1, checkpoints("untied")[0])
    assert all(len(r.response_ids) == 6 and r.finish == "length" for r in found["plain"])
    assert all(r.top_ids is None and r.top_logp is None for r in found["plain"])
    stopped = [r for r in found["stops"] if r.finish == "stop"]
    assert len(stopped) >= 4
    for rollout in stopped:
        *others, last = rollout.response_ids
        assert last % 8 == 0 and all(id % 8 for id in others)
    assert all(max(r.response_ids) < VOCAB for r in found["plain"] + found["stops"])
    assert all(sum(r.logp) == 0.0 for r in found["top_k"])  # of the distribution drawn from
    greedy, top = ([r.response_ids for r in found[name]] for name in ("greedy", "top_k"))
    assert greedy == top


def _wrong_tensors(rank, folder):
    parallel = mesh.initialize()
    engine = _engine(_model(folder, parallel), parallel, folder)
    shapes = manifest(exported(engine.model, VOCAB))
    shapes["model.layers.0.self_attn.k_proj.weight"] = (2, 128)
    shapes["model.layers.7.mlp.down_proj.weight"] = shapes.pop("model.norm.weight")
    return engine.llm.collective_rpc("accepts", args=(shapes,))[0]


def test_names_and_shapes_are_compared_before_an_update(checkpoints):
    (problems,) = run_ranks(_wrong_tensors, 1, checkpoints("untied")[0])
    assert sorted(problems) == [
        "model.layers.0.self_attn.qkv_proj.weight: got (194, 128), expected (256, 128)",
        "model.layers.7.mlp.down_proj.weight: its model has none",
        "model.norm.weight: nothing comes for it",
    ]


def _half_an_update(rank, folder):
    parallel = mesh.initialize()
    engine = _engine(_model(folder, parallel), parallel, folder)
    engine.llm.start_weight_update()
    tensors = export_hf(engine.model, parallel, vocab_size=VOCAB)
    bucket = [(name, tensor) for name, tensor in tensors if "layers.1.mlp" not in name]
    engine.llm.update_weights({"update_info": {"weights": bucket}})
    with pytest.raises(RuntimeError) as caught:
        engine.llm.finish_weight_update("1")
    return str(caught.value)


def test_an_update_without_some_tensors_says_which(checkpoints):
    (line,) = run_ranks(_half_an_update, 1, checkpoints("untied")[0])
    assert line == (
        "no weights came for model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_up_proj.weight"
    )
