"""config.json → Architecture → TransformerConfig: both layouts, and every refusal by name."""

import dataclasses
import json

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_opd import parallel as mesh
from megatron_opd.model import architecture, check_layout, padded_vocab, transformer_config
from megatron_opd.model.overrides import check_overrides
from megatron_opd.model.spec import block_spec
from megatron_opd.model.transformer import implementation
from tests.distributed import run_ranks
from tests.hf import FAMILIES, hf_model, to_old_layout

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 203,
    "max_position_embeddings": 256,
}


def config_of(family: str) -> dict:
    config = hf_model(family).config.to_dict()
    return json.loads(json.dumps({**config, "dtype": "bfloat16"}, default=str))


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_before_and_since_transformers_5_say_the_same(family):
    new = config_of(family)
    old = to_old_layout(new)
    assert "rope_parameters" in new and "rope_parameters" not in old and "rope_theta" in old
    a, b = architecture(new), architecture(old)
    assert dataclasses.replace(a, rope={}) == dataclasses.replace(b, rope={})
    assert torch.equal(a.inv_freq(), b.inv_freq())
    assert a.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_are_those_of_transformers(family):
    model = hf_model(family)
    ours = architecture(model.config.to_dict()).inv_freq()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_llama3_uses_every_parameter():
    base = config_of("llama")
    plain = architecture({**base, "rope_parameters": {"rope_theta": 10000.0}}).inv_freq()
    scaled = architecture(base).inv_freq()
    ratio = plain / scaled
    assert ratio[0] == 1 and 1 < ratio[1] < 6 and ratio[2:].eq(6).all()  # keep, between, slow
    for key in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        changed = {**base["rope_parameters"], key: base["rope_parameters"][key] * 1.2}
        other = architecture({**base, "rope_parameters": changed}).inv_freq()
        assert not torch.equal(other, scaled), key


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "mamba"}, "model_type='mamba', expected one of llama, mistral, qwen2, "),
        ({"model_type": "gemma2"}, "Megatron's layers have no norms after attention and mlp"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, expected 'silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic', expected one"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 0.9}}, "attn_factor=0.9"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"dtype": "int8"}, "dtype='int8', expected one of float32, bfloat16, float16"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, told):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, **change}))
    with pytest.raises(ValueError) as caught:
        architecture(tmp_path)
    message = str(caught.value)
    assert told in message and str(tmp_path / "config.json") in message and "\n" not in message


MIXTRAL = {**QWEN2, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window=128 is not supported, expected null"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
        ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act='silu' is not supported, expected 'gelu_py"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method='group_limited_gr"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not supported, expected 1e"),
        ("deepseek_v3", {"topk_group": 1}, "topk_group=1 is not supported, expected num_experts_p"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"v_head_dim": None}, "v_head_dim is missing"),
    ],
)
def test_what_a_family_cannot_have_is_refused_by_name(family, change, told):
    with pytest.raises(ValueError) as caught:
        architecture({**config_of(family), **change})
    assert told in str(caught.value) and "\n" not in str(caught.value)


DISTILLED = {  # keys of published config.json files that are of no consequence here
    "qwen2": {"use_mrope": False, "use_sliding_window": False, "sliding_window": 4096},
    "llama": {"pretraining_tp": 1, "mlp_bias": False, "rope_parameters": None},
    "gemma": {"hidden_act": "gelu", "hidden_activation": None},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"router_aux_loss_coef": 0.02, "output_router_logits": False},
    "deepseek_v3": {"ep_size": 1, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1},
}


@pytest.mark.parametrize("family", DISTILLED)
def test_keys_of_published_models_are_understood(family):
    config = config_of(family)
    plain = architecture({**config, "rope_parameters": None} if family == "llama" else config)
    assert architecture({**config, **DISTILLED[family]}) == plain


def test_experts_are_counted_by_old_and_new_keys():
    new = {"num_experts": None, "num_local_experts": 4}
    assert architecture({**config_of("qwen3_moe"), **new}).experts.count == 4
    old = {"num_experts": 4, "num_local_experts": None}
    assert architecture({**config_of("qwen3_moe"), **old}).experts.count == 4


