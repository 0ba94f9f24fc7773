"""Seconds and bytes of each phase of a step at one layout, as if nothing overlapped.

Compute is counted operations over the GPU's rate; collectives are counted bytes over the link that
the ring goes through, plus a latency a call. All responses are of the planned length.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.planner import relayout, traffic
from megatron_opd.planner.layout import Layout
from megatron_opd.planner.network import Network
from megatron_opd.planner.rollouts import rollout, sync
from megatron_opd.planner.setting import Phase, Setting, exchange, joined
from megatron_opd.planner.traffic import Load

STATES = 12  # bytes a parameter: two means and the main weight
UPDATE = 30  # bytes a parameter: gradient, two means and main weight read, three of them written
PHASES = ("rollout", "score", "train", "sync")
BACKWARD = {"matrix": 2.0, "pair": 2.5}  # of the forward; attention's scores are computed again


def phases(setting: Setting, layout: Layout, judging: Layout) -> dict[str, Phase]:
    """Return the phases of a step of the student at `layout`, its judges at `judging`."""
    read = [score(setting, judging), payload(setting, layout, judging)]
    return {
        "rollout": rollout(setting, layout),
        "score": joined(read),
        "train": train(setting, layout),
        "sync": sync(setting, layout),
    }


def score(setting: Setting, judging: Layout) -> Phase:
    """Run the judges forward: a sample has one teacher, and perhaps a base."""
    load, teachers, bases = setting.load(judging), [], []
    for key, judge in setting.judges.items():
        network, found = judge.network.at(judging), []
        for stage in ends(judging):
            compute = _forward(setting, network, stage, load) / setting.rate("score")
            moved = exchange(setting, judging, traffic.score(network, load, stage))
            phase = _with_bubble(compute, moved, judging, load)
            if judge.offload:
                fetched = network.parameters(stage) * network.width / setting.rate("host")
                phase = replace(phase, parts=phase.parts | {"host": fetched})
            found.append(phase)
        (bases if key == "base" else teachers).append(max(found, key=_seconds))
    return joined([max(some, key=_seconds) for some in (teachers, bases) if some])


def payload(setting: Setting, layout: Layout, judging: Layout) -> Phase:
    """Move ids to judges on another mesh, and what they say of each token back.

    Replicas of the judges send about as much: it is the first one's rank that sends most.
    """
    if judging == layout:
        return Phase({})
    speaker, load, k = (
        judging.world - judging.world // judging.pp,
        setting.load(layout),
        setting.objective.k,
    )
    flows = []
    for judge, kind, _ in setting.judges.values():
        row = {"hidden": judge.arch.hidden * judge.width, "topk": 8 * k, "sampled": 4}[kind]
        ranks = range(speaker, speaker + judging.tp)
        sent = [relayout.sent(layout, judging, load, row, rank) for rank in ranks]
        flows.append(max(sent, key=lambda flow: flow.size))
    return exchange(setting, layout, traffic.total(flows))


def _seconds(phase: Phase) -> float:
    return phase.seconds


def train(setting: Setting, layout: Layout) -> Phase:
    """Forward and backward of the student and the loss, the gradients' exchange, the update."""
    student, load = setting.student.at(layout), setting.load(layout)
    train_section, optimizer = setting.config.train, setting.config.optimizer
    hidden = sum(judge.payload == "hidden" for judge in setting.judges.values())
    again, found = train_section.recompute == "full", []
    for stage in ends(layout):
        ops = _forward(setting, student, stage, load, backward=True, again=again)
        if stage == layout.pp - 1:
            ops += _heads(setting, layout, load)
        flows = traffic.train(
            student,
            setting.objective,
            min(hidden, 1),
            load,
            stage,
            recompute=again,
            distributed=optimizer.distributed,
        )
        phase = _with_bubble(
            ops / setting.rate("train"), exchange(setting, layout, flows), layout, load
        )
        updated = student.parameters(stage) / (
            layout.ranks("dp_cp") if optimizer.distributed else 1
        )
        parts = phase.parts | {"update": updated * UPDATE / setting.rate("hbm")}
        if optimizer.offload:
            parts["host"] = 2 * updated * STATES / setting.rate("host")
        found.append(replace(phase, parts=parts))
    return max(found, key=_seconds)


def ends(layout: Layout) -> Sequence[int]:
    """Return the pipeline stages that others are like: first, second, last."""
    return sorted({0, min(1, layout.pp - 1), layout.pp - 1})


def _forward(
    setting: Setting,
    network: Network,
    stage: int,
    load: Load,
    *,
    backward: bool = False,
    again: bool = False,
) -> float:
    """Return the operations of a stage's layers; causal attention has half of all pairs."""
    matrix = load.tokens * network.matrix_flops(stage)
    pairs = network.attention_flops(stage) * load.tokens * setting.sequence / 2
    passes = {what: 1 + again + BACKWARD[what] * backward for what in BACKWARD}
    return matrix * passes["matrix"] + pairs * passes["pair"]


def _heads(setting: Setting, layout: Layout, load: Load) -> float:
    """Return the operations of the loss: whole heads, where it makes all logits of a model."""
    o = setting.objective
    once = 3.0 if o.over_vocabulary else float("student_ids_CK" in o.wants)
    asks = o.over_vocabulary or "teacher_ids_CK" in o.wants
    total = load.supervised * once * setting.student.at(layout).head_flops()
    for judge in setting.judges.values():
        if judge.payload == "hidden":
            head = judge.network.at(layout).head_flops()
            total += (load.supervised * asks + load.measured) * head
    return total + load.measured * setting.student.at(layout).head_flops()


def _with_bubble(compute: float, moved: Phase, layout: Layout, load: Load) -> Phase:
    """Add what a pipeline stage waits for the others at both ends of a step."""
    waits = (layout.pp - 1) / (layout.vpp * load.microbatches)
    parts = {"compute": compute, **moved.parts}
    if layout.pp > 1:
        parts["wait"] = waits * (compute + moved.parts.get("tp", 0.0))
    return replace(moved, parts=parts)
