"""The estimate of memory: its arithmetic, and that a step on real ranks allocates what it says."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from megatron_opd import config as cfg
from megatron_opd import memory
from megatron_opd import parallel as mesh
from megatron_opd.build import RECOMPUTE, build_objective, judges
from megatron_opd.config_file import load_config
from megatron_opd.memory.activations import kept
from megatron_opd.memory.share import Share
from megatron_opd.model import architecture, build_model
from megatron_opd.model.gpt import forward
from megatron_opd.model.hf_map import manifest
from megatron_opd.packing import pack
from megatron_opd.types import Head, HiddenScores
from tests.distributed import run_ranks
from tests.hf import FAMILIES, hf_model
from tests.home import make_home
from tests.measured import allocated, peaks
from tests.tiny import make_prompts, make_rollouts, qwen3, qwen3_moe


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with two models and ten prompts."""
    monkeypatch.chdir(tmp_path)
    return make_home(tmp_path)


def load(*overrides):
    return load_config(["config.yaml"], overrides)


def estimate(config, dp=1, device="cuda"):
    objective = build_objective(config)
    return memory.estimate(config, objective, judges(config, objective), dp, device=device)


# What a step allocates

SIZES = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=384)
NETWORKS = {
    "dense": qwen3(**SIZES),
    "tied": qwen3(**SIZES, tie_word_embeddings=True),
    "MoE": qwen3_moe(**SIZES, **MIXTURE),
}
PROMPT, RESPONSE = 65, 192  # four sequences of 256 tokens are a microbatch
LARGER = """
student: {path: student, dtype: float32, init: random}
teacher: {path: teacher}
data: {prompts: [none.jsonl], max_prompt_tokens: 65}
rollout: {n: 1, max_tokens: 192, batch_size: 8}
train: {prompts_per_step: 4, microbatch_tokens: 1024}
"""
LAYOUTS = {  # network, ranks, what the config says
    "TP1": ("dense", 1, []),
    "TP1, bf16, recompute": ("tied", 1, ["student.dtype=bfloat16", "train.recompute=full"]),
    "TP2": ("tied", 2, ["parallel.tp=2"]),
    "TP2 SP": ("dense", 2, ["parallel={tp: 2, sequence_parallel: true}"]),
    "PP2": ("tied", 2, ["parallel.pp=2", "train.prompts_per_step=8"]),
    "TP2 PP2": ("dense", 4, ["parallel={tp: 2, pp: 2}", "train.prompts_per_step=8"]),
    "PP2 VPP2": ("dense", 2, ["parallel={pp: 2, vpp: 2}", "train.prompts_per_step=8"]),
    "CP2": ("dense", 2, ["parallel.cp=2"]),
    "DP2, teacher TP2": ("dense", 2, ["teacher.parallel={tp: 2}", "train.prompts_per_step=8"]),
    "MoE": ("MoE", 1, []),
    "MoE EP2": ("MoE", 2, ["parallel.ep=2", "train.prompts_per_step=8"]),
    "MoE TP2 SP": ("MoE", 2, ["parallel={tp: 2, sequence_parallel: true}"]),
}


@pytest.mark.parametrize(("network", "world", "overrides"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_allocates_what_the_estimate_says(
    tmp_path, monkeypatch, network, world, overrides, request
):
    monkeypatch.chdir(tmp_path)
    teacher = qwen3(**{**SIZES, "intermediate_size": 1024})
    for name, hf in (("student", NETWORKS[network]), ("teacher", teacher)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hf))
    shapes = manifest(architecture(teacher))
    weights = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "teacher" / "model.safetensors")
    (tmp_path / "config.yaml").write_text(LARGER)
    config = load(*overrides)
    prompts = config.train.prompts_per_step
    rollouts = make_rollouts([(PROMPT, RESPONSE)] * prompts)
    ranks = run_ranks(peaks, world, config, make_prompts([PROMPT] * prompts), rollouts)
    measured = max(bytes_ for phases in ranks for bytes_ in phases.values())
    layout = config.parallel
    dp = world // (layout.tp * layout.pp * layout.cp)
    expected = memory.peak(estimate(config, dp, "cpu"))
    print(f"{request.node.callspec.id}: {expected / 2**20:.0f} of {measured / 2**20:.0f} MiB")
    assert 0.85 < expected / measured < 1.15


