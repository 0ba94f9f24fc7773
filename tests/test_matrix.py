"""The matrix: every network × every layout × every kind of support is what one process gives.

Logits, loss, every gradient, and the weights after three steps. `python -m tests.test_matrix`
prints the table of the README: the worst figures of every cell.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.loss import Objective
from megatron_opd.model import enter_head, export_hf
from megatron_opd.model.pipeline import run_schedule
from megatron_opd.step import Student, train_step
from tests.distributed import run_ranks
from tests.layouts import Layout, pack_here
from tests.tiny import VOCAB, qwen3, qwen3_moe
from tests.training import ROLLOUTS, Setup, judgements, make

NETWORKS = {
    "dense": qwen3(),
    "tied": qwen3(tie_word_embeddings=True),
    "MoE": qwen3_moe(),
}
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, sp=True),
    Layout(cp=2),
    Layout(tp=2, cp=2),
    Layout(dp=2),
    Layout(ep=2, dp=2),
]
OBJECTIVES = {
    "student_topk": (Objective("student_topk", k=8, chunk_tokens=7), "hidden"),
    "teacher_topk": (
        Objective("teacher_topk", "forward_kl", k=8, normalize="vocab", tail=True),
        "topk",
    ),
    "full": (Objective("full", chunk_tokens=16), "hidden"),
}
STEPS = 3
LIMITS = {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-5, "weights": 1e-4}


def applies(network: str, layout: Layout) -> bool:
    """Say whether a cell is one of its own: without experts, EP2 × DP2 is DP2."""
    return network == "MoE" or layout.ep == 1


CELLS = [(n, layout) for n in NETWORKS for layout in LAYOUTS if applies(n, layout)]


@dataclass(frozen=True)
class Seen:
    """What a rank knows of a run."""

    logits: dict[tuple[int, int], Tensor]  # [V] by prompt and position, on the last stage
    losses: list[float]  # of each step
    gradients: dict[str, Tensor]  # of the first step, by Hugging Face name
    weights: dict[str, Tensor]  # after the last


def _run(rank, layout, network) -> dict[str, Seen]:
    parallel = layout.join()
    return {name: _steps(parallel, network, *chosen) for name, chosen in OBJECTIVES.items()}


def _steps(parallel, network, objective, payload) -> Seen:
    setup = Setup(objective, payload=payload, network=NETWORKS[network])
    student, teacher = make(setup, parallel)
    mine = ROLLOUTS[parallel.dp_rank :: parallel.dp]
    batches = pack_here(mine, parallel, microbatch_tokens=48, count=4 if parallel.vpp > 1 else None)
    logits, gradients, losses = _logits(student, batches), _catch_gradients(student), []
    for _ in range(STEPS):
        judged = judgements(objective, batches, parallel, teacher)
        metrics = train_step(student, batches, judged, objective)
        losses.append(metrics.reduce(None, parallel.device)["loss/objective"])
    return Seen(logits, losses, gradients[0], _whole(student))


def _whole(student: Student) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf(student.model, student.parallel)}


@torch.no_grad()
def _logits(student, batches) -> dict[tuple[int, int], Tensor]:
    """Return the student's logits at every supervised token of this rank's parts."""
    parallel = student.parallel

    def last_stage(index, hidden):
        batch = batches[index]
        hidden_NH = enter_head(hidden, parallel).index_select(0, batch.source_N)
        shard = hidden_NH @ student.model.head(VOCAB).weight_VH.T
        shards = [torch.empty_like(shard) for _ in range(parallel.tp)]
        dist.all_gather(shards, shard, group=parallel.tp_group)
        places = zip((batch.group_N >> 20).tolist(), batch.position_N.tolist(), strict=True)
        return dict(zip(places, torch.cat(shards, -1)[:, :VOCAB], strict=True))

    found = run_schedule(student.model, batches, last_stage, forward_only=True)
    return {place: row for of_batch in found for place, row in of_batch.items()}


def _catch_gradients(student: Student) -> list[dict[str, Tensor]]:
    """Note the whole gradients every time that the optimiser is about to read them."""
    caught, step = [], student.optimizer.step

    def catch():
        for chunk in student.ddp:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                _join_shards(buffer)
        kept = {p: p.data for p in student.model.parameters()}
        for parameter in kept:
            parameter.data = parameter.main_grad
        caught.append(_whole(student))
        for parameter, data in kept.items():
            parameter.data = data
        return step()

    student.optimizer.step = catch
    return caught


def _join_shards(buffer) -> None:
    """Put the sums together that the distributed optimiser leaves with one rank each."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        shards = list(bucket.grad_data.chunk(dist.get_world_size(group)))
        mine = shards[dist.get_rank(group)].clone()
        dist.all_gather(shards, mine, group=group)


@cache
def seen(network: str, layout: Layout) -> list[dict[str, Seen]]:
    # Megatron trains experts under tensor parallelism with sequence parallelism alone
    sp = layout.sp or (network == "MoE" and layout.tp > 1)
    return run_ranks(_run, layout.world, layout._replace(sp=sp), network)


def errors(network: str, layout: Layout, objective: str) -> dict[str, float]:
    """Return how far a cell is from one process: absolute, but relative for loss and gradients."""
    (reference,) = seen(network, Layout())
    one, ranks = reference[objective], [rank[objective] for rank in seen(network, layout)]
    logits = {place: row for rank in ranks for place, row in rank.logits.items()}
    assert logits.keys() == one.logits.keys()
    mine = ranks[0]
    assert mine.gradients.keys() == one.gradients.keys() == mine.weights.keys()
    return {
        "logits": max(float((row - one.logits[at]).abs().max()) for at, row in logits.items()),
        "loss": max(abs(a / b - 1) for a, b in zip(mine.losses, one.losses, strict=True)),
        "gradients": max(_relative(mine.gradients[name], g) for name, g in one.gradients.items()),
        "weights": max(float((mine.weights[n] - w).abs().max()) for n, w in one.weights.items()),
    }


def _relative(one: Tensor, other: Tensor) -> float:
    assert other.norm() > 0
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("network", "layout"), CELLS, ids=[f"{n}-{layout}" for n, layout in CELLS])
def test_matrix(network, layout, objective):
    found = errors(network, layout, objective)
    assert all(found[name] < limit for name, limit in LIMITS.items()), found


def table() -> str:
    """Return the worst figures of every network at every layout, as Markdown."""
    lines = [f"| | {' | '.join(NETWORKS)} |", "|---" * (1 + len(NETWORKS)) + "|"]
    for layout in LAYOUTS[1:]:
        cells = [_cell(network, layout) for network in NETWORKS]
        lines.append(f"| {layout} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(network: str, layout: Layout) -> str:
    if not applies(network, layout):
        return "–"
    found = [errors(network, layout, objective) for objective in OBJECTIVES]
    worst = {name: max(one[name] for one in found) for name in LIMITS}
    return " · ".join(f"{x:.0e}".replace("e-0", "e-") if x else "0" for x in worst.values())


def test_the_readme_has_the_matrix():
    """Its table has these rows, and no figure is above its limit."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*e-.*) \|$", text, re.M))
    for layout in LAYOUTS[1:]:
        cells = rows[str(layout)].split(" | ")
        assert [cell != "–" for cell in cells] == [applies(n, layout) for n in NETWORKS]
        for figures in (cell.split(" · ") for cell in cells if cell != "–"):
            for figure, limit in zip(figures, LIMITS.values(), strict=True):
                assert float(figure) < limit


if __name__ == "__main__":
    print(table())
