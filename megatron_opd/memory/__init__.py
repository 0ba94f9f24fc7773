"""How many bytes a run needs on its fullest rank: arithmetic on config.json, nothing is allocated.

Counted are weights, gradients, optimizer states, what autograd keeps, one layer at work, the chunks
of the loss, the caches and what judges send. Not counted: what NCCL and the CUDA context hold, and
what the allocator cannot reuse. The layers are the portable ones: Transformer Engine's keep less.
"""

from megatron_opd.memory.estimate import Judges, Memory, estimate, peak
from megatron_opd.memory.share import count_parameters

__all__ = ["Judges", "Memory", "count_parameters", "estimate", "peak"]
