"""Which layouts fit into a GPU's memory, and which of them would be fastest."""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_opd import build, memory
from megatron_opd.config import Config, Mesh
from megatron_opd.config_file import checked
from megatron_opd.memory.share import WIDTH
from megatron_opd.model import architecture
from megatron_opd.planner.layout import Layout
from megatron_opd.planner.machine import Achieved, Gpu
from megatron_opd.planner.network import Network
from megatron_opd.planner.setting import Judge, Phase, Setting
from megatron_opd.planner.times import phases, score
from megatron_opd.preflight.models import check_networks

DEEPEST, MOST_CONTEXT, MOST_CHUNKS = 16, 8, 4  # pp, cp and vpp that are tried


@dataclass(frozen=True)
class Candidate:
    """A layout that a run could have, with its teachers' and what it would take."""

    layout: Layout
    judging: Layout
    phases: dict[str, Phase]
    memory: float  # bytes of the fullest rank

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())


def setting(
    config: Config,
    gpu: Gpu,
    achieved: Achieved,
    *,
    ranks: int,
    per_node: int = 8,
    prompt: int | None = None,
    response: int | None = None,
) -> Setting:
    """Read the models' config.json and put together what is planned.

    `prompt`, `response`: tokens of each; None: as many as there may be.

    Raises:
        ValueError: one line.
    """
    objective, student = build.build_objective(config), config.student
    judges = {
        key: Judge(
            _network(key, config.folder(section), section.dtype or student.dtype),
            payload,
            section.offload,
        )
        for key, (section, payload) in build.judges(config, objective).items()
    }
    return Setting(
        config=config,
        gpu=gpu,
        achieved=achieved,
        ranks=ranks,
        per_node=per_node,
        prompt=prompt or config.data.max_prompt_tokens,
        response=response or config.rollout.max_tokens,
        objective=objective,
        student=_network("student", student.path, student.dtype),
        judges=judges,
    )


def _network(key: str, path: str, dtype: str) -> Network:
    if dtype != "bfloat16":
        raise ValueError(f"{key}.dtype: got {dtype}, expected bfloat16, of which the rates are")
    return Network(architecture(Path(path)), Layout(), WIDTH[dtype])


