"""A saved folder of a family that is not Llama's kind is the same model to the real vLLM."""

import pytest
import torch

from megatron_opd.model import build_model, load_hf, save_hf
from tests.distributed import run_ranks
from tests.hf import hf_model, write_checkpoint
from tests.model.layouts import LAYOUTS, join, sequences
from tests.model.test_gpt import reference
from tests.rollout.needs_vllm import LATENT, NEEDS_VLLM

pytestmark = NEEDS_VLLM

SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
OWN = {  # with heads of sizes that vLLM has attention for on a CPU
    "gemma": {"head_dim": 32},
    "mixtral": {},
    "deepseek_v2": LATENT,
}


def _save(rank, folder, target):
    parallel = join(LAYOUTS[0])
    model = build_model(folder, parallel, dtype=torch.float32, seed=None)
    load_hf(model, folder, parallel)
    save_hf(model, folder, target, parallel)


def _log_probs(rank, folder):
    """Return vLLM's log-probability of every token but the first of a sequence."""
    from megatron_opd.rollout import vllm_engine  # noqa: F401 - sets what vLLM reads on import

    from vllm import LLM, SamplingParams  # isort: skip

    llm = LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 26,
    )
    prompts = [{"prompt_token_ids": sequence.tolist()} for sequence in sequences()]
    how = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    return [
        told[token].logprob
        for answer in llm.generate(prompts, how, use_tqdm=False)
        for token, told in zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True)
        if told is not None
    ]


@pytest.mark.parametrize("family", OWN)
def test_a_saved_model_is_the_same_in_vllm(tmp_path, family):
    sizes = SIZES | OWN[family]
    folder = write_checkpoint(tmp_path / "source", family, **sizes)
    run_ranks(_save, 1, folder, tmp_path / "saved")
    (said,) = run_ranks(_log_probs, 1, tmp_path / "saved")
    logp_TV, ids = reference(hf_model(family, **sizes)).log_softmax(-1), sequences()
    expected = [
        row_V[token]
        for rows_LV, sequence in zip(logp_TV.split([len(s) for s in ids]), ids, strict=True)
        for row_V, token in zip(rows_LV[:-1], sequence[1:], strict=True)
    ]
    assert torch.stack(expected).std() > 0.5
    torch.testing.assert_close(torch.tensor(said), torch.stack(expected), rtol=0, atol=1e-4)
