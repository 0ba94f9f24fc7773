"""Every family through the loop: written, judged, trained, saved, resumed, and read elsewhere."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd import parallel as mesh
from megatron_opd import train
from megatron_opd.clock import Clock
from megatron_opd.config_file import load_config
from megatron_opd.job import Job
from megatron_opd.types import Rollout
from tests.distributed import run_ranks
from tests.test_train import make_home, records

WORDS = ["train.steps=2", "run.save_every=2", "eval.prompts=[]", "eval.every=0"]
WORDS += ["run.tensorboard=false", "optimizer.warmup_steps=0"]
IDS = 259  # of the tokenizer; the tables have more rows
AXES = {
    "one": (1, {}),
    "TP2·SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2": (2, {"pp": 2}),
    "EP2": (2, {"ep": 2}),
}
CASES = {  # student family: teacher family, layout
    "mistral": ("gemma", "one"),
    "gemma": ("mistral", "TP2·SP"),
    "qwen3_yarn": ("deepseek_v3", "EP2"),
    "mixtral": ("qwen3_moe", "EP2"),
    "qwen3_moe": ("mixtral", "TP2·SP"),
    "qwen2_moe": ("qwen3_yarn", "PP2"),
    "deepseek_v2": ("qwen2_moe", "EP2"),
    "deepseek_v3": ("deepseek_v2", "TP2·SP"),
}


def _live(rank, words: list[str], axes: dict) -> list[Rollout]:
    """Run two steps; return the responses that the run writes when it goes on after them."""
    logging.getLogger("megatron_opd").setLevel(logging.INFO)
    config = load_config(["config.yaml"], words)
    train.main(config)
    more = load_config(["config.yaml"], [*words, "train.steps=3", "run.resume=true"])
    parallel = mesh.initialize(**axes)
    job = Job(more, parallel)
    step = job.restore() + 1
    assert step == 3
    return job.generate(step, Clock())


def logp(model, rollout: Rollout) -> torch.Tensor:
    """Return the log-probability of every token of a response among those of the tokenizer."""
    ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
    with torch.no_grad():
        logp_TV = model(ids).logits[0, :, :IDS].log_softmax(-1)
    first = len(rollout.prompt.token_ids) - 1
    return logp_TV[first:-1].gather(1, ids[0, first + 1 :, None])[:, 0]


@pytest.mark.parametrize("family", CASES)
def test_a_family_from_start_to_export(tmp_path, monkeypatch, family):
    """The engine of the resumed run knows the exported weights as `transformers` does."""
    teacher, layout = CASES[family]
    world, axes = AXES[layout]
    monkeypatch.chdir(make_home(tmp_path, layers=4, student=family, teacher=teacher))
    words = [*WORDS, f"parallel={json.dumps(axes)}"]
    ranks = run_ranks(_live, world, words, axes)
    folder = Path("runs/one")
    for record in records(folder):
        assert record["policy/mismatch_max"] < 1e-4  # engine and trainer agree
        assert record["distill/reverse_kl"] > 0
    model = AutoModelForCausalLM.from_pretrained(folder / "hf/step_000002").eval()
    for rollout in ranks[0]:
        assert (logp(model, rollout) - torch.tensor(rollout.logp)).abs().max() < 1e-4
