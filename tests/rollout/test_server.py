"""The client: right answers in order, wrong ones refused, a bounded number of attempts."""

import re
import threading
import time
from concurrent.futures import CancelledError
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_opd import parallel as mesh
from megatron_opd.rollout import Sampling
from megatron_opd.rollout.requests import make_requests
from megatron_opd.rollout.server import Server, ask_once
from megatron_opd.rollout.wire import Passage
from tests.distributed import run_ranks
from tests.http_model import STOP, VERSION, VOCAB, HttpModel, drawn_ids
from tests.tiny import make_prompts

SAMPLING = Sampling(max_tokens=9, stop_ids=(STOP,), top_ids=4)
REQUESTS = make_requests(make_prompts([3, 5, 2, 8]), n=3, seed=1)
GENERATE = "/inference/v1/generate"
KNOWN = {"vocab_size": VOCAB, "version": VERSION}


def _client(url, **how):
    return Server(url, **{"retries": 2, "pause": 0.01, "timeout": 10.0, **how})


def _generate(server, sampling=SAMPLING):
    return server.generate(REQUESTS, sampling, **KNOWN).result()


def _assert_right(answers):
    expected = [drawn_ids(r.prompt.token_ids, r.seed, SAMPLING.max_tokens) for r in REQUESTS]
    assert [list(a.token_ids) for a in answers] == expected
    assert len({tuple(ids) for ids in expected}) > 5
    for answer in answers:
        assert answer.finish == ("stop" if answer.token_ids[-1] == STOP else "length")


def test_answers_are_those_of_the_requests_in_their_order():
    def slower_the_earlier(path, count, reply):
        time.sleep(0.002 * len(reply["choices"][0]["token_ids"]))
        return reply

    with HttpModel(slower_the_earlier) as model:
        answers = _generate(_client(model.url, in_flight=5))
    _assert_right(answers)
    assert {a.finish for a in answers} == {"stop", "length"}
    assert 1 < model.busiest <= 5 and len(model.calls) == len(REQUESTS)


def test_the_most_likely_ids_are_in_order_wherever_the_drawn_one_ranks():
    with HttpModel() as model:
        answers = _generate(_client(model.url))
    assert any(token <= 5 for a in answers for token in a.token_ids)
    for answer in answers:
        tokens = len(answer.token_ids)
        assert answer.top_ids_TK.dtype == np.int32 and answer.top_logp_TK.dtype == np.float32
        assert (answer.top_ids_TK == np.tile([1, 2, 3, 4], (tokens, 1))).all()
        assert np.allclose(answer.top_logp_TK, np.tile([-0.1, -0.2, -0.3, -0.4], (tokens, 1)))
        assert answer.logp == tuple(-t / 10 if t in range(1, 6) else -2.0 for t in answer.token_ids)


def _set(key, value):
    def change(choice):
        choice[key] = value

    return change


def _span(**other):
    def change(choice):
        choice["weight_versions"][0].update(other)

    return change


def _entry(**other):
    def change(choice):
        choice["logprobs"]["content"][0].update(other)

    return change


def _other_token(value):
    def change(choice):
        choice["token_ids"][0] = choice["logprobs"]["content"][0]["token_id"] = value

    return change


def _cut(choice):
    choice["token_ids"].pop()
    choice["logprobs"]["content"].pop()
    choice["weight_versions"][0]["end"] -= 1


def _two_versions(choice):
    choice["weight_versions"].append({"version": "run.2", "start": 0, "end": 1})


def _fourth(**other):
    def change(choice):
        tops = choice["logprobs"]["content"][0]["top_logprobs"]
        next(top for top in tops if top["rank"] == 4).update(other)

    return change


