"""Bytes that one rank hands to collectives in each phase of a step: arithmetic, checked by a test
against what real runs hand to gloo.

The size of an all-reduce or a broadcast is its tensor's; of an all-gather what it makes; of a
reduce-scatter, an all-to-all or a send what goes in. Shape suffixes: T packed tokens of this rank ·
N supervised ones · H hidden.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, lcm

from megatron_opd.loss import Objective, Total
from megatron_opd.model.hf_map import Weight
from megatron_opd.planner.network import Network

FLOAT, INT, LONG = 4, 4, 8  # bytes


@dataclass(frozen=True)
class Flow:
    """All collectives of one kind among the ranks of one axis, of one rank."""

    axis: str
    kind: str
    size: float  # bytes, of all calls together
    calls: float

    def sent(self, ranks: int) -> float:
        """Return the bytes that leave a rank when the collective runs around a ring."""
        share = (ranks - 1) / ranks
        return self.size * {"all_reduce": 2 * share, "send": 1.0, "broadcast": 1.0}.get(
            self.kind, share
        )


@dataclass(frozen=True)
class Load:
    """What one replica works on in one step, this rank's part of every sequence."""

    tokens: float  # packed
    supervised: float
    microbatches: int
    measured: float = 0.0  # supervised tokens that metrics look at


def total(flows: Iterable[Flow]) -> list[Flow]:
    """Return the flows with those of equal axis and kind added up; those of nothing left out."""
    sizes: dict[tuple[str, str], tuple[float, float]] = {}
    for flow in flows:
        size, calls = sizes.get((flow.axis, flow.kind), (0.0, 0.0))
        sizes[flow.axis, flow.kind] = size + flow.size, calls + flow.calls
    return [Flow(*key, *value) for key, value in sizes.items() if value[0]]


def train(
    student: Network,
    objective: Objective | Total,
    hidden_judges: int,
    load: Load,
    stage: int,
    *,
    recompute: bool = False,
    distributed: bool = True,
) -> list[Flow]:
    """Return what a rank of a stage moves in one optimizer step.

    Args:
        hidden_judges: frozen models whose heads the loss multiplies out.
        recompute: every layer's forward runs twice.
        distributed: the optimizer's states are shared out.
    """
    return _grouped(
        student,
        [
            *_layers(student, load, stage, backward=True, recompute=recompute),
            *_attention(student, load, stage, backward=True, recompute=recompute),
            *_experts(student, load, stage, backward=True, recompute=recompute),
            *_pipeline(student, load, stage, backward=True),
            *_loss(student, objective, hidden_judges, load, stage),
            *_gradients(student, stage, distributed),
        ],
    )


def score(teacher: Network, load: Load, stage: int) -> list[Flow]:
    """Return what a rank of a stage moves when a teacher of hidden states reads a step."""
    return _grouped(
        teacher,
        [
            *_layers(teacher, load, stage, backward=False),
            *_attention(teacher, load, stage, backward=False),
            *_experts(teacher, load, stage, backward=False),
            *_pipeline(teacher, load, stage, backward=False),
        ],
    )


def _grouped(network: Network, flows: Iterable[Flow]) -> list[Flow]:
    return total(flow for flow in flows if network.layout.ranks(flow.axis) > 1)


def _layers(
    network: Network, load: Load, stage: int, *, backward: bool, recompute: bool = False
) -> Iterator[Flow]:
    """Yield what tensor parallelism moves for embedding, layers and head of a stage.

    A block (attention; feed-forward) is a product cut by columns, then one cut by rows: an
    all-reduce of its output, and in the backward one of the gradient of its input. Sequence
    parallelism makes each an all-gather and a reduce-scatter, and gathers the input once more for
    the gradient of the weight.
    """
    hidden, passes = network.arch.hidden, 1 + recompute
    first, last = stage == 0, stage == network.layout.pp - 1
    enter, kept, entries = _inputs(network, stage)
    leave = _blocks(network, stage)
    if network.layout.sequence_parallel:
        gathered, gathers = passes * enter + last * hidden, passes * entries + last
        scattered, scatters = (passes * leave + first) * hidden, passes * leave + first
        if backward:
            gathered, gathers = gathered + kept + (leave + first) * hidden, gathers + 2 * leave
            scattered, scatters = scattered + enter + last * hidden, scatters + entries
        found = [("all_gather", gathered, gathers), ("reduce_scatter", scattered, scatters)]
    else:
        reduced = (passes * leave + first) * hidden + backward * (enter + last * hidden)
        found = [("all_reduce", reduced, passes * leave + first + backward * leave)]
    for kind, elements, calls in found:
        yield Flow("tp", kind, load.tokens * elements * network.width, calls * load.microbatches)