def test_layers_without_experts_are_told_from_those_with():
    step = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    moe = architecture({**config_of("qwen3_moe"), **step}).experts
    assert moe.layers == (False, True, False, False)
    deepseek = architecture({**config_of("deepseek_v2"), "first_k_dense_replace": 2})
    assert deepseek.experts.layers == (False, False, True, True)


def test_settings_that_are_switched_off_are_accepted():
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    assert architecture({**QWEN2, **off}) == architecture(QWEN2)
    assert architecture({**QWEN2, "attention_bias": None, "rope_scaling": None}) == architecture(
        QWEN2
    )


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*expected a Hugging Face config"):
        architecture(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (dict(ep=3), "ep=3 does not divide the number of experts=4"),
        (dict(etp=5), "etp=5 does not divide the experts' intermediate size=48"),
        (dict(pp=2, vpp=4), "pp × vpp=8 does not divide num_hidden_layers=4"),
        (dict(tp=2, sequence_parallel=False), "sequence_parallel=false with tp=2 and the experts"),
    ],
)
def test_a_layout_that_does_not_fit_experts_is_named(layout, told):
    with pytest.raises(ValueError, match=told):
        check_layout(MIXTRAL, **{"tp": 1, "pp": 1, **layout})
    check_layout(MIXTRAL, 2, 2, vpp=2, ep=4, etp=1)
    check_layout(QWEN2, 2, 2, ep=3, sequence_parallel=False)  # nothing to spread


@pytest.mark.parametrize(
    ("change", "tp", "pp", "told"),
    [
        ({}, 3, 1, "tp=3 does not divide num_attention_heads=4"),
        ({}, 4, 1, "tp=4 does not divide num_key_value_heads=2"),
        ({"intermediate_size": 49}, 2, 1, "tp=2 does not divide intermediate_size=49"),
        ({}, 0, 1, "tp=0 does not divide num_attention_heads=4"),
        ({}, 1, 3, "pp=3 does not divide num_hidden_layers=4"),
    ],
)
def test_a_layout_that_does_not_divide_is_named(change, tp, pp, told):
    with pytest.raises(ValueError, match=told):
        check_layout({**QWEN2, **change}, tp, pp)
    check_layout(QWEN2, 2, 2)


def test_vocabulary_is_padded_as_megatron_does():
    assert [padded_vocab(n, tp) for n, tp in [(151936, 1), (203, 1), (203, 4)]] == [
        151936,
        256,
        512,
    ]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "there", "expected"),
    [
        (torch.bfloat16, 128, True, "transformer_engine"),
        (torch.float16, 64, True, "transformer_engine"),
        (torch.float32, 128, True, "local"),
        (torch.bfloat16, 12, True, "local"),
        (torch.bfloat16, 128, False, "local"),
    ],
)
def test_transformer_engine_is_used_where_it_can_attend(dtype, head_dim, there, expected):
    assert implementation(dtype, head_dim, transformer_engine=there) == expected


def test_the_layers_follow_the_configuration():
    arch = architecture({**QWEN2, "head_dim": 8})
    config = transformer_config(arch, {}, dtype=torch.float32)
    assert config.transformer_impl == "local" and config.apply_rope_fusion is False
    (layer, *_) = run_ranks(_attention_of, 1, arch)[0]
    assert layer == "CausalAttention"


def _attention_of(rank, arch):
    mesh.initialize()
    block = block_spec(transformer_config(arch, {}, dtype=torch.float32))
    attentions = [layer.submodules.self_attention.submodules for layer in block.layer_specs]
    return [attention.core_attention.__name__ for attention in attentions]


SET_ELSEWHERE = r"set from the model's config\.json"
OTHER_NETWORK = r"the network would no longer be the one of config\.json; remove it"