WRONG = {
    "token id 50, of a vocabulary of 50": _other_token(VOCAB),
    "token id -1, of a vocabulary": _other_token(-1),
    "token ids of type float64": _other_token(1.5),
    "inf as a log-probability": _entry(logprob=float("-inf")),
    "nan as a log-probability": _entry(logprob=float("nan")),
    "0.001 as a log-probability": _entry(logprob=0.001),
    "-9999 as a log-probability": _entry(logprob=-9999.0),
    "log-probabilities of type object": _entry(logprob=None),
    "that are not of its": lambda choice: choice["logprobs"]["content"].pop(),
    "another form: TypeError": _set("logprobs", None),
    "ends ('abort')": _set("finish_reason", "abort"),
    "tokens, of at most 9": _cut,
    "weights of version [('run.0'": _span(version="run.0"),
    "not 'run.1' throughout": _two_versions,
    "weights of version [('run.1', 0, 1)]": _span(end=1),
    "do not rank 1 to 4": _fourth(rank=3),
    "cannot reshape": _fourth(rank=9),
    "token id 77": _fourth(token_id=77),
    "5 as a log-probability": _fourth(logprob=5.0),
    "KeyError('token_ids')": lambda choice: choice.pop("token_ids"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_answer_is_asked_again_and_then_fatal(reason):
    def change(reply):
        reply = deepcopy(reply)
        WRONG[reason](reply["choices"][0])
        return reply

    def first_wrong(path, count, reply):
        return change(reply) if count == 1 else reply

    with HttpModel(first_wrong) as model:
        _assert_right(_generate(_client(model.url)))
        assert set(model.counts.values()) == {2}
    with HttpModel(lambda path, count, reply: change(reply)) as model:
        _assert_fatal(model, reason, attempts=3)


def _assert_fatal(model, reason, attempts, **how):
    with pytest.raises(ConnectionError, match=re.escape(reason)) as caught:
        _generate(_client(model.url, **how))
    line = str(caught.value)
    assert line.startswith(f"{model.url}{GENERATE}: ") and f"asked {attempts} times" in line
    # what a client gave up asking may not have come
    assert "\n" not in line and max(model.counts.values()) <= attempts


@pytest.mark.parametrize(
    ("reply", "reason", "attempts"),
    [
        (b"<html>", "a wrong answer: Expecting value", 3),
        ({}, "another form: KeyError('choices')", 3),
        ([1], "another form: TypeError", 3),
        ({"choices": []}, "not enough values", 3),
        (500, "status 500: a line", 3),
        (503, "status 503", 3),
        (429, "status 429", 3),
        (400, "status 400: a line", 1),  # the request is at fault: it would be again
        (404, "status 404: a line (was it started with VLLM_SERVER_DEV_MODE=1", 1),
    ],
)
def test_what_is_no_answer_at_all(reply, reason, attempts):
    with HttpModel(lambda *_: reply) as model:
        _assert_fatal(model, reason, attempts)
        assert max(model.counts.values()) == attempts
    if attempts > 1:
        with HttpModel(lambda path, count, right: reply if count < 3 else right) as model:
            _assert_right(_generate(_client(model.url)))


def test_a_server_that_keeps_silent():
    with HttpModel(lambda path, count, reply: reply if len(model.calls) > 2 else None) as model:
        _assert_right(_generate(_client(model.url, timeout=1.0, in_flight=2)))
        assert len(model.calls) == len(REQUESTS) + 2
    with HttpModel(lambda *_: None) as model:
        start = time.monotonic()
        _assert_fatal(model, "no answer within 0.2 s", 2, timeout=0.2, retries=1)
        assert time.monotonic() - start < 4.0  # it keeps silent for five seconds


def test_a_server_that_is_not_there():
    with HttpModel() as model:
        pass
    with pytest.raises(ConnectionError, match="nobody answers there"):
        _generate(_client(model.url))


def test_responses_come_while_something_else_is_done():
    gate = threading.Event()
    with HttpModel(lambda path, count, reply: gate.wait(10) and reply) as model:
        server = _client(model.url)
        pending = server.generate(REQUESTS, SAMPLING, **KNOWN)
        assert not pending.done()
        gate.set()
        _assert_right(pending.result())
        gate.clear()
        again = server.generate(REQUESTS, SAMPLING, **KNOWN)
        server.close()
        with pytest.raises(CancelledError):
            again.result()
        gate.set()


def test_a_prompt_that_would_stop_the_server_is_not_sent():
    with HttpModel() as model:
        server = _client(model.url)
        with pytest.raises(ValueError, match="token id 50, of a vocabulary of 50"):
            server.score([Passage((1, 50), 1)], 0, vocab_size=VOCAB)
        small = server.generate(REQUESTS, SAMPLING, vocab_size=20, version=VERSION)
        with pytest.raises(ValueError, match="of a vocabulary of 20"):
            small.result()  # not before: other ranks hear of it where they wait
        assert not model.asked(GENERATE)


def test_an_address_is_one():
    with pytest.raises(ValueError, match="url: got 'localhost:8000', expected one like http://"):
        Server("localhost:8000")


def test_scores_of_passages():
    passages = [Passage((9, 30, 2, 1), 2), Passage((1, 2, 40), 1)]
    with HttpModel() as model:
        for k in (0, 3):
            found = _client(model.url).score(passages, k, **KNOWN)
            for one, own in zip(found, [[-0.2, -0.1] if k else [-0.25, -0.375], None], strict=True):
                if own:
                    assert np.allclose(one.logp_T, own)
                assert one.ids_TK.shape == one.top_logp_TK.shape == (2, k)
                assert (one.ids_TK == np.arange(1, k + 1)).all()
        assert len(model.calls) == 4  # every passage once


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("1 scores for 3 tokens", lambda reply: {**reply, "prompt_logprobs": [{}]}),
        ("not 'run.2' throughout", lambda reply: reply),
        ("KeyError('40')", lambda reply: reply["prompt_logprobs"][2].pop("40") and reply),
        ("cannot reshape", lambda reply: reply["prompt_logprobs"][2].pop("3") and reply),
    ],
)
def test_wrong_scores(reason, change):
    with (
        HttpModel(lambda path, count, reply: change(reply)) as model,
        pytest.raises(ConnectionError, match=re.escape(reason)),
    ):
        version = "run.2" if "run" in reason else VERSION
        _client(model.url).score([Passage((1, 2, 40), 1)], 3, vocab_size=VOCAB, version=version)