def _blocks(network: Network, stage: int) -> int:
    """Return the blocks of a stage that are cut over tensor-parallel ranks: not routed experts."""
    shares = bool(network.arch.experts and network.arch.experts.shared_ffn)
    return 2 * len(network.layers(stage)) - (1 - shares) * network.sparse_layers(stage)


def _inputs(network: Network, stage: int) -> tuple[int, int, int]:
    """Return the numbers a token that enter a stage's blocks, are kept for a backward, and in how
    many tensors.

    Latent attention is entered by the vectors that queries, keys and values are projected up from,
    and by the key that is rotated.
    """
    hidden, latent = network.arch.hidden, network.arch.latent
    layers, blocks = len(network.layers(stage)), _blocks(network, stage)
    if latent is None:
        return blocks * hidden, blocks * hidden, blocks
    kept = (blocks - layers) * hidden + layers * ((latent.q_rank or hidden) + latent.kv_rank)
    return kept + layers * latent.rotated, kept, blocks + 2 * layers


def _attention(
    network: Network, load: Load, stage: int, *, backward: bool, recompute: bool = False
) -> Iterator[Flow]:
    """Yield the keys and values that context-parallel ranks gather, and their gradients."""
    layers = len(network.layers(stage))
    token = network.cache_bytes() * layers / network.arch.layers
    size, calls = load.tokens * network.layout.cp * token, layers * load.microbatches
    yield Flow("cp", "all_gather", size * (1 + recompute), calls * (1 + recompute))
    if backward:
        yield Flow("cp", "reduce_scatter", size, calls)


def _experts(
    network: Network, load: Load, stage: int, *, backward: bool, recompute: bool = False
) -> Iterator[Flow]:
    """Yield what tokens take to their experts and back, and how many go where.

    As if every expert got as many tokens.
    """
    layout, experts, layers = network.layout, network.arch.experts, network.sparse_layers(stage)
    if experts and (layout.ep > 1 or layout.etp > layout.tp):
        yield Flow("world", "all_reduce", LONG, 1)  # the most microbatches that a replica has
    if not experts or not layers:
        return
    passes, calls = 1 + recompute + backward, layers * load.microbatches
    sent = load.tokens * experts.per_token / (layout.tp if layout.sequence_parallel else 1)
    token = 2 * network.arch.hidden * network.width + FLOAT  # there and back, and its weight
    yield Flow("ep", "all_to_all", sent * token * layers * passes, 3 * calls * passes)
    # ranks that each have a part of an expert gather the tokens of all, and add up their results
    gathered = sent * layout.etp * network.arch.hidden * network.width * layers * passes
    yield Flow("etp", "all_gather", gathered, calls * passes)
    yield Flow("etp", "reduce_scatter", gathered, calls * passes)
    if experts.sigmoid and backward:  # how many tokens came to each, for the bias that corrects it
        yield Flow("stage", "all_reduce", layers * experts.count * FLOAT, 1)
    counts = layout.ranks("tp_ep") * experts.count * LONG
    yield Flow("tp_ep", "all_gather", counts * calls * (1 + recompute), calls * (1 + recompute))


def _pipeline(network: Network, load: Load, stage: int, *, backward: bool) -> Iterator[Flow]:
    """Yield the activations that are sent on, and their gradients that are sent back."""
    layout, last = network.layout, stage == network.layout.pp - 1
    sends = layout.vpp - last + (layout.vpp - (stage == 0)) * backward
    share = layout.tp if layout.sequence_parallel else 1
    size = load.tokens * network.arch.hidden * network.width / share
    yield Flow("pp", "send", sends * size, sends * load.microbatches)


