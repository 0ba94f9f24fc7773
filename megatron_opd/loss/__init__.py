"""The loss: support × divergence × weight, over a vocabulary that ranks share."""

from megatron_opd.loss.engine import Loss
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.summary import summarize
from megatron_opd.loss.total import Total

__all__ = ["Loss", "Objective", "Total", "summarize"]
