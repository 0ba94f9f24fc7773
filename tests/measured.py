"""What a step really allocates on a rank, phase by phase: the profiler sees every allocation."""

import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_opd import build
from megatron_opd import parallel as mesh
from megatron_opd.balance import rounds
from megatron_opd.model import architecture
from megatron_opd.packing import pack
from megatron_opd.rollout import Sampling
from megatron_opd.step import train_step
from megatron_opd.zigzag import part_of


def peaks(rank, config, prompts, rollouts):
    """Take a step, and return phase → the most bytes that are allocated at a time in it.

    Another step comes before, as Adam's means are made by the first. Responses end after a token:
    the cache has its whole length all the same.
    """
    others = _live()  # the parent's
    layout = config.parallel.model_dump()
    parallel = mesh.initialize(layout.pop("tp"), layout.pop("pp"), **layout)
    vocab = architecture(config.student.path).vocab_rows
    student = build.build_student(config, parallel, vocab_size=vocab, steps=4)
    objective = build.build_objective(config)
    judges = build.build_judges(config, objective, student)
    engine = build.drawing_engine(config, student.model, parallel, vocab)
    mine = slice(parallel.dp_rank, None, parallel.dp)
    first = _packed(config, parallel, rollouts[mine][:2])
    train_step(student, first, judges.score(first), objective)
    batches = _packed(config, parallel, rollouts[mine])
    sampling = Sampling(config.rollout.max_tokens, stop_ids=tuple(range(vocab)))
    live: dict[str, int] = {}
    with _profiled() as events:
        with _phase("rollout", live):
            engine.generate(prompts[mine], n=config.rollout.n, sampling=sampling, seed=0)
        with _phase("score", live):
            judgements = judges.score(batches)
        with _phase("train", live):
            train_step(student, batches, judgements, objective)
    return {phase: live[phase] - others + more for phase, more in _growth(events).items()}


def allocated(function) -> int:
    """Run `function` and return the most bytes that torch had allocated for it at a time."""
    with _profiled() as events, torch.profiler.record_function("phase:it"):
        function()
    return _growth(events)["it"]


def _packed(config, parallel, rollouts):
    """Return microbatches as `Job.pack` makes them."""
    limit, cp = config.train.microbatch_tokens, parallel.cp
    multiple = parallel.tp if parallel.sequence_parallel else 1
    how = dict(microbatch_tokens=limit, multiple=multiple, cp=cp)
    how |= dict(measure_fraction=config.metrics.token_fraction)
    return [
        part_of(batch, size=cp, rank=parallel.cp_rank, group=parallel.cp_group)
        for own, count in rounds(rollouts, limit, parallel)
        for batch in pack(own, count=count, **how)
    ]


@contextmanager
def _profiled() -> Iterator[list[dict]]:
    """Fill the list with the events of a trace, in the order of time."""
    events: list[dict] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield events
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        found = json.loads(path.read_text())["traceEvents"]
    events += sorted((e for e in found if "ts" in e), key=lambda e: e["ts"])


@contextmanager
def _phase(name: str, live: dict[str, int]) -> Iterator[None]:
    """Name a phase in the profile, and count what is there at its start.

    The profile does not: what another thread frees, gloo's say, it goes on counting.
    """
    live[name] = _live()
    with torch.profiler.record_function(f"phase:{name}"):
        yield


def _live() -> int:
    """Return the bytes of all tensors that Python knows."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _growth(events: list[dict]) -> dict[str, int]:
    """Return how many more bytes than at its start are allocated in each phase, at most."""
    found = {}
    for phase in (e for e in events if e["name"].startswith("phase:")):
        start, stop = phase["ts"], phase["ts"] + phase["dur"]
        memory = [e for e in events if e["name"] == "[memory]" and start <= e["ts"] <= stop]
        totals = [event["args"]["Total Allocated"] for event in memory]
        before = totals[0] - memory[0]["args"]["Bytes"]
        found[phase["name"].removeprefix("phase:")] = max(totals) - before
    return found