@pytest.mark.parametrize(
    ("megatron", "told"),
    [
        ({"recompute_granularty": "full"}, "did you mean 'recompute_granularity'"),
        ({"hidden_size": 64}, rf"megatron\.hidden_size=64: {SET_ELSEWHERE}"),
        ({"sequence_parallel": True}, rf"megatron\.sequence_parallel=True: {SET_ELSEWHERE}"),
        ({"transformer_impl": "local"}, SET_ELSEWHERE),
        ({"context_parallel_size": 2}, "parallel.cp sets it"),
        ({"virtual_pipeline_model_parallel_size": 2}, "parallel.vpp sets it"),
        ({"expert_model_parallel_size": 2}, "parallel.ep and parallel.etp set it"),
        ({"num_moe_experts": 8}, "not passed on"),
        ({"moe_aux_loss_coeff": 0.1}, "the model has no experts; remove it"),
        ({"window_size": [128, 0]}, OTHER_NETWORK),
        ({"softmax_type": "off-by-one"}, OTHER_NETWORK),
        ({"softmax_scale": "x"}, OTHER_NETWORK),
        ({"layernorm_zero_centered_gamma": True}, OTHER_NETWORK),
        ({"rotary_interleaved": True}, OTHER_NETWORK),
        ({"cross_entropy_loss_fusion": True}, "not passed on; expected one of apply_query"),
        ({"apply_rope_fusion": True}, "only Transformer Engine's layers read it"),
        ({"attention_backend": "flash"}, "only Transformer Engine's layers read it"),
        ({"attention_backend": "flsh"}, "got 'flsh', expected one of flash, fused, unfused"),
        ({"bias_dropout_fusion": "yes"}, "got 'yes', expected bool$"),
        ({"bias_dropout_fusion": 1}, "got 1, expected bool$"),
        ({"recompute_num_layers": 1.5}, "got 1.5, expected int or null$"),
        ({"recompute_num_layers": True}, "got True, expected int or null$"),
        ({"recompute_granularity": "some"}, "got 'some', expected one of full, selective or null$"),
        ({"recompute_modules": "mlp"}, "got 'mlp', expected a list of str or null$"),
        ({"recompute_modules": [1]}, r"got \[1\], expected a list of str or null$"),
        ({"recompute_granularity": "full"}, "refused by TransformerConfig"),
    ],
)
def test_megatron_overrides_are_checked(megatron, told):
    with pytest.raises(ValueError, match=told) as caught:
        transformer_config(architecture(QWEN2), megatron, dtype=torch.float32)
    assert f"megatron.{next(iter(megatron))}" in str(caught.value) or "refused by" in told
    assert "\n" not in str(caught.value)


def test_megatron_overrides_arrive():
    megatron = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    harmless = {"apply_rope_fusion": False, "attention_backend": "auto"}
    config = transformer_config(
        architecture(QWEN2), {**megatron, **harmless}, dtype=torch.bfloat16, tp=2, pp=2
    )
    assert config.recompute_granularity == "selective" and config.recompute_modules == ["mlp"]
    assert config.attention_backend is AttnBackend.auto
    assert config.bf16 and config.params_dtype == config.pipeline_dtype == torch.bfloat16


def test_auxiliary_losses_of_the_router_arrive_and_are_off_until_then():
    arch = architecture({**MIXTRAL, "router_aux_loss_coef": 0.02})
    assert transformer_config(arch, {}, dtype=torch.float32).moe_aux_loss_coeff == 0
    asked = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1, "moe_router_dtype": "fp32"}
    config = transformer_config(arch, asked, dtype=torch.float32)
    assert (config.moe_aux_loss_coeff, config.moe_z_loss_coeff) == (0.01, 1.0)
    assert config.moe_router_dtype == "fp32"
    for refused, told in [
        ({"moe_router_topk": 1}, SET_ELSEWHERE),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "not passed on"),
        ({"moe_aux_loss_coeff": [0.1]}, "expected a number of 0 or more"),
        ({"moe_aux_loss_coeff": -0.1}, "expected a number of 0 or more"),
        ({"moe_grouped_gemm": True}, "only Transformer Engine's layers read it"),
    ]:
        with pytest.raises(ValueError, match=told):
            transformer_config(arch, refused, dtype=torch.float32)


def test_transformer_engines_layers_take_more():
    megatron = {"attention_backend": "flash", "cpu_offloading_num_layers": 2}
    checked = check_overrides(megatron, (), transformer_engine=True)
    assert checked == {"attention_backend": AttnBackend.flash, "cpu_offloading_num_layers": 2}
