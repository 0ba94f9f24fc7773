"""The Megatron model against `transformers`: values, gradients, packing, KV cache, every layout."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from megatron_opd.model import build_model, enter_head, export_hf, forward, load_hf
from megatron_opd.model.pipeline import run_schedule
from tests.distributed import run_ranks
from tests.hf import FAMILIES, by_file_name, hf_model, write_checkpoint
from tests.model.layouts import LAYOUTS, LENGTHS, join, layouts_of, packed, sequences, world

VOCAB = 203


def _logits(rank, folder, layout, dtype):
    """Return the whole logits of the packed sequences on ranks of the last stage."""
    parallel = join(layout)
    model = build_model(folder, parallel, dtype=dtype, seed=None)
    load_hf(model, folder, parallel)

    def last_stage(index, hidden):
        shard = enter_head(hidden, parallel) @ model.head(VOCAB).weight_VH.T
        shards = [torch.empty_like(shard) for _ in range(parallel.tp)]
        dist.all_gather(shards, shard, group=parallel.tp_group)
        return torch.cat(shards, -1)[:, :VOCAB]

    with torch.no_grad():
        logits = run_schedule(model, [packed(sequences())], last_stage, forward_only=True)
    return logits[0] if logits else None


def reference(model) -> torch.Tensor:
    """Return the logits of `transformers`, one sequence at a time."""
    with torch.no_grad():
        return torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_transformers_sequence_by_sequence(tmp_path, family):
    expected = reference(hf_model(family))
    write_checkpoint(tmp_path, family)
    assert expected.std() > 0.5  # far from uniform: an error has something to show in
    for layout in layouts_of(family):
        ranks = run_ranks(_logits, world(layout), tmp_path, layout, torch.float32)
        last = [logits for logits in ranks if logits is not None]
        assert last
        for logits in last:
            assert (logits - expected).abs().max() < 1e-5, layout


def test_bfloat16_is_as_close_to_fp32_as_transformers_is(tmp_path):
    exact = reference(hf_model("qwen3"))
    theirs = (reference(hf_model("qwen3", dtype=torch.bfloat16)) - exact).abs().mean()
    write_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    (ours,) = run_ranks(_logits, 1, tmp_path, LAYOUTS[0], torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert 0 < (ours - exact).abs().mean() < 1.2 * theirs


def _gradients(rank, folder, layout, target_TV):
    """Return d(Σ logits · target)/d(weight) under Hugging Face names."""
    parallel = join(layout)
    model = build_model(folder, parallel, dtype=torch.float32, seed=None)
    load_hf(model, folder, parallel)
    weight_VH = model.head(VOCAB).weight_VH
    first = parallel.tp_rank * len(weight_VH)
    mine_TV = target_TV[:, first : first + len(weight_VH)]
    logits_TV = enter_head(forward(model, packed(sequences())), parallel) @ weight_VH.T
    (logits_TV[:, : mine_TV.size(1)] * mine_TV).sum().backward()
    for name, parameter in model.named_parameters():
        split_tokens = parallel.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        split_heads = "q_layernorm" in name or "k_layernorm" in name
        if split_tokens or split_heads:  # the rule of Megatron's finalize_model_grads
            dist.all_reduce(parameter.grad, group=parallel.tp_group)
        parameter.data = parameter.grad
    return {name: tensor.clone() for name, tensor in export_hf(model, parallel)}


GRADIENTS = {
    "llama": LAYOUTS[:3],
    "qwen2_tied": LAYOUTS[:3],
    "qwen3": LAYOUTS[:3],
    "gemma": LAYOUTS[:1],
    "mixtral": LAYOUTS[:1],
    "qwen2_moe": LAYOUTS[:1],
    "deepseek_v2": LAYOUTS[:3:2],
    "deepseek_v3": LAYOUTS[:3:2],
}


@pytest.mark.parametrize("family", GRADIENTS)
def test_gradients_are_those_of_transformers(tmp_path, family):
    draw = torch.Generator().manual_seed(2)
    target_TV = torch.randn((sum(LENGTHS), VOCAB), generator=draw)
    model = hf_model(family)
    logits_TV = torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])
    (logits_TV * target_TV).sum().backward()
    write_checkpoint(tmp_path, family)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    expected = by_file_name(model, tmp_path / "gradients")
    expected = {name: grad for name, grad in expected.items() if "e_score" not in name}
    for layout in GRADIENTS[family]:
        for got in run_ranks(_gradients, world(layout), tmp_path, layout, target_TV):
            assert {name for name in got if "e_score" not in name} == expected.keys()
            for name, grad in expected.items():
                error = (got[name] - grad).norm() / grad.norm().clamp(min=1e-6)
                assert error < 1e-5, (layout, name)


def _cached(rank, folder, layout):
    """Return hidden states fed in chunks through a KV cache, and those of the packed forward."""
    parallel = join(layout)
    model = build_model(folder, parallel, dtype=torch.float32, seed=None)
    load_hf(model, folder, parallel)
    batch_BL = torch.stack([s[:7] for s in sequences() if len(s) >= 7])
    position_L = torch.arange(7)
    model.eval()
    with torch.no_grad():
        whole = enter_head(forward(model, packed([*batch_BL, torch.zeros(2).long()])), parallel)
        set_model_to_sequence_parallel(model[0], False)
        context, chunks = StaticInferenceContext(len(batch_BL), 7), []
        for start, end in [(0, 3), (3, 5), (5, 6), (6, 7)]:
            chunk = model[0](
                batch_BL[:, start:end],
                position_L[start:end].expand(len(batch_BL), -1),
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            chunks.append(chunk)
            context.sequence_len_offset += end - start
            context.enable_decode_mode()
    return torch.cat(chunks).transpose(0, 1).flatten(0, 1), whole[: batch_BL.numel()]


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3", LAYOUTS[0]), ("qwen3", LAYOUTS[1]), ("qwen3", LAYOUTS[2]), ("gemma", LAYOUTS[0])]
    + [(family, layout) for family in ("qwen2_moe", "deepseek_v3") for layout in LAYOUTS[:3:2]],
)
def test_a_kv_cache_gives_the_hidden_states_of_the_packed_forward(tmp_path, family, layout):
    write_checkpoint(tmp_path, family)
    for cached, whole in run_ranks(_cached, world(layout), tmp_path, layout):
        assert whole.std() > 0.5
        assert (cached - whole).abs().max() < 1e-5


def _random(rank, config, layout, seed):
    parallel = join(layout)
    model = build_model(config, parallel, dtype=torch.float32, seed=seed)
    return {name: tensor.clone() for name, tensor in export_hf(model, parallel)}


def test_random_weights_depend_on_the_seed_and_not_on_the_layout():
    config = hf_model("qwen2").config.to_dict()
    (one,) = run_ranks(_random, 1, config, LAYOUTS[0], 3)
    for layout in LAYOUTS[1:]:
        for other in run_ranks(_random, world(layout), config, layout, 3):
            assert all(torch.equal(other[name], one[name]) for name in one)
    (reseeded,) = run_ranks(_random, 1, config, LAYOUTS[0], 4)
    table, layer = "model.embed_tokens.weight", "model.layers.1."
    assert not torch.equal(reseeded[table], one[table])
    assert not torch.equal(one[table], one["lm_head.weight"])
    assert one[table].std() == pytest.approx(0.02, rel=0.05)
    into_residual = one[layer + "self_attn.o_proj.weight"]
    assert into_residual.std() == pytest.approx(0.02 / 8**0.5, rel=0.1)
    assert one[layer + "input_layernorm.weight"].eq(1).all()
    assert one[layer + "self_attn.q_proj.bias"].eq(0).all()


def _marks(rank, config):
    parallel = join((2, 1, True))
    model = build_model(config, parallel, dtype=torch.bfloat16, trainable=False)
    return (
        {
            name: (
                getattr(p, "tensor_model_parallel", False),
                getattr(p, "sequence_parallel", False),
            )
            for name, p in model.named_parameters()
        },
        {p.dtype for p in model.parameters()},
        model[0].rotary_pos_emb.inv_freq.dtype,
        any(p.requires_grad for p in model.parameters()) or model.training,
    )


def test_parameters_carry_what_megatron_reads_from_them():
    config = hf_model("qwen3").config.to_dict()
    for marks, dtypes, rotary, trainable in run_ranks(_marks, 2, config):
        for name, (tensor_parallel, sequence_parallel) in marks.items():
            norm = "norm" in name
            assert (tensor_parallel, sequence_parallel) == (not norm, norm), name
        assert dtypes == {torch.bfloat16} and rotary == torch.float32 and not trainable
