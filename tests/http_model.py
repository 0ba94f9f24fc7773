"""A small HTTP server that speaks vLLM's wire, with tokens from arithmetic instead of a model."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import load_file

VOCAB, STOP, VERSION = 50, 7, "run.1"


class HttpModel:
    """Answer rightly, unless `spoil(path, count, reply)` returns another answer.

    `count` numbers the times that one request came, from 1. An answer is an object, bytes, an HTTP
    status, or None for silence. What was asked is kept.
    """

    def __init__(self, spoil=lambda path, count, reply: reply):
        self.spoil, self.calls, self.counts = spoil, [], Counter()
        self.weights, self.version = {}, VERSION
        self.busy, self.busiest = 0, 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients that have gone
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def asked(self, path):
        """Return the bodies that came to `path`."""
        return [body for where, body in self.calls if where == path]

    def _handler(self):
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._answer(None)

            def do_POST(self):
                length = int(self.headers.get("content-length", 0))
                body = self.rfile.read(length)
                if len(body) == length:  # else the client has gone: nothing was asked
                    self._answer(json.loads(body or "null"))

            def _answer(self, body):
                reply = model.reply(self.path.partition("?")[0], body)
                if reply is None:
                    time.sleep(5)
                status = reply if isinstance(reply, int) else 200
                if not isinstance(reply, bytes):
                    reply = json.dumps({"error": {"message": "a\nline"}} if status > 200 else reply)
                    reply = reply.encode()
                self.send_response(status)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        return Handler

    def reply(self, path, body):
        """Return what is sent for one request."""
        with self.lock:
            self.calls.append((path, body))
            self.counts[path, json.dumps(body)] += 1
            count = self.counts[path, json.dumps(body)]
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            return self.spoil(path, count, self._right(path, body))
        finally:
            with self.lock:
                self.busy -= 1

    def _right(self, path, body):
        if path == "/inference/v1/generate":
            asked = body["sampling_params"]
            return _scored(body) if "prompt_logprobs" in asked else _drawn(body["token_ids"], asked)
        if path == "/update_weights":
            self.weights |= load_file(body["update_info"]["path"])
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        return {
            "/v1/models": {"data": [{"id": "tiny", "max_model_len": 100}]},
            "/server_info": {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "megatron_opd"},
                    "parallel_config": {
                        "worker_extension_cls": "megatron_opd.rollout.vllm_worker.Extension"
                    },
                    "model_config": {"logprobs_mode": "processed_logprobs"},
                }
            },
            "/collective_rpc": {"results": [[]]},
            "/weight_info": {"weight_version": self.version},
            "/reset_prefix_cache": {"success": True},
        }.get(path, {})


def drawn_ids(prompt, seed, most):
    """Return the response that a request has: to be recomputed by who knows the request."""
    ids = [(seed + 3 * i + sum(prompt)) % VOCAB for i in range(most)]
    return ids[: ids.index(STOP) + 1] if STOP in ids else ids


def _drawn(prompt, asked):
    ids, top = drawn_ids(prompt, asked["seed"], asked["max_tokens"]), asked["logprobs"]
    content = []
    for token in ids:
        own = {"token_id": token, "logprob": -2.0, "rank": 20}
        likely = [{"token_id": r, "logprob": -r / 10, "rank": r} for r in range(1, top + 1)]
        if 1 <= token <= top:  # it is one of them: vLLM sends it once, and first
            own = likely.pop(token - 1)
        content.append({**own, "top_logprobs": [own, *likely][: max(top, 1)]})
    choice = {
        "token_ids": ids,
        "finish_reason": "stop" if ids[-1] == STOP else "length",
        "weight_versions": [{"version": VERSION, "start": 0, "end": len(ids)}],
        "logprobs": {"content": content},
    }
    return {"choices": [choice]}


def _scored(body):
    k, entries = body["sampling_params"]["prompt_logprobs"], [{}]
    for place, token in enumerate(body["token_ids"][1:], 1):
        own = {str(token): {"logprob": -place / 8, "rank": 30}}
        likely = {str(r): {"logprob": -r / 10, "rank": r} for r in range(1, k + 1)}
        entries.append({**own, **likely})  # it takes the rank it has among them
    span = {"version": VERSION, "start": 0, "end": 1}
    choice = {"token_ids": [1], "weight_versions": [span]}
    return {"prompt_logprobs": entries, "choices": [choice]}