@pytest.mark.parametrize(
    "objective",
    [
        "{support: full}",
        "{support: full, divergence: jsd}",
        "{support: sampled, form: policy_gradient}",
        "{support: student_topk, normalize: vocab, tail: true}",
        "{support: student_topk}",
        "{support: sampled, divergence: cross_entropy}",
    ],
)
def test_the_loss_needs_at_most_what_the_table_says(home, objective):
    rows, hidden = 5120, 32  # rows need no padding, so that arithmetic and allocation can agree
    for name in ("student", "teacher"):
        network = qwen3(vocab_size=rows, hidden_size=hidden)
        (home / name / "config.json").write_text(json.dumps(network))
    overrides = [f"objective={objective}", "objective.chunk_tokens=64"]
    overrides += ["train.microbatch_tokens=413"]  # of which 150 are supervised
    config = load(*overrides, *["teacher=null"] * ("cross_entropy" in objective))
    batch = pack(make_rollouts([(3, 50)] * 3), microbatch_tokens=256)[0]

    def model():
        return torch.randn(len(batch.target_N), hidden), Head(torch.randn(rows, hidden), rows)

    states, head = model()
    states.requires_grad_()
    head = replace(head, gradient_VH=torch.zeros(rows, hidden))  # counted with the gradients
    teacher = HiddenScores(*model()) if config.teacher else None
    learn = build_objective(config)
    measured = allocated(lambda: learn(states, head, batch, teacher))
    table = estimate(config)["train"]
    expected = table["logits of a chunk"] + table["arithmetic on them, float32"]
    assert 0.5 * expected < measured < 1.01 * expected  # what is left has no dim of size V


