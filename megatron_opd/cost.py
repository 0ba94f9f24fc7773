"""What a rollout costs in a step: counted FLOPs of the student, and of the judges on our ranks.

A model's forward over a sequence of T tokens, of which N are targets, multiplies

    token · T + pair · T²/2 + target · N

token: the layers' matrices, those of the experts that a token comes to. pair: q·k, and the sum of
v; causal attention has T²/2 pairs. target: the head, where all its columns are multiplied. A few
columns, and what metrics look at, do not count.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatron_opd import config as cfg
from megatron_opd.loss import Objective, Total
from megatron_opd.model import architecture
from megatron_opd.planner.layout import Layout
from megatron_opd.planner.network import Network
from megatron_opd.types import Rollout


class Cost(NamedTuple):
    """FLOPs by token, by pair of tokens, and by target."""

    token: float
    pair: float
    target: float

    def __call__(self, tokens: int, targets: int) -> float:
        return self.token * tokens + self.pair * tokens**2 / 2 + self.target * targets


def of_network(path: str, *, layers: float, head: float) -> Cost:
    """Count so many passes through a network's layers, and so many through its whole head."""
    network = Network(architecture(path), Layout(), 1)
    flops = network.matrix_flops(0) * layers, network.attention_flops(0) * layers
    return Cost(*flops, network.head_flops() * head)


def of_rollouts(
    config: cfg.Config, objective: Objective | Total, judges: Mapping[str, tuple[cfg.Frozen, str]]
) -> Callable[[Rollout], float]:
    """Return what says of a rollout how many FLOPs it takes: forward, backward, its judges.

    `judges` are those on our ranks, by their keys, with their payloads. A backward costs twice its
    forward: gradients of the inputs, and of the weights. A judge on a mesh of its own takes
    microbatches of all replicas; of it, replicas only have the head that the loss multiplies out.
    """
    dense, listed = objective.over_vocabulary, "student_ids_CK" in objective.wants
    again = config.train.recompute == "full"
    student = of_network(config.student.path, layers=3 + again, head=3 if dense else listed)
    in_loss = dense or "teacher_ids_CK" in objective.wants
    asked, nothing = {}, Cost(0.0, 0.0, 0.0)
    for key, (section, payload) in judges.items():
        here = section.parallel is None
        head = in_loss if payload == "hidden" else here
        asked[key] = of_network(config.folder(section), layers=here, head=head)

    def cost(rollout: Rollout) -> float:
        prompt, targets = rollout.prompt, len(rollout.response_ids)
        tokens = len(prompt.token_ids) + targets - 1
        read = len(prompt.teacher_token_ids or prompt.token_ids) + targets - 1
        teacher = asked.get(cfg.key_of_teacher(prompt.teacher), nothing)
        base = asked.get("base", nothing)
        return student(tokens, targets) + teacher(read, targets) + base(tokens, targets)

    return cost