def test_the_check_before_anything_is_loaded():
    with HttpModel() as model:
        server = _client(model.url)
        assert server.check(max_length=100, vocab_size=VOCAB, k=5) == "tiny"
        (probe,) = model.asked(GENERATE)
        assert probe["token_ids"] == [0, VOCAB - 1]
        assert probe["sampling_params"]["prompt_logprobs"] == 5
        with pytest.raises(ValueError, match="--max-model-len 100, expected at least 101"):
            server.check(max_length=101, vocab_size=VOCAB)
        server.check_updates()
        server.check_weights({"table": (VOCAB, 8)})


@pytest.mark.parametrize(
    ("section", "key", "option"),
    [
        ("weight_transfer_config", "backend", '--weight-transfer-config \'{"backend": "other"}\''),
        ("parallel_config", "worker_extension_cls", "--worker-extension-cls 'other'"),
        ("model_config", "logprobs_mode", "--logprobs-mode 'other', expected 'processed_logprobs'"),
    ],
)
def test_a_server_that_was_started_with_other_options(section, key, option):
    def change(path, count, reply):
        reply["vllm_config"][section][key] = "other"
        return reply

    with (
        HttpModel(change) as model,
        pytest.raises(ValueError, match=re.escape(f"got {option}")),
    ):
        _client(model.url).check_updates()


def test_weights_that_the_servers_model_has_no_place_for():
    problems = {"results": [["lm_head.weight: its model has none", "more"]]}
    with (
        HttpModel(lambda *_: problems) as model,
        pytest.raises(ValueError, match=r"lm_head\.weight: its model has none") as caught,
    ):
        _client(model.url).check_weights({"embed": (VOCAB, 8)})
    assert "--hf-overrides '{\"vocab_size\": 50}'" in str(caught.value)


def _buckets():
    tensors = {name: torch.full((2, 3), float(n)) for n, name in enumerate("abc")}
    return tensors, [[("a", tensors["a"]), ("b", tensors["b"].T)], [("c", tensors["c"])]]


def test_an_update_in_order_and_nothing_left_behind():
    def reset_takes_a_moment(path, count, reply):
        return {"success": False} if path == "/reset_prefix_cache" and count == 1 else reply

    tensors, buckets = _buckets()
    with HttpModel(reset_takes_a_moment) as model:
        _client(model.url).update(buckets, "run.9")
    assert [path for path, _ in model.calls] == [
        "/pause",
        "/start_weight_update",
        "/update_weights",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/reset_prefix_cache",
        "/weight_info",
        "/resume",
    ]
    assert model.asked("/finish_weight_update") == [{"weight_version": "run.9"}]
    assert torch.equal(model.weights["b"], tensors["b"].T) and set(model.weights) == set("abc")
    _assert_no_file(model)


def _assert_no_file(model):
    sent = [body["update_info"]["path"] for body in model.asked("/update_weights")]
    assert sent and not any(Path(path).exists() for path in sent)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/start_weight_update", "status 500"),
        ("/update_weights", "the weights a … b did not arrive"),
        ("/finish_weight_update", "status 500"),
    ],
)
def test_an_update_is_not_repeated_and_a_server_with_half_of_it_stays_paused(where, reason):
    def fail(path, count, reply):
        return 500 if path == where else reply

    with HttpModel(fail) as model:
        with pytest.raises(ConnectionError, match=reason):
            _client(model.url).update(_buckets()[1], "run.9")
        assert len(model.asked(where)) == 1 and not model.asked("/resume")
        if where != "/start_weight_update":
            _assert_no_file(model)


@pytest.mark.parametrize(
    ("where", "reply", "reason"),
    [
        ("/reset_prefix_cache", {"success": False}, "prefix cache is still in use"),
        ("/weight_info", {"weight_version": "theirs.3"}, "weights 'theirs.3', not 'run.9'"),
    ],
)
def test_an_update_that_did_not_take_is_fatal(where, reply, reason):
    with (
        HttpModel(lambda path, count, right: reply if path == where else right) as model,
        pytest.raises(ConnectionError, match=reason),
    ):
        _client(model.url).update([], "run.9")
    assert not model.asked("/resume")


def _ask_on_two_ranks(rank, url):
    """One replica: its first rank asks, the other one hears."""
    parallel = mesh.initialize(2, 1)
    server = _client(url)
    answers = ask_once(parallel, lambda: _generate(server))
    with pytest.raises(ValueError, match="nobody answers there"):
        ask_once(parallel, lambda: _generate(_client("http://127.0.0.1:1")))
    return [answer.token_ids for answer in answers]


def test_one_rank_asks_and_all_know_or_none():
    with HttpModel() as model:
        ranks = run_ranks(_ask_on_two_ranks, 2, model.url)
        assert len(model.asked(GENERATE)) == len(REQUESTS)
    assert ranks[0] == ranks[1] and len(ranks[0]) == len(REQUESTS)
