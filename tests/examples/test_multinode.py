"""Two nodes on this machine: two torchrun agents that meet at an address, through the script."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_opd import train
from megatron_opd.config_file import load_config
from tests.distributed import run_ranks
from tests.test_train import make_home, records

FOLDER = Path(__file__).parents[2] / "examples/multinode"
WORDS = ["eval.prompts=[]", "eval.every=0", "run.save_every=0", "run.tensorboard=false"]
WORDS += ["optimizer.warmup_steps=0"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_home(tmp_path)


def environment(**words: str) -> dict[str, str]:
    """Return the environment of a node: this Python's torchrun, one thread a rank."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    source = str(Path(__file__).parents[2])
    return {**os.environ, "PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **words}


def start(node: int, head: str, *words: str) -> subprocess.Popen:
    """Start one of two nodes of one rank."""
    return subprocess.Popen(
        [FOLDER / "node.sh", "config.yaml", *WORDS, *words],
        env=environment(NODES="2", NODE=str(node), HEAD=head, RANKS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(node: subprocess.Popen) -> list[int]:
    """Return the processes that a node's torchrun has started."""
    with suppress(FileNotFoundError):
        return [
            int(pid)
            for pid in Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
        ]
    return []


def stop(node: subprocess.Popen) -> None:
    for pid in [*ranks_of(node), node.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def free_address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def _main(rank, words):
    train.main(load_config(["config.yaml"], words))


def test_two_nodes_do_what_one_does(home):
    head = free_address()
    nodes = [start(node, head, "train.steps=2", "run.dir=runs/two") for node in (1, 0)]
    try:
        told = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            stop(node)
    assert [node.returncode for node in nodes] == [0, 0], told
    run_ranks(_main, 2, [*WORDS, "train.steps=2", "run.dir=runs/one"])
    assert records(Path("runs/two")) == records(Path("runs/one"))


def test_a_node_that_fails_ends_the_other(home):
    head = free_address()
    nodes = [start(node, head, "train.steps=1000", "run.dir=runs/two") for node in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while not Path("runs/two/metrics.jsonl").exists():
            assert time.monotonic() < deadline and nodes[0].poll() is None
            time.sleep(0.1)
        (rank,) = ranks_of(nodes[1])
        os.kill(rank, signal.SIGKILL)
        told = [node.communicate(timeout=60)[0] for node in nodes]
        assert all(node.returncode > 0 for node in nodes), told
    finally:
        for node in nodes:
            stop(node)


@pytest.mark.parametrize(
    "words, told",
    [
        ({}, "NODES: how many nodes there are"),
        ({"NODES": "2"}, "NODE: which of them this is"),
        ({"NODES": "2", "NODE": "0"}, "HEAD: address:port of node 0"),
        ({"NODES": "2", "NODE": "2", "HEAD": "h:1"}, "NODE: got 2, expected 0 to 1"),
    ],
    ids=["nodes", "node", "head", "range"],
)
def test_what_is_missing_is_said(words, told):
    known = {k: v for k, v in environment().items() if k not in ("NODES", "NODE", "HEAD")}
    script = [FOLDER / "node.sh", "config.yaml"]
    answer = subprocess.run(script, env=known | words, capture_output=True, text=True)
    assert answer.returncode and told in answer.stderr


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.s*")), ids=lambda path: path.name)
def test_a_script_has_at_most_twenty_lines(path):
    assert len(path.read_text().splitlines()) <= 20
