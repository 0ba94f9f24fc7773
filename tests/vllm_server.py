"""Real vLLM servers of tiny models, started once and shared by the tests that push weights."""

import atexit
import contextlib
import json
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
--host 127.0.0.1 --enable-scale-out --logprobs-mode processed_logprobs --max-logprobs -1
--dtype float32 --max-model-len {LONGEST} --enforce-eager --kv-cache-memory-bytes 67108864
--skip-tokenizer-init --generation-config vllm --disable-uvicorn-access-log
"""
_OF_A_STUDENT = """
--load-format dummy --weight-transfer-config {"backend":"megatron_opd"}
--worker-extension-cls megatron_opd.rollout.vllm_worker.Extension
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
    log: Path

    def wait(self, seconds: float = 240.0) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Kill the server; its engine is asked to go, which gives back its shared memory."""
        children = psutil.Process(self.process.pid).children()
        os.kill(self.process.pid, signal.SIGKILL)
        for child in children:
            child.terminate()

    def stop(self, seconds: float = 20.0) -> None:
        """Ask the server to go; kill what is left of it after a while."""
        self.process.terminate()
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):  # no process of its group is there any more
            while time.monotonic() < deadline:
                self.process.poll()
                os.killpg(self.process.pid, 0)
                time.sleep(0.1)
            os.killpg(self.process.pid, signal.SIGKILL)


_HOME = tempfile.TemporaryDirectory(prefix="vllm_server_")
_RUNNING: dict[str, Running] = {}


def checkpoint(family: str, seed: int) -> Path:
    """Write a checkpoint of random weights."""
    folder = Path(tempfile.mkdtemp(prefix=f"{family}_{seed}_", dir=_HOME.name))
    return write_checkpoint(folder, family, head_dim=32, vocab_size=ROWS, seed=seed)


def vllm_server(family: str) -> Running:
    """Return the server of a model family when it answers; start it if there is none."""
    start(family)
    _RUNNING[family].wait()
    return _RUNNING[family]


def start(*families: str) -> None:
    """Start servers, several at once, that are stopped when Python ends."""
    for family in families:
        if family not in _RUNNING or _RUNNING[family].process.poll() is not None:
            _RUNNING[family] = serve(checkpoint(family, seed=0), VOCAB)


def serve(folder: Path, ids: int, *, student: bool = True) -> Running:
    """Start a server of `ids` token ids that is stopped when Python ends.

    A student's is given its weights; any other has those of the folder.
    """
    port, log = _free_port(), Path(tempfile.mkstemp(".log", dir=_HOME.name)[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--port", str(port), *_OPTIONS.split()]
    if student:
        command += [*_OF_A_STUDENT.split(), "--hf-overrides", json.dumps({"vocab_size": ids})]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    running = Running(f"http://127.0.0.1:{port}", folder, process, log)
    atexit.register(running.stop)
    return running


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
