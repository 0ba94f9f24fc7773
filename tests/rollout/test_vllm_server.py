"""The engine on a real vLLM server: it writes with the weights that the student has."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from megatron_opd import parallel as mesh
from megatron_opd.model import build_model, load_hf
from megatron_opd.rollout import Sampling
from megatron_opd.rollout.server import Server
from megatron_opd.rollout.vllm_server import ServerEngine
from tests.distributed import run_ranks
from tests.rollout.needs_vllm import NEEDS_VLLM
from tests.rollout.student import training_logits
from tests.tiny import make_prompts
from tests.vllm_server import LONGEST, VOCAB, checkpoint, start, vllm_server

pytestmark = NEEDS_VLLM
SAMPLING = Sampling(max_tokens=12, temperature=0.8, stop_ids=(4, 9), top_ids=5)
PROMPTS = make_prompts([5, 9, 3, 14])


@pytest.fixture(scope="module", autouse=True)
def _both_at_once():
    start("qwen3", "qwen3_tied")


def _engine(url, folder, layout, bucket_bytes=2**28, **how):
    parallel = mesh.initialize(*layout)
    model = build_model(folder, parallel, dtype=torch.float32, seed=None)
    load_hf(model, folder, parallel, vocab_size=VOCAB)
    server = Server(url, **how)
    return ServerEngine(model, parallel, server, vocab_size=VOCAB, bucket_bytes=bucket_bytes)


def _write_twice(rank, url, folders, layout, bucket_bytes):
    """Return what is written with the first weights, and with the second ones."""
    engine, written = _engine(url, folders[0], layout, bucket_bytes), []
    for folder in folders:
        load_hf(engine.model, folder, engine.parallel, vocab_size=VOCAB)
        engine.sync()
        mine = PROMPTS[engine.parallel.dp_rank :: engine.parallel.dp]
        written.append(engine.generate(mine, n=2, sampling=SAMPLING, seed=3))
    engine.close()
    return written


def _trained(rank, folder, rollouts):
    """Return log-probabilities of the training forward at every response token, [N, V]."""
    parallel = mesh.initialize()
    model = build_model(folder, parallel, dtype=torch.float32, seed=None)
    load_hf(model, folder, parallel, vocab_size=VOCAB)
    logits, batch = training_logits(model, parallel, rollouts, VOCAB)
    return log_softmax(logits / SAMPLING.temperature, -1), batch


@pytest.mark.parametrize(
    ("family", "world", "layout", "bucket_bytes"),
    [
        ("qwen3", 1, (1, 1), 2**28),
        ("qwen3", 1, (1, 1), 1),
        ("qwen3", 2, (2, 1), 10_000),
        ("qwen3", 2, (1, 2), 10_000),
        ("qwen3", 2, (1, 1), 2**28),
        ("qwen3_tied", 1, (1, 1), 2**28),
        ("qwen3_tied", 2, (1, 2), 1),
    ],
)
def test_what_is_written_after_a_sync_is_the_students(family, world, layout, bucket_bytes):
    folders, running = [checkpoint(family, seed) for seed in (1, 2)], vllm_server(family)
    ranks = run_ranks(_write_twice, world, running.url, folders, layout, bucket_bytes)
    if layout != (1, 1):  # one replica: every rank has all
        assert ranks[0] == ranks[1]
        ranks = ranks[:1]
    before, after = ([r for rank in ranks for r in rank[time]] for time in (0, 1))
    assert (
        len(after) == 8 and {r.version for r in before} == {1} and {r.version for r in after} == {2}
    )
    assert all(a.response_ids != b.response_ids for a, b in zip(before, after, strict=True))
    ((logp_NV, batch),) = run_ranks(_trained, 1, folders[1], after)
    trained = logp_NV.gather(1, batch.target_N[:, None])[:, 0]
    assert (trained - batch.rollout_logp_N).abs().max() < 2e-5
    assert trained.min() < -2.0  # not all near certain: the comparison means something
    best = logp_NV.topk(SAMPLING.top_ids)
    assert torch.equal(best.indices, batch.rollout_ids_NK)
    told = torch.from_numpy(np.concatenate([r.top_logp for r in after]))
    assert (best.values - told).abs().max() < 2e-5


def _write_alone_and_together(rank, url, folder):
    engine = _engine(url, folder, (1, 1))
    engine.sync()
    how = {"n": 3, "sampling": Sampling(max_tokens=20)}
    together = engine.generate(PROMPTS, seed=5, **how)
    alone = [r for p in PROMPTS[::-1] for r in engine.generate([p], seed=5, **how)]
    other = engine.generate(PROMPTS, seed=6, **how)
    early = engine.submit(PROMPTS, seed=5, **how)
    late = engine.submit(PROMPTS, seed=6, **how)
    overlapped = engine.collect(early), engine.collect(late)
    engine.sync()  # the same weights again: another version, the same tokens
    return together, alone, other, overlapped, engine.generate(PROMPTS, seed=5, **how)


def test_draws_depend_on_seed_prompt_and_sample_alone():
    running = vllm_server("qwen3")
    ((together, alone, other, overlapped, again),) = run_ranks(
        _write_alone_and_together, 1, running.url, running.folder
    )
    tokens = [r.response_ids for r in together]
    assert [(r.prompt.index, r.sample) for r in together] == [
        (p, s) for p in range(4) for s in range(3)
    ]
    assert [alone[i].response_ids for i in (9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2)] == tokens
    assert len(set(tokens)) == 12 and not set(tokens) & {r.response_ids for r in other}
    assert overlapped[0] == together and overlapped[1] == other
    assert [r.response_ids for r in again] == tokens


def _sync_another_model(rank, url, folder):
    engine = _engine(url, folder, (2, 1))
    try:
        engine.sync()
    except ValueError as problem:
        return str(problem)


def test_another_model_is_refused_before_the_update():
    url = vllm_server("qwen3").url
    for line in run_ranks(_sync_another_model, 2, url, checkpoint("qwen3_tied", 0)):
        assert "lm_head.weight: nothing comes for it" in line and "\n" not in line


def _more_rows(rank, url, folder):
    parallel = mesh.initialize()
    model = build_model(folder, parallel, dtype=torch.float32, seed=None)
    load_hf(model, folder, parallel)
    engine = ServerEngine(model, parallel, Server(url), vocab_size=VOCAB - 10)
    with pytest.raises(ValueError, match=r"--hf-overrides '{\"vocab_size\": 190}'"):
        engine.sync()


def test_a_server_with_more_ids_than_the_tokenizer_is_refused():
    running = vllm_server("qwen3")
    run_ranks(_more_rows, 1, running.url, running.folder)


def _ask_for_top_ids_of_a_truncated_distribution(rank):
    engine = ServerEngine(None, mesh.initialize(), Server("http://127.0.0.1:1"), vocab_size=VOCAB)
    for truncated in ({"top_p": 0.9}, {"top_k": 4}):
        with pytest.raises(ValueError, match="cannot tell the 5 most likely ids"):
            engine.submit(PROMPTS, n=1, sampling=replace(SAMPLING, **truncated), seed=0)
    pending = engine.submit(PROMPTS, n=1, sampling=replace(SAMPLING, top_k=5), seed=0)
    engine.close()
    assert pending.answers.cancelled()


def test_top_ids_are_not_made_up():
    run_ranks(_ask_for_top_ids_of_a_truncated_distribution, 1)


def test_the_server_passes_its_checks():
    running = vllm_server("qwen3")
    server = Server(running.url)
    name = server.check(max_length=LONGEST, vocab_size=VOCAB, k=21)
    assert name == str(running.folder)
    server.check_updates()
    with pytest.raises(ValueError, match="--max-model-len 128, expected at least 129"):
        server.check(max_length=129, vocab_size=VOCAB)
    server.close()


def _write_while_it_dies(rank, running):
    engine = _engine(running.url, running.folder, (2, 1), in_flight=4, retries=2, pause=0.1)
    engine.sync()
    sampling = Sampling(max_tokens=100, stop_ids=())
    pending = engine.submit(PROMPTS, n=100, sampling=sampling, seed=1)
    time.sleep(0.5)
    if rank == 0:
        assert not pending.answers.done()
        running.kill()
    start = time.monotonic()
    try:
        engine.collect(pending)
    except ValueError as problem:
        return str(problem), time.monotonic() - start


def test_a_server_that_dies_stops_every_rank_with_one_line():
    running = vllm_server("qwen3_tied")
    ranks = run_ranks(_write_while_it_dies, 2, running)
    for line, seconds in ranks:
        assert line.startswith(f"{running.url}/inference/v1/generate: ") and "\n" not in line
        assert "asked 3 times" in line and seconds < 20.0
