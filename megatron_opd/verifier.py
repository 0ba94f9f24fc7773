r"""Are two answers the same mathematics? The `math-verify` library says, in a process of its own.

A response may hold anything, `9^{9^{9^9}}` too, and no Python process can stop itself in the midst
of such a power: the library's own limits are alarms, which wait for the operation to end, and work
in the main thread only. The process that judges may spend `CPU_SECONDS` on one question; the system
ends it when it spends more, the answer counts as wrong, a line says so, and the next question
starts another. Processor time, and hashes without a seed: a busy machine judges as an idle one.
"""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

log = logging.getLogger("megatron_opd")
CPU_SECONDS = 5.0  # of one question; all but one in a thousand take less than a tenth
MEMORY_BYTES = 4 * 2**30


class Verifier:
    """The client of one judging process; any thread may ask."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS):
        self.cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def same(self, expected: str, given: str) -> bool:
        """Say whether `given`, in LaTeX or plain, equals `expected`.

        Raises:
            RuntimeError: the process cannot be started.
        """
        with self._turn:
            process = self._process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([expected, given]) + "\n")
                process.stdin.flush()
                said = process.stdout.readline()
            except BrokenPipeError:
                said = ""
            if not said:
                self._give_up(process, expected, given)
            return said == "true\n"

    def _start(self) -> "subprocess.Popen[str]":
        # -P: a file in the working directory must not pass for one of the libraries
        command = [sys.executable, "-P", "-m", __name__, str(self.cpu_seconds)]
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"},
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"'{' '.join(command)}' does not start; is math-verify installed?")
        return process

    def _give_up(self, process: "subprocess.Popen[str]", expected: str, given: str) -> None:
        code, self._process = process.wait(), None
        slow = code == -signal.SIGPROF
        why = f"took more than {self.cpu_seconds:g} s" if slow else f"ended the process ({code})"
        log.warning("reward: comparing %.60r with %.60r %s; counted as wrong", given, expected, why)


_VERIFIERS: dict[int, Verifier] = {}  # by process: a fork must not talk into its parent's pipes


@lru_cache(maxsize=65536)
def same(expected: str, given: str) -> bool:
    """Ask this process's verifier."""
    return _VERIFIERS.setdefault(os.getpid(), Verifier()).same(expected, given)


def _serve(cpu_seconds: float) -> None:
    """Answer questions from stdin, a line each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks; then stdin ends
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # math-verify tells of every expression it cannot read
    answers, sys.stdout = sys.stdout, sys.stderr
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    forms = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def read(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", forms, parsing_timeout=0)

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # nobody handles SIGPROF: it ends us
        try:
            expected, given = json.loads(line)
            verdict = verify(read(expected), read(given), timeout_seconds=0)
        except (MemoryError, RecursionError):
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(verdict)), file=answers, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