def layouts(setting: Setting) -> Iterator[Layout]:
    """Yield the layouts of so many ranks whose axes are powers of two, or divide the layers."""
    arch, ranks = setting.student.arch, setting.ranks
    deep = [n for n in range(1, DEEPEST + 1) if ranks % n == 0 and arch.layers % n == 0]
    experts = arch.experts.count if arch.experts else 1
    for tp in _powers(setting.per_node, ranks):
        for pp in deep:
            chunks = [n for n in _powers(MOST_CHUNKS) if arch.layers % (pp * n) == 0]
            for cp in _powers(MOST_CONTEXT, ranks // pp // tp):
                if ranks % (tp * pp * cp):
                    continue
                for ep in [n for n in _powers(experts) if experts % n == 0]:
                    for vpp in chunks if pp > 1 else [1]:
                        etp = 1 if arch.experts else tp  # experts are small: dealt out, not cut
                        yield Layout(tp, pp, vpp, cp, ep, etp, ranks // (tp * pp * cp), tp > 1)


def _powers(most: int, ranks: int | None = None) -> list[int]:
    most = most if ranks is None else min(most, ranks)
    return [2**n for n in range(max(most, 1).bit_length()) if 2**n <= most]


def meshes(setting: Setting) -> Iterator[Layout]:
    """Yield the meshes that the judges could have of their own."""
    for tp in _powers(setting.per_node, setting.ranks):
        for pp in _powers(DEEPEST, setting.ranks // tp):
            if setting.ranks % (tp * pp) == 0:
                for ep in _powers(_fewest_experts(setting), setting.ranks // pp):
                    etp = tp if _fewest_experts(setting) == 1 else 1
                    yield Layout(tp, pp, 1, 1, ep, etp, setting.ranks // (tp * pp), tp > 1)


def _fewest_experts(setting: Setting) -> int:
    """Return how many experts each judge has at least; 1 where one of them is dense."""
    found = [judge.network.arch.experts for judge in setting.judges.values()]
    return min((experts.count if experts else 1 for experts in found), default=1)


def with_layout(config: Config, layout: Layout, judging: Layout) -> Config:
    """Return the config at another layout, with everything that is checked of it checked.

    Raises:
        ValueError: one line.
    """
    tree = config.model_dump(mode="json")
    tree["parallel"] |= {"cp": layout.cp, **_axes(layout)}
    for judge in [tree["teacher"], tree["base"], *tree["teachers"].values()]:
        if judge is not None:
            judge["parallel"] = None if judging == layout else _axes(judging)
    return checked(tree)


def _axes(layout: Layout) -> dict[str, int | bool | None]:
    axes = {name: getattr(layout, name) for name in Mesh.model_fields}
    return axes | {"etp": None if layout.etp == layout.tp else layout.etp}


def refusal(setting: Setting, layout: Layout, judging: Layout) -> str | None:
    """Return why a run cannot have a layout, whatever the memory; None: it can."""
    steps, tokens = setting.config.train, setting.sequence
    if layout.world != setting.ranks:
        return f"{layout.replica} ranks a replica do not divide {setting.ranks} ranks"
    if layout.dp * layout.cp * layout.tp % (layout.ep * layout.etp):
        return f"ep {layout.ep} × etp {layout.etp} do not divide the ranks of a stage"
    if steps.prompts_per_step % layout.dp:
        return f"train.prompts_per_step={steps.prompts_per_step} is no multiple of dp {layout.dp}"
    if tokens > steps.microbatch_tokens:
        return f"a sequence of {tokens} tokens does not fit train.microbatch_tokens"
    try:
        check_networks(with_layout(setting.config, layout, judging))
    except ValueError as problem:
        return " ".join(str(problem).split())
    return None


def bytes_needed(setting: Setting, layout: Layout, judging: Layout) -> tuple[float, memory.Memory]:
    """Return the bytes of the fullest rank, and what they are for."""
    config = with_layout(setting.config, layout, judging)
    judges = build.judges(config, setting.objective)
    parts = memory.estimate(config, setting.objective, judges, layout.dp)
    return memory.peak(parts), parts


def candidates(setting: Setting) -> Iterator[Candidate]:
    """Yield the layouts that fit, the fastest first, each with the best mesh of the judges.

    What judges on a mesh of their own send back is counted when nothing else can be faster.
    """
    room = setting.gpu.memory * setting.achieved.memory
    number, queue, done = itertools.count(), [], set()
    own = {mesh: score(setting, mesh) for mesh in meshes(setting)} if setting.judges else {}
    for layout in layouts(setting):
        left = room - _student_bytes(setting, layout, room)
        if left < 0:
            continue
        rest = phases(setting, layout, layout)
        fixed = sum(phase.seconds for name, phase in rest.items() if name != "score")
        for judging, read in (own | {layout: rest["score"]}).items():
            if _judge_bytes(setting, judging) <= left:
                queue.append((fixed + read.seconds, next(number), layout, judging, None))
    heapq.heapify(queue)
    while queue:
        _, _, layout, judging, took = heapq.heappop(queue)
        if layout in done or refusal(setting, layout, judging) is not None:
            continue
        if took is None:
            took = phases(setting, layout, judging)
            total = sum(phase.seconds for phase in took.values())
            heapq.heappush(queue, (total, next(number), layout, judging, took))
            continue
        needed, _ = bytes_needed(setting, layout, judging)
        if needed <= room:
            done.add(layout)
            yield Candidate(layout, judging, took, needed)


def _student_bytes(setting: Setting, layout: Layout, room: float) -> float:
    """Return what a layout needs without judges, or at least; infinity where it is refused."""
    optimizer, student = setting.config.optimizer, setting.student.at(layout)
    shared = layout.ranks("dp_cp") if optimizer.distributed else 1
    states = 0 if optimizer.offload else 4 + 12 / shared
    least = student.parameters(0) * (student.width + states)
    if least > room:
        return least
    if refusal(setting, layout, layout) is not None:
        return math.inf
    config = with_layout(setting.config, layout, layout)
    return memory.peak(memory.estimate(config, setting.objective, {}, layout.dp))


def _judge_bytes(setting: Setting, judging: Layout) -> float:
    """Return the bytes of the judges' weights that are always there, at least."""
    kept = [judge.network.at(judging) for judge in setting.judges.values() if not judge.offload]
    return sum(min(n.parameters(stage) for stage in range(judging.pp)) * n.width for n in kept)
