"""The loss: support × divergence, vocabulary-parallel mathematics, and a head fused in chunks."""

from megatron_opd.loss.objective import Loss, Objective
from megatron_opd.loss.shard import VocabShard

__all__ = ["Loss", "Objective", "VocabShard"]
