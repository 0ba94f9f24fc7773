"""What the planner says: for people, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_opd.planner.layout import Layout
from megatron_opd.planner.machine import GB, GIB
from megatron_opd.planner.rollouts import ELSEWHERE
from megatron_opd.planner.search import Candidate, bytes_needed, refusal
from megatron_opd.planner.setting import Phase, Setting
from megatron_opd.planner.times import PHASES, phases
from megatron_opd.tables import markdown


def heading(setting: Setting) -> str:
    """Say what is planned, and what is assumed of the GPUs."""
    config, gpu, got = setting.config, setting.gpu, setting.achieved
    models = {"student": setting.student} | {
        key: judge.network for key, judge in setting.judges.items()
    }
    engine = config.rollout.engine
    lines = [f"{name:<8}  {net.bytes / net.width / 1e9:.2f} B" for name, net in models.items()]
    lines += [
        f"step      {setting.sequences:,} sequences of {setting.prompt:,} + {setting.response:,} "
        f"tokens, engine {engine}, microbatches of {config.train.microbatch_tokens:,} tokens",
        f"ranks     {setting.ranks}, {setting.per_node} a node: {gpu.flops / 1e12:,.0f} TFLOP/s, "
        f"{gpu.memory / GB:,.0f} GB at {gpu.hbm / 1e12:.2f} TB/s; NVLink {gpu.nvlink / GB:,.0f}, "
        f"network {gpu.network / GB:,.0f} GB/s",
        f"assumed   of these rates: train {got.train:g}, score {got.score:g}, prefill "
        f"{got.prefill:g}, hbm {got.hbm:g}, link {got.link:g}; memory {got.memory:g}; "
        f"{got.latency_s * 1e6:g} µs a call",
    ]
    if engine in ELSEWHERE:
        lines.append(f"note: nothing is counted for the rollouts of engine {engine}")
    return "\n".join(lines)


def comparison(found: Sequence[Candidate]) -> str:
    """Return the table of layouts: seconds of each phase, and GB that leave a rank in it."""
    columns = ["layout", "teacher", "GiB", "s a step", *PHASES]
    rows = []
    for candidate in found:
        own = candidate.judging == candidate.layout
        judging = "the same" if own else str(candidate.judging)
        told = [_told(candidate.phases[name]) for name in PHASES]
        needed = f"{candidate.memory / GIB:.1f}"
        rows.append([str(candidate.layout), judging, needed, f"{candidate.seconds:.1f}", *told])
    return markdown(columns, rows) + "\n\nphases: seconds (GB that leave a rank)"


def _told(phase: Phase) -> str:
    return f"{phase.seconds:.2f} ({phase.sent / GB:.1f})"


def explanation(setting: Setting, layout: Layout, judging: Layout) -> str:
    """Say why a layout cannot be had; or what it needs, and where its time goes."""
    why = refusal(setting, layout, judging)
    if why is not None:
        return f"{layout}: {why}"
    needed, parts = bytes_needed(setting, layout, judging)
    room = setting.gpu.memory * setting.achieved.memory
    verdict = "fits" if needed <= room else "does not fit"
    lines = [f"{layout}: {verdict}, {needed / GIB:.1f} of {room / GIB:.1f} GiB"]
    for phase, own in parts.items():
        lines += [f"  {phase:<8}  {what:<30} {size / GIB:8.2f} GiB" for what, size in own.items()]
    for name, phase in phases(setting, layout, judging).items():
        spent = ", ".join(f"{what} {seconds:.2f}" for what, seconds in phase.parts.items())
        lines.append(f"  {name:<8}  {phase.seconds:.2f} s: {spent or 'nothing'}")
        lines += [
            f"{'':<12}{flow.axis} {flow.kind}: {flow.size / GB:.2f} GB in {flow.calls:,.0f} calls"
            for flow in phase.flows
            if flow.size >= GB / 100
        ]
    return "\n".join(lines)


def as_json(setting: Setting, found: Sequence[Candidate]) -> dict[str, Any]:
    """Return everything that the table is made of, in bytes and seconds."""
    return {
        "gpu": asdict(setting.gpu),
        "assumed": asdict(setting.achieved),
        "ranks": setting.ranks,
        "prompt": setting.prompt,
        "response": setting.response,
        "layouts": [
            {
                "layout": asdict(candidate.layout),
                "teacher": asdict(candidate.judging),
                "memory": candidate.memory,
                "seconds": candidate.seconds,
                "phases": {
                    name: {
                        "seconds": phase.parts,
                        "sent": phase.sent,
                        "flows": [asdict(flow) for flow in phase.flows],
                    }
                    for name, phase in candidate.phases.items()
                },
            }
            for candidate in found
        ],
    }