def _loss(
    student: Network, objective: Objective | Total, hidden_judges: int, load: Load, stage: int
) -> Iterator[Flow]:
    """Yield what the ranks of a head tell each other a token, in float32."""
    if stage != student.layout.pp - 1:
        return
    gathered = reduced = 0.0
    for term in objective.terms:
        one = _told(term, 1 + hidden_judges)
        gathered, reduced = gathered + one[0], reduced + one[1]
    models, k = 1 + hidden_judges, objective.k
    # metrics: normalisers, the token's logits, the engine's ratio; both top k, both models on both
    looks = 2 * models + 2 + 2 * models * k + models * models * k
    gathered = gathered * load.supervised + looks * load.measured
    reduced = reduced * load.supervised + (models + 2 * (hidden_judges > 0)) * load.measured
    yield Flow("tp", "all_gather", gathered * FLOAT * student.layout.tp, 0)
    yield Flow("tp", "all_reduce", reduced * FLOAT, 0)


def _told(o: Objective, models: int) -> tuple[float, float]:
    """Return the numbers a token that each rank gives to the others, and that they add up."""
    if o.choose is None:  # normalisers; values and masses
        return models, 2
    if o.support == "sampled":  # the logit, and all others' sum
        return 2 * models, 0
    found = {"student_ids_CK", "teacher_ids_CK" if models > 1 else ""} & set(o.wants)
    sets = sum(name.endswith("ids_CK") for name in o.wants)
    entries = o.k * sets + o.append_sampled + o.over_vocabulary
    return 2 * len(found) * o.k + models * entries, 0


def _gradients(student: Network, stage: int, distributed: bool) -> Iterator[Flow]:
    """Yield what replicas and tensor-parallel ranks add up at the end, and the new weights."""
    layout, trained = student.layout, [w for w in student.of_stage(stage) if not w[0].fp32]
    apart = layout.ep > 1 or layout.etp != layout.tp
    experts = [w for w in trained if w[0].expert is not None and apart]
    others = [w for w in trained if w not in experts]
    # with experts there are two optimizers, and Megatron gathers all weights after each
    gathers = 2 if student.arch.experts and apart else 1
    for axis, own in (("dp_cp", others), ("expert_dp", experts)):
        if not own:
            continue
        size = _buffer(student, own, layout.ranks(axis) if distributed else 0)
        if distributed:
            yield Flow(axis, "reduce_scatter", size * FLOAT, 1)
            yield Flow(axis, "all_gather", gathers * size * student.width, gathers)
        else:
            yield Flow(axis, "all_reduce", size * FLOAT, 1)
    if student.arch.tied and layout.pp > 1 and stage in (0, layout.pp - 1):
        table = next(student.elements(weight) for weight, _ in trained if weight.vocab)
        yield Flow("embedding", "all_reduce", table * FLOAT, 1)
    shared = [w for w, _ in trained if _added_over_tp(w, layout.sequence_parallel)]
    yield Flow("tp", "all_reduce", sum(map(student.elements, shared)) * FLOAT, bool(shared))
    yield Flow("pp", "broadcast", INT, 1)  # the number of tokens, from the last stage
    yield Flow("dp_cp", "all_reduce", INT, 1)  # of all replicas
    # the norm of the gradient, of whoever has different parts of it
    yield Flow("world" if distributed else "model", "all_reduce", FLOAT, 1)


def _buffer(student: Network, own: list[tuple[Weight, int]], ranks: int) -> int:
    """Return the elements of a gradient buffer; to be cut for `ranks`, it is padded.

    Every parameter starts at a multiple of 64, and the buffer ends at one of 128.
    """
    sizes = [(student.elements(weight), copies) for weight, copies in own]
    if not ranks:
        return sum(size * copies for size, copies in sizes)
    last, unit = sizes[0][0], lcm(128, ranks)  # laid out from the last parameter to the first
    filled = sum(ceil(size / 64) * 64 * copies for size, copies in sizes)
    return ceil((filled - ceil(last / 64) * 64 + last) / unit) * unit


def _added_over_tp(weight: Weight, sequence_parallel: bool) -> bool:
    """Say whether tensor-parallel ranks each have a part of the gradient of a whole weight."""
    of_heads = weight.megatron[0].endswith(("q_layernorm.weight", "k_layernorm.weight"))
    return weight.cut is None and (sequence_parallel or of_heads)