def _kept_for_backward(rank, hf, tp, sequence_parallel, recompute):
    """Return the tokens of a forward, and the bytes that autograd keeps of it besides weights."""
    parallel = mesh.initialize(tp, 1, sequence_parallel=sequence_parallel)
    megatron = RECOMPUTE[recompute]
    model = build_model(hf, parallel, dtype=torch.float32, megatron=megatron, seed=None).train()
    batch = pack(make_rollouts([(20, 80)] * 2), microbatch_tokens=256, multiple=tp)[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor  # held, so that no other comes to live there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, batch)
    return batch.token_T.numel(), sum(
        tensor.untyped_storage().nbytes() for where, tensor in kept.items() if where not in weights
    )


@pytest.mark.parametrize(
    ("family", "tp", "sequence_parallel", "recompute"),
    [
        ("qwen2", 2, True, "none"),
        ("qwen3", 1, False, "none"),
        ("qwen3", 2, False, "selective"),
        ("qwen3", 2, True, "none"),
    ],
)
def test_activations_are_what_autograd_keeps(family, tp, sequence_parallel, recompute):
    network = qwen3(model_type=family, num_attention_heads=8, head_dim=16, hidden_size=128)
    tokens, seen = run_ranks(_kept_for_backward, tp, network, tp, sequence_parallel, recompute)[0]
    axes = cfg.Mesh(tp=tp, sequence_parallel=sequence_parallel)
    share = _share(network, axes, world=tp)
    output = 128 * 4 // (tp if sequence_parallel else 1)  # the loss has it, not the backward
    expected = tokens * (kept(share, recompute, length=99) - output)
    # what is left are a few numbers a token and head: reciprocal roots, log-sum-exps
    assert expected < seen < 1.03 * expected


def _share(network, axes, *, world, stage=0):
    arch = architecture(network)
    how = dict(world=world, cp=1, width=4, device="cpu", rows=arch.vocab_rows)
    return Share(arch, axes, stage=stage, **how)


# The arithmetic


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_tied", "qwen3", "qwen3_tied"])
def test_parameters_are_counted_as_transformers_counts_them(tmp_path, family):
    assert family in FAMILIES
    model = hf_model(family)
    model.config.save_pretrained(tmp_path)
    assert memory.count_parameters(str(tmp_path)) == model.num_parameters()


def _parameters_of_this_rank(rank, axes, network):
    layout = axes.model_dump()
    parallel = mesh.initialize(layout.pop("tp"), layout.pop("pp"), **layout)
    model = build_model(network, parallel, dtype=torch.float32, seed=None)
    dense = [p.numel() for name, p in model.named_parameters() if ".experts." not in name]
    every = sum(p.numel() for p in model.parameters())
    return parallel.pp_rank, (sum(dense), every - sum(dense))


AXES = {
    "TP1": (1, {}),
    "TP2 SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2": (2, {"pp": 2}),
    "TP2 SP PP2": (4, {"tp": 2, "sequence_parallel": True, "pp": 2}),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
    "EP2": (2, {"ep": 2}),
}


@pytest.mark.parametrize("network", [qwen3(tie_word_embeddings=True), qwen3_moe()])
@pytest.mark.parametrize(("world", "axes"), AXES.values(), ids=AXES)
def test_a_rank_has_the_parameters_of_the_real_one(world, axes, network):
    axes = cfg.Mesh(**axes)
    for stage, parameters in run_ranks(_parameters_of_this_rank, world, axes, network):
        assert _share(network, axes, world=world, stage=stage).parameters == parameters


def test_memory_follows_the_config(home):
    def need(*overrides, dp=2):
        return estimate(load(*overrides), dp)

    size = memory.count_parameters("student")
    base = need()
    assert base["always"]["student weights"] >= 4 * size
    assert base["always"]["optimizer states"] == base["always"]["gradients, float32"]  # 8 / 2
    bf16 = need("student.dtype=bfloat16")
    assert bf16["always"]["student weights"] * 2 == base["always"]["student weights"]
    assert bf16["always"]["optimizer states"] * 2 == 3 * base["always"]["optimizer states"]
    whole = need("optimizer.distributed=false")["always"]["optimizer states"]
    assert whole == 2 * base["always"]["optimizer states"]
    # keys and values of 4 sequences of 100 tokens, 4 layers of 4 heads of 8, in float32
    assert base["rollout"]["key-value cache"] == 2 * 4 * 100 * 4 * 4 * 8 * 4
    assert (
        need("rollout.batch_size=1")["rollout"]["key-value cache"] * 4
        == (base["rollout"]["key-value cache"])
    )
    assert need("train.recompute=full")["train"]["activations"] < base["train"]["activations"]
    assert need("rollout.batch_size=9")["rollout"] == base["rollout"]  # a replica has only 4
    away = need("teacher.offload=true")
    head = away["always"]["teacher head"]  # stays: the loss multiplies by it
    assert head == 384 * 32 * 4  # 260 rows, padded
    assert base["always"]["teacher weights"] == head + away["score"]["teacher weights"]
    assert base["score"]["teacher hidden states"] == 4 * 36 * 32 * 4
    topk = need("teacher={payload: topk, offload: true}", "objective.support=teacher_topk")
    assert (
        topk["train"]["teacher top k"] == 4 * 36 * 16 * 12 and "teacher head" not in topk["always"]
    )
    assert topk["score"]["teacher weights"] == base["always"]["teacher weights"]
    sampled = ["objective={support: sampled, form: policy_gradient}", "teacher.payload=sampled"]
    assert need(*sampled)["train"]["teacher log-probabilities"] == 4 * 36 * 4
    both = need("base={path: student, offload: true}", "objective.extrapolation=1.25")
    assert both["train"].keys() >= {"teacher hidden states", "base hidden states"}
    assert both["always"]["base head"] == head and "base weights" in both["score"]
    sharded = need("optimizer.offload=true")
    states = {"gradients, float32", "optimizer states"}
    assert states <= base["always"].keys() and not states & sharded["always"].keys()
    assert states <= sharded["update"].keys() and states & sharded["train"].keys() == {
        "gradients, float32"
    }
    assert memory.peak({"always": {"a": 3}, "x": {"b": 1, "c": 1}, "y": {"d": 5}}) == 8


def test_memory_of_vllm_is_its_own_copy_of_the_student_and_a_full_batch(home):
    def need(*overrides):
        return estimate(load("rollout.engine=vllm", "parallel.tp=2", *overrides), 2)["rollout"]

    whole, half = need(), need("rollout.tp=2")
    assert whole["vLLM weights"] == 4 * memory.count_parameters("student")
    assert whole["vLLM key-value cache"] == 64 * 100 * 2 * 4 * 8 * 4 * 4
    assert all(whole[name] == 2 * half[name] for name in whole)
    assert not estimate(load("rollout={engine: vllm_server, url: http://x}"), 2)["rollout"]


def test_evaluation_has_a_cache_of_its_own_length(home):
    def cache(*overrides):
        return estimate(load(*overrides), 2)["rollout"].get("key-value cache")

    replay = ["rollout.engine=replay", "rollout.n=1"]
    evaluates = ["eval.prompts=[prompts.jsonl]", "eval.max_tokens=136", "rollout.batch_size=5"]
    assert cache(*replay) is None
    longer = 2 * 5 * (64 + 136) * 4 * 4 * 8 * 4  # as above
    assert cache(*replay, *evaluates) == cache(*evaluates) == longer
