"""Hugging Face weights in and out: exact, only what is needed, and errors that name the tensor."""

import json
import resource
import signal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_opd.model import (
    architecture,
    build_model,
    check_files,
    export_hf,
    load_hf,
    padded_vocab,
    save_hf,
)
from megatron_opd.model.hf_map import manifest, stage_parameters, weights
from megatron_opd.model.torch_dist import sharded_weights
from tests.distributed import run_ranks
from tests.hf import FAMILIES, hf_model, read_json, write_checkpoint
from tests.model.layouts import LAYOUTS, MIXTURE_LAYOUTS, join, layouts_of, world


def load(folder, layout, dtype=torch.float32, **how):
    parallel = join(layout)
    model = build_model(folder, parallel, dtype=dtype, seed=None, **how)
    return model, parallel


def _round_trip(rank, folder, layout, dtype):
    model, parallel = load(folder, layout, dtype)
    read = load_hf(model, folder, parallel)
    return read, [(name, tensor.clone()) for name, tensor in export_hf(model, parallel)]


def round_trips(folder, layout, dtype=torch.float32):
    return run_ranks(_round_trip, world(layout), folder, layout, dtype)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama_linear"])
def test_export_returns_the_original_tensors_on_every_rank_of_every_layout(tmp_path, family):
    dtype = torch.bfloat16 if family in ("qwen3", "mixtral") else torch.float32
    folder = write_checkpoint(tmp_path, family, dtype=dtype)
    original = load_file(folder / "model.safetensors")
    order = list(manifest(architecture(folder)))
    assert sorted(order) == sorted(original)
    for layout in layouts_of(family):
        for _, exported in round_trips(folder, layout, dtype):
            assert [name for name, _ in exported] == order
            for name, tensor in exported:
                assert tensor.dtype == dtype and torch.equal(tensor, original[name]), name


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_a_rank_reads_only_its_own_part(tmp_path, family):
    folder = write_checkpoint(tmp_path, family, shard_size="50KB")  # several files
    assert len(list(folder.glob("*.safetensors"))) > 2
    size = {
        name: tensor.nbytes
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    norms = sum(n for name, n in size.items() if "norm" in name)
    table = size["model.embed_tokens.weight"]
    twice = table if family == "qwen2_tied" else 0  # the last stage's copy
    for layout, repeated in [((1, 1, False), 0), ((2, 1, False), norms), ((1, 2, False), twice)]:
        read = [read for read, _ in round_trips(folder, layout)]
        assert sum(read) == sum(size.values()) + repeated
        assert max(read) < 0.7 * sum(size.values()) or layout == (1, 1, False)


def test_a_rank_reads_only_its_own_experts(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    experts = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    others = sum(t.nbytes for name, t in tensors.items() if ".experts." not in name)
    read = [read for read, _ in round_trips(folder, MIXTURE_LAYOUTS["EP2"])]
    assert read == [others + experts // 2] * 2


def test_other_dtypes_are_converted_and_only_then(tmp_path):
    folder = write_checkpoint(tmp_path, "deepseek_v3")
    original = load_file(folder / "model.safetensors")
    ((_, exported),) = round_trips(folder, LAYOUTS[0], torch.bfloat16)
    for name, tensor in exported:
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(tensor, original[name] if kept else original[name].bfloat16())


def _names(rank, config):
    model, _ = load(config, (1, 1, False))
    keys = {value.key for value in sharded_weights(model).values()}
    return set(stage_parameters(model)), keys


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_map_knows_the_names_of_both_layer_specs(family):
    """Megatron stores portable models under Transformer Engine's names, one key for all layers."""
    config = hf_model(family).config.to_dict()
    ((portable, stored),) = run_ranks(_names, 1, config)
    plan = weights(architecture(config))
    assert {weight.megatron[0] for weight in plan} == portable
    fused = {weight.megatron[-1] for weight in plan if weight.layer == 0}
    assert stored == {
        "decoder.final_layernorm.weight",
        "output_layer.weight",
        *(name.replace("layers.0.", "layers.") for name in fused),
    }


def _tables(rank, folder, layout, padded, vocab_size):
    model, parallel = load(folder, layout, padded_vocab=padded)
    load_hf(model, folder, parallel, vocab_size=vocab_size)
    return [p.detach() for name, p in stage_parameters(model).items() if p.size(0) == padded // 2]


@pytest.mark.parametrize("padded", [512, 256, 202])
def test_tables_are_padded_with_zeros_or_cut_to_the_model(tmp_path, padded):
    folder = write_checkpoint(tmp_path, "llama")
    original = load_file(folder / "model.safetensors")
    ranks = run_ranks(_tables, 2, folder, (2, 1, False), padded, 200)
    kept = min(padded, 203)
    for i, name in enumerate(["model.embed_tokens.weight", "lm_head.weight"]):
        table = torch.cat([tables[i] for tables in ranks])
        assert torch.equal(table[:kept], original[name][:kept]) and not table[kept:].any()


@pytest.mark.parametrize(
    ("padded", "vocab_size", "told"),
    [
        (202, None, "padded vocabulary has 202 rows, expected at least 203"),
        (256, 204, "has 203 rows, expected at least 204"),
    ],
)
def test_a_row_that_the_tokenizer_needs_is_never_dropped(tmp_path, padded, vocab_size, told):
    folder = write_checkpoint(tmp_path, "llama")
    with pytest.raises(RuntimeError, match=told):
        run_ranks(_tables, 2, folder, (2, 1, False), padded, vocab_size)


def _refusal(rank, folder, layout):
    model, parallel = load(folder, layout)
    with pytest.raises(ValueError) as caught:
        load_hf(model, folder, parallel)
    return str(caught.value)


def damaged(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LAYER_3 = "model.layers.3.mlp.up_proj.weight"  # held by the last stage alone


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(LAYER_3), f"missing: {LAYER_3}"),
        (lambda t: t.update(extra=torch.ones(3)), "unknown: extra"),
        (lambda t: t.update({LAYER_3: torch.ones(4, 32)}), f"wrong shape: {LAYER_3} [4, 32]"),
        (lambda t: t[LAYER_3][0, :1].fill_(torch.nan), f"{LAYER_3} has values that are not finite"),
        (lambda t: t[LAYER_3].zero_(), f"{LAYER_3} is all zero"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_on_every_rank(tmp_path, change, told):
    folder = write_checkpoint(tmp_path, "qwen3")
    damaged(folder, change)
    for message in run_ranks(_refusal, 4, folder, (2, 2, False)):
        assert told in message and str(folder) in message and "\n" not in message


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3", shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    first = sorted(folder.glob("*.safetensors"))[0]
    first.write_text("not a tensor")
    assert f"{first}: not a readable" in run_ranks(_refusal, 1, folder, LAYOUTS[0])[0]
    first.unlink()
    message = run_ranks(_refusal, 1, folder, LAYOUTS[0])[0]
    assert message == f"{index}: names files that are missing: {first.name}"
    index.unlink()
    assert "has neither model.safetensors nor" in run_ranks(_refusal, 1, folder, LAYOUTS[0])[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[]", "expected a JSON object, got list"),
        ('{"weight_map": ', "expected an index of safetensors, got: Expecting value"),
        ('{"weight_map": {"a": "b.safetensors"}}', "names files that are missing: b.safetensors"),
    ],
)
def test_an_index_that_is_broken_is_named(tmp_path, text, told):
    index = write_checkpoint(tmp_path, "qwen3") / "model.safetensors.index.json"
    index.write_text(text)
    assert f"{index}: {told}" in refused(tmp_path)


def refused(folder) -> str:
    """Return what `check_files` says, which is one line."""
    with pytest.raises(ValueError) as caught:
        check_files(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("left", [0, 4, 50, -10])
def test_a_file_that_is_cut_off_is_named(tmp_path, left):
    file = write_checkpoint(tmp_path, "qwen3") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert f"{file}: not a readable safetensors file" in refused(tmp_path)


def test_files_are_checked_without_a_model(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3", shard_size="50KB")
    check_files(folder)
    check_files(folder, vocab_size=203)
    with pytest.raises(ValueError, match=f"of {folder} has 203 rows, expected at least 204"):
        check_files(folder, vocab_size=204)
    file = folder / read_json(folder / "model.safetensors.index.json")["weight_map"][LAYER_3]
    tensors = load_file(file)
    save_file({**tensors, LAYER_3: tensors[LAYER_3][:4]}, file)
    assert f"wrong shape: {LAYER_3} [4, 32] (expected [48, 32])" in refused(folder)
    tensors.pop(LAYER_3)
    save_file(tensors, file)
    assert f"{folder}: tensors do not fit config.json: missing: {LAYER_3}" in refused(folder)


def test_leftovers_that_transformers_ignores_are_ignored(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen2_tied")
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    damaged(folder, lambda t: t.update(rotary, **{"lm_head.weight": torch.ones(203, 32)}))
    original = load_file(folder / "model.safetensors")
    ((_, exported),) = round_trips(folder, LAYOUTS[0])
    assert all(torch.equal(tensor, original[name]) for name, tensor in exported)


def test_layers_of_multi_token_prediction_are_left_out_and_no_others(tmp_path):
    folder = write_checkpoint(tmp_path, "deepseek_v3")
    extra = {"model.layers.4.eh_proj.weight": torch.ones(3)}
    damaged(folder, lambda t: t.update(extra))
    check_files(folder)
    ((_, exported),) = round_trips(folder, LAYOUTS[0])
    assert not extra.keys() & {name for name, _ in exported}
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    assert "unknown: model.layers.4.eh_proj.weight" in refused(folder)


def _save(rank, folder, layout, target, source, limit):
    model, parallel = load(folder, layout, torch.bfloat16)
    load_hf(model, folder, parallel)
    save_hf(model, source, target, parallel, max_shard_bytes=limit)
    with pytest.raises(ValueError, match="exists; remove it"):
        save_hf(model, source, target, parallel)
    with pytest.raises(ValueError, match="Not a directory"):
        save_hf(model, source, folder / "config.json" / "below", parallel)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", LAYOUTS[4]),
        ("qwen2_tied", LAYOUTS[3]),
        ("gemma", LAYOUTS[0]),
        ("mixtral", MIXTURE_LAYOUTS["EP2"]),
        ("qwen3_moe", MIXTURE_LAYOUTS["TP2×EP2+SP"]),
        ("deepseek_v3", LAYOUTS[2]),
    ],
)
def test_a_saved_folder_loads_in_transformers(tmp_path, family, layout):
    folder = write_checkpoint(tmp_path / "source", family, dtype=torch.bfloat16)
    run_ranks(_save, world(layout), folder, layout, tmp_path / "saved", folder, 30_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    load_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    saved, source = load_pretrained(tmp_path / "saved"), load_pretrained(folder)
    assert saved.dtype == torch.bfloat16
    mine, theirs = saved.state_dict(), source.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert read_json(tmp_path / "saved" / name) == read_json(folder / name)
    assert not list(tmp_path.glob("tmp_*"))


STOPS = [
    ({"eos_token_id": 5}, (9, 2), [2, 5, 9]),
    ({"eos_token_id": [5, 2]}, (9, 2), [2, 5, 9]),
    ({}, (9,), [9]),
    (None, (9,), [2, 9]),  # no file: config.json says 2
    ({"eos_token_id": 5}, (), 5),
]


def _save_stopping(rank, folder, target, stop_ids):
    model, parallel = load(folder, LAYOUTS[0])
    load_hf(model, folder, parallel)
    save_hf(model, folder, target, parallel, stop_ids=stop_ids)


@pytest.mark.parametrize(("said", "stop_ids", "expected"), STOPS)
def test_a_saved_model_stops_where_it_was_trained_to(tmp_path, said, stop_ids, expected):
    folder = write_checkpoint(tmp_path / "source", "llama")
    said_file = folder / "generation_config.json"
    said_file.unlink()
    if said is not None:
        said_file.write_text(json.dumps({**said, "temperature": 0.6, "do_sample": True}))
    config = {**read_json(folder / "config.json"), "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    run_ranks(_save_stopping, 1, folder, tmp_path / "saved", stop_ids)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert saved.eos_token_id == expected
    assert saved.temperature == 0.6 if said is not None else saved.bos_token_id == 1


def _save_on_a_full_disk(rank, folder, target):
    model, parallel = load(folder, (1, 2, False))
    load_hf(model, folder, parallel)
    if rank == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
    with pytest.raises(ValueError) as caught:
        save_hf(model, folder, target, parallel, max_shard_bytes=30_000)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    return str(caught.value)


def test_a_full_disk_is_an_error_on_every_rank_and_no_folder(tmp_path):
    folder = write_checkpoint(tmp_path / "source", "qwen3")
    for message in run_ranks(_save_on_a_full_disk, 2, folder, tmp_path / "saved"):
        assert "File too large" in message and "\n" not in message
    assert not (tmp_path / "saved").exists()


def test_the_saved_dtype_is_the_one_of_the_weights(tmp_path):
    folder = write_checkpoint(tmp_path / "source", "qwen3")
    config = {**read_json(folder / "config.json"), "torch_dtype": "float32"}
    del config["dtype"]
    run_ranks(_save, 1, folder, LAYOUTS[0], tmp_path / "saved", config, 10**9)
    assert read_json(tmp_path / "saved" / "config.json") == {**config, "torch_dtype": "bfloat16"}
    (tensors,) = [load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.dumps(sorted(tensors)) == json.dumps(
        sorted(load_file(folder / "model.safetensors"))
    )


def test_padding_does_not_reach_the_checkpoint(tmp_path):
    assert padded_vocab(203, 2) == 256
    folder = write_checkpoint(tmp_path, "llama")
    for _, exported in round_trips(folder, (2, 1, False)):
        assert dict(exported)["lm_head.weight"].shape == (203, 32)
