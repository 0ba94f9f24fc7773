"""The client of one vLLM server over HTTP: responses, scores, and new weights.

Every request can be sent again: its seed is its own, so that the answer is the same. What is
checked and what counts as wrong is in `wire`.
"""

import asyncio
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_opd.rollout import wire
from megatron_opd.rollout.requests import Request
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.wire import Answer, Passage, Scored

if TYPE_CHECKING:
    from megatron_opd.parallel import Parallel

Q = TypeVar("Q")
T = TypeVar("T")
_GENERATE = "/inference/v1/generate"
_SHARED = "/dev/shm"  # memory that has a name: the server reads the weights where they are
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
OPTIONS = {  # with which a server must have been started to be given weights
    "--weight-transfer-config": '{"backend": "megatron_opd"}',
    "--worker-extension-cls": "megatron_opd.rollout.vllm_worker.Extension",
    "--logprobs-mode": "processed_logprobs",
}


class Server:
    """One vLLM server. At most `in_flight` requests are with it at a time.

    A request that fails, is answered wrongly, or not within `timeout` seconds, is sent again
    `retries` times, after `pause`, twice that, … seconds.

    Raises:
        ValueError: `url` is none.
        ConnectionError: of every method, when asking again did not help; one line.
    """

    def __init__(
        self,
        url: str,
        *,
        in_flight: int = 256,
        timeout: float = 600.0,
        retries: int = 3,
        pause: float = 0.5,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: got '{url}', expected one like http://127.0.0.1:8000")
        self.url, self.retries, self.pause, self.timeout = url.rstrip("/"), retries, pause, timeout
        self._client = httpx.AsyncClient(
            base_url=self.url, timeout=timeout, transport=_Pools(1 + in_flight // 8)
        )
        self._places = asyncio.Semaphore(in_flight)
        self._loop = asyncio.new_event_loop()
        # a daemon: a trainer that stops does not wait for responses that nobody wants
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def check(self, *, max_length: int, vocab_size: int, k: int = 0) -> str:
        """Return the name of the server's model, after scoring two tokens with it.

        Raises:
            ConnectionError: it cannot be reached, or cannot score with `k` most likely ids.
            ValueError: sequences of `max_length` tokens are too long for it.
        """
        name, longest = self._call("GET", "/v1/models", read=_read_card)
        if longest < max_length:
            raise ValueError(
                f"{self.url}: got --max-model-len {longest}, expected at least {max_length} for "
                "the longest prompt and response; start the server with that"
            )
        self.score([Passage((0, vocab_size - 1), 1)], k, vocab_size=vocab_size)
        return name

    def check_updates(self) -> None:
        """Check that the server can be given weights, and says with what a token was drawn.

        Raises:
            ValueError: an option that it was not started with.
        """
        path = "/server_info?config_format=json"
        for option, got in self._call("GET", path, read=_read_options).items():
            expected = OPTIONS[option]
            if got != expected:
                raise ValueError(
                    f"{self.url}: got {option} '{got}', expected '{expected}'; start the server "
                    "with that"
                )

    def check_weights(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Check that the server's model has tensors of these Hugging Face names and shapes.

        Raises:
            ValueError: one has another shape, is missing, or is not known there.
        """
        body = {"method": "accepts", "args": [shapes]}
        problems = self._call("POST", "/collective_rpc", body, read=lambda r: r["results"][0])
        if problems:
            rows = next(iter(shapes.values()))[0]  # the embedding comes first
            raise ValueError(
                f"{self.url}: its model cannot take the student's weights: {problems[0]}; start "
                f"the server with the student's directory, and --load-format dummy --hf-overrides "
                f"'{{\"vocab_size\": {rows}}}' where its tables have more rows"
            )

    def generate(
        self, requests: list[Request], sampling: Sampling, *, vocab_size: int, version: str
    ) -> Future[list[Answer]]:
        """Ask for one response per request, in their order, drawn by the weights `version`.

        The future's `result()` waits for them, and raises what went wrong.
        """

        def read(reply: Any) -> Answer:
            return wire.read_answer(reply, sampling, vocab_size=vocab_size, version=version)

        def ask(request: Request) -> Coroutine[Any, Any, Answer]:
            body = wire.generate_body(request, sampling, vocab_size)
            return self._ask("POST", _GENERATE, body, read)

        return self._start(self._all(ask, requests))

    def score(
        self, passages: list[Passage], k: int, *, vocab_size: int, version: str | None = None
    ) -> list[Scored]:
        """Return the scores of every passage, in their order, with the `k` most likely ids.

        Raises:
            ValueError: a token id is not in the vocabulary.
        """

        def ask(passage: Passage) -> Coroutine[Any, Any, Scored]:
            def read(reply: Any) -> Scored:
                return wire.read_scored(reply, passage, k, vocab_size=vocab_size, version=version)

            return self._ask("POST", _GENERATE, wire.score_body(passage, k, vocab_size), read)

        return self._start(self._all(ask, passages)).result()

    def update(self, buckets: Iterable[list[tuple[str, Tensor]]], version: str) -> None:
        """Give the server new weights, and their name.

        Nothing is generated meanwhile, and if this fails nothing will be: the server stays paused,
        with a part of the weights.

        Raises:
            OSError: the weights do not fit in shared memory.
        """
        self._call("POST", "/pause?mode=abort")  # whoever asked has gone
        self._call("POST", "/start_weight_update", retries=0)
        for bucket in buckets:
            self._send(bucket)
        self._call("POST", "/finish_weight_update", {"weight_version": version}, retries=0)
        self._call("POST", "/reset_prefix_cache", read=_check_reset)
        self._call("GET", "/weight_info", read=partial(_check_named, version))
        self._call("POST", "/resume")

    def close(self) -> None:
        """Forget what was asked, and leave."""
        if self._loop.is_running():
            self._start(self._leave()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _leave(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # whoever waits is told
        await self._client.aclose()

    def _send(self, bucket: list[tuple[str, Tensor]]) -> None:
        handle, path = tempfile.mkstemp(".safetensors", "megatron_opd_", _SHARED)
        os.close(handle)
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in bucket}, path)
            self._call("POST", "/update_weights", {"update_info": {"path": path}}, retries=0)
        except (SafetensorError, ConnectionError) as problem:
            raise ConnectionError(
                f"the weights {bucket[0][0]} … {bucket[-1][0]} did not arrive through {_SHARED}, "
                f"which the server has to share: {problem}"
            ) from None
        finally:
            os.unlink(path)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        read: Callable[[Any], T] = lambda reply: reply,
        retries: int | None = None,
    ) -> T:
        return self._start(self._ask(method, path, body, read, retries)).result()

    async def _all(self, ask: Callable[[Q], Coroutine[Any, Any, T]], questions: list[Q]) -> list[T]:
        """Ask all, a bounded number at a time; the first error ends it."""

        async def in_turn(question: Q) -> T:
            async with self._places:
                return await ask(question)

        tasks = [asyncio.ensure_future(in_turn(question)) for question in questions]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        read: Callable[[Any], T],
        retries: int | None = None,
    ) -> T:
        """Ask until the answer is right, a bounded number of times."""
        most, attempt = 1 + (self.retries if retries is None else retries), 0
        while True:
            attempt += 1
            try:
                response = await self._client.request(method, path, json=body)
                if not response.is_success:
                    raise _Refused(response)
                return read(response.json())
            except (httpx.HTTPError, *_UNREADABLE, _Refused) as problem:
                if attempt == most or (isinstance(problem, _Refused) and problem.for_good):
                    raise ConnectionError(
                        f"{self.url}{path.partition('?')[0]}: {self._in_words(problem)} (asked "
                        f"{attempt} times); see the server's log, start it again, resume the run"
                    ) from None
            await asyncio.sleep(self.pause * 2 ** (attempt - 1))

    def _in_words(self, problem: Exception) -> str:
        match problem:
            case httpx.TimeoutException():
                return f"no answer within {self.timeout:g} s"
            case httpx.ConnectError():
                return "nobody answers there"
            case httpx.HTTPError():
                return f"the connection broke ({type(problem).__name__})"
            case _Refused():
                return str(problem)
            case ValueError():
                return f"a wrong answer: {problem}"
        return f"an answer of another form: {problem!r}"


class _Pools(httpx.AsyncBaseTransport):
    """Several small pools of connections: each request looks at all connections of its pool."""

    def __init__(self, count: int):
        # a server drops a connection after 5 idle seconds, and at the same moment we would use it
        limits, context = httpx.Limits(keepalive_expiry=2), httpx.create_ssl_context()
        self.pools = [httpx.AsyncHTTPTransport(context, limits=limits) for _ in range(count)]
        self.turns = itertools.cycle(self.pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self.turns).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self.pools:
            await pool.aclose()


class _Refused(Exception):
    """An answer that is an error; `for_good`: asking again will not help."""

    def __init__(self, response: httpx.Response):
        status = response.status_code
        self.for_good = status < 500 and status != 429
        try:
            said = response.json()["error"]["message"]
        except _UNREADABLE:
            said = response.text
        if status == 404:
            said += " (was it started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out?)"
        super().__init__(f"status {status}: {' '.join(said.split())[:300]}")


def _read_card(reply: Any) -> tuple[str, int]:
    """Return name and longest sequence of the model."""
    return reply["data"][0]["id"], int(reply["data"][0]["max_model_len"])


def _read_options(reply: Any) -> dict[str, str]:
    """Return what the server was started with of `OPTIONS`, as it would be written there."""
    info = reply["vllm_config"]
    backend = (info["weight_transfer_config"] or {}).get("backend")
    return {
        "--weight-transfer-config": json.dumps({"backend": backend}),
        "--worker-extension-cls": info["parallel_config"]["worker_extension_cls"],
        "--logprobs-mode": info["model_config"]["logprobs_mode"],
    }


def _check_reset(reply: Any) -> None:
    if reply["success"] is not True:
        raise ValueError("the prefix cache is still in use: old values would stay")


def _check_named(version: str, reply: Any) -> None:
    if reply["weight_version"] != version:
        raise ValueError(f"weights {reply['weight_version']!r}, not {version!r} that were sent")


def ask_once(parallel: "Parallel", ask: Callable[[], T]) -> T:
    """Run `ask` on the first rank of each replica and return its value on all of the replica's.

    Collective over all ranks.

    Raises:
        ValueError: on every rank, if it raised one, or an `OSError`, anywhere.
    """
    first = dist.get_global_rank(parallel.replica_group, 0)
    found: list[Any] = []
    parallel.agree(lambda: found.append(ask()) if parallel.rank == first else None)
    box = found or [None]
    if parallel.replica_size > 1:
        dist.broadcast_object_list(box, src=first, group=parallel.replica_group)
    return box[0]
