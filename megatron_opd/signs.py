"""What tells a distillation that works from one that does not: thresholds, and where they are from.

*Paper* is "Rethinking On-Policy Distillation" (2604.13016). Its figures are of models with 150,000
tokens, k = 16 and responses of thousands of tokens. Everything else is judgement, and says so: it
is set so that the paper's good runs pass, and that noise does not warn.
"""

import math

# Paper: the overlap ratio of good runs goes from 0.72 to 0.91. Judgement: 0.60 is as far below
# their start as a few dozen rollouts can tell; below 0.45, more than half of what the student finds
# likely is foreign to the teacher, and the paper's failing pairs stay flat.
OVERLAP_LOW, OVERLAP_FAILING, OVERLAP_DONE = 0.60, 0.45, 0.85
# Paper: 0.97 to 0.99 of both models' probability is on the overlap in good runs. Judgement: the
# rest, for a student that starts weak.
MASS_GOOD, MASS_LOW, MASS_FAILING = 0.97, 0.90, 0.75
# Judgement: where k is more than this share of the vocabulary, a top-k set is mostly tokens of
# negligible probability, and chance alone makes an overlap of k / V: only the masses say something.
WIDE_SUPPORT = 0.05
# Judgement: of ln V, the entropy of a model that knows nothing, and its loss on real text. Trained
# models are below a quarter of it.
UNIFORM, UNINFORMED = 0.95, 0.90
# Judgement: bfloat16 differs by 1e-4 to 1e-3 nats (k3) between engine and trainer; a stale weight,
# by more than 0.1 at once.
MISMATCH_HIGH, MISMATCH_FAILING = 1e-2, 1e-1


def prefers_nothing(entropy: float, vocab_size: int) -> bool:
    """Say whether an entropy in nats is that of a model which hardly prefers any token."""
    return entropy > UNIFORM * math.log(vocab_size)


def ratio_counts(k: int, vocab_size: int) -> bool:
    """Say whether the overlap of top-k sets means something, or only the mass on it does."""
    return k <= WIDE_SUPPORT * vocab_size
