"""Bytes of activations for each token of a microbatch, as the portable layers allocate them.

A sum of terms, each the tensor that Megatron's source or ours makes there: `model.spec`'s norms,
`model.attention`, mcore's attention.py, rope_utils.py, mlp.py and moe/.
"""

from megatron_opd.memory.share import Share


def kept(share: Share, recompute: str, length: int) -> float:
    """Return what autograd keeps of all layers of a stage and the final norm, and what it sends.

    `length`: of the sequences, over all context-parallel ranks.
    """
    if recompute == "full":  # the input of every layer
        layers = len(share.layers) * _stream(share) * share.width
    else:
        layers = sum(_layer(share, sparse, recompute, length) for sparse in share.sparse)
    final = _norm(share, _stream(share)) if share.is_last else 0
    sent = _stream(share) * share.width * share.mesh.vpp if share.mesh.pp > 1 else 0
    return layers + final + sent


def backward(share: Share, recompute: str, length: int) -> float:
    """Return what the backward of one layer adds while it is at its widest.

    In an MLP, gradients of the product, of silu(gate) and of up, while the product itself is gone;
    among experts, those of what went to them and came back. With full recomputation, besides, what
    a layer would have kept.
    """
    arch, widest, again = share.arch, 0.0, 0.0
    for sparse in set(share.sparse):
        gradients = 2 * arch.ffn / share.tp
        if sparse:
            gradients = 2 * _copies(share) * arch.hidden + 2 * _of_one_expert(share)
        widest = max(widest, gradients * share.width)
        again = max(again, _layer(share, sparse, "none", length))
    return widest + (again if recompute == "full" else 0)


def forward(share: Share, *, scattered: bool = True) -> float:
    """Return what a forward without gradients has at its widest, in the MLP.

    Both projections, silu(gate), up (plus 0) and their product, of all or of one expert, with what
    went to the experts, in two orders, and came back; the residual stream, the norm's input and
    output, and two sums. `scattered`: as the config says of sequence parallelism.
    """
    arch, widest = share.arch, 0.0
    for sparse in set(share.sparse):
        wide = 5 * arch.ffn / share.tp
        if sparse:
            routed = 3 * _copies(share, scattered) * arch.hidden
            wide = routed + 5 * _of_one_expert(share, scattered)
        widest = max(widest, wide)
    return (widest + 5 * _stream(share, scattered)) * share.width


def _stream(share: Share, scattered: bool = True) -> float:
    """Return the residual stream's numbers per token."""
    return share.arch.hidden / (share.tp if share.mesh.sequence_parallel and scattered else 1)


def _copies(share: Share, scattered: bool = True) -> float:
    """Return how often a token is on this rank for one of its experts, if all have equally many."""
    assert share.arch.experts is not None
    ranks = share.tp if share.mesh.sequence_parallel and scattered else 1
    return share.arch.experts.per_token * share.etp / ranks


def _of_one_expert(share: Share, scattered: bool = True) -> float:
    """Return the numbers between an expert's projections, per token of the microbatch."""
    assert share.arch.experts is not None
    here = share.arch.experts.count / share.mesh.ep
    return _copies(share, scattered) / here * share.arch.experts.ffn / share.etp


def _layer(share: Share, sparse: bool, recompute: str, length: int) -> float:
    mlp = _mixture(share) if sparse else _mlp(share.arch.ffn / share.tp, share)
    attention = _latent_attention if share.arch.latent else _attention
    return 2 * _norm(share, _stream(share)) + attention(share, recompute, length) + mlp


def _norm(share: Share, size: float) -> float:
    """Return a norm's input and output; a CPU's keeps x / rms(x) too, and works in float32."""
    if share.device == "cpu":
        return size * (4 + 4 + share.width)
    return size * 2 * share.width


def _attention(share: Share, recompute: str, length: int) -> float:
    arch, width = share.arch, share.width
    queries, keys = (n * arch.head_dim / share.tp for n in (arch.heads, arch.kv_heads))
    projected = queries + 2 * keys
    rotated = queries + 4 * arch.head_dim  # with cosines and sines, of both
    attended = keys if share.cp == 1 else 2 * keys * share.cp  # else gathered, values too
    kept = projected + rotated + attended + queries  # attention's output, in our order
    if recompute != "selective":
        kept += queries + _mask(share, length)
    return kept * width + _query_norm(share, queries, keys)


def _mask(share: Share, length: int) -> float:
    """Return what says which keys a query sees: a chunk of L / (2 cp) queries sees others, too."""
    cp = share.cp
    return 0 if cp == 1 else length / (2 * cp) * (2 * cp + 1) / 2


def _latent_attention(share: Share, recompute: str, length: int) -> float:
    """Return the latent vectors and their norms, and what attention has of all heads.

    A CPU has no kernel for values of another size than keys: it keeps all probabilities.
    """
    arch, latent, heads = share.arch, share.arch.latent, share.arch.heads / share.tp
    assert latent is not None
    down = _norm(share, (latent.q_rank or 0) + latent.kv_rank) + 5 * latent.rotated * share.width
    if recompute == "selective":
        core = 0.0
    elif share.device == "cpu":
        core = heads * (2 * arch.head_dim + length) * 4 + heads * latent.value * share.width
    else:
        core = heads * latent.value * share.width + _mask(share, length) * share.width
    inputs = heads * (2 * arch.head_dim + latent.plain + latent.value) * share.width
    made = inputs if share.device == "cuda" or recompute == "selective" else 0
    return down + made + core + heads * latent.value * share.width


def _query_norm(share: Share, queries: float, keys: float) -> float:
    """Return what the norms of queries and keys keep; their outputs are rotated and forgotten."""
    if not share.arch.qk_norm:
        return 0
    grouped = share.arch.heads > share.arch.kv_heads  # queries are copied out of the projection
    if share.device == "cuda" or share.width == 4:
        copied = queries * share.width if grouped else 0
    else:
        copied = (queries + keys) * 4
    return copied + ((queries + keys) * 4 if share.device == "cpu" else 0)


def _mlp(ffn: float, share: Share) -> float:
    """Return gate and up, silu(gate), a second up (Megatron adds 0 to it), and the product."""
    return 5 * ffn * share.width


def _mixture(share: Share) -> float:
    """Return of each copy of a token its state, an MLP, and the product times its weight."""
    experts = share.arch.experts
    assert experts is not None
    copy = share.arch.hidden * share.width + _mlp(experts.ffn / share.etp, share) * 6 / 5
    return _copies(share) * copy + _mlp(experts.shared_ffn / share.tp, share)
