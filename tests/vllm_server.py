"""Real vLLM servers of tiny models, started once and shared by the tests that push weights."""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.hf import write_checkpoint

ROWS, VOCAB = 203, 200  # of config.json's tables; of the tokenizer, and of the servers
LONGEST = 128
_OPTIONS = f"""
--host 127.0.0.1 --enable-scale-out --load-format dummy --hf-overrides {{"vocab_size":{VOCAB}}}
--weight-transfer-config {{"backend":"megatron_opd"}}
--worker-extension-cls megatron_opd.rollout.vllm_worker.Extension
--logprobs-mode processed_logprobs --max-logprobs -1 --dtype float32 --max-model-len {LONGEST}
--enforce-eager --kv-cache-memory-bytes 67108864 --skip-tokenizer-init --generation-config vllm
--disable-uvicorn-access-log
"""
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Running:
    """A server, and the checkpoint whose model it has (but not its weights)."""

    url: str
    folder: Path
    process: subprocess.Popen

    def kill(self) -> None:
        """Kill the server; its engine is asked to go, which gives back its shared memory."""
        children = psutil.Process(self.process.pid).children()
        os.kill(self.process.pid, signal.SIGKILL)
        for child in children:
            child.terminate()


_HOME = tempfile.TemporaryDirectory(prefix="vllm_server_")
_RUNNING: dict[str, Running] = {}


def checkpoint(family: str, seed: int) -> Path:
    """Write a checkpoint of random weights."""
    folder = Path(tempfile.mkdtemp(prefix=f"{family}_{seed}_", dir=_HOME.name))
    return write_checkpoint(folder, family, head_dim=32, vocab_size=ROWS, seed=seed)


def vllm_server(family: str) -> Running:
    """Return the server of a model family when it answers; start it if there is none."""
    start(family)
    _wait(_RUNNING[family])
    return _RUNNING[family]


def start(*families: str) -> None:
    """Start servers, several at once, that are stopped when Python ends."""
    for family in families:
        if family not in _RUNNING or _RUNNING[family].process.poll() is not None:
            _RUNNING[family] = _start(family)
            atexit.register(_stop, _RUNNING[family])


def _start(family: str) -> Running:
    folder, port = checkpoint(family, seed=0), _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--port", str(port), *_OPTIONS.split()]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(f"http://127.0.0.1:{port}", folder, process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(running: Running, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and running.process.poll() is None:
        try:
            if httpx.get(f"{running.url}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{(running.folder / 'log.txt').read_text()[-3000:]}")


def _stop(running: Running, seconds: float = 20.0) -> None:
    """Ask the server to go; kill what is left of it after a while."""
    running.process.terminate()
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):  # no process of its group is there any more
        while time.monotonic() < deadline:
            running.process.poll()
            os.killpg(running.process.pid, 0)
            time.sleep(0.1)
        os.killpg(running.process.pid, signal.SIGKILL)
