"""The loss: support × divergence × weight, over a vocabulary that ranks share."""

from megatron_opd.loss.engine import Loss
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.summary import summarize

__all__ = ["Loss", "Objective", "summarize"]
