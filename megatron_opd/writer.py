"""A model that only writes: no optimizer, no gradients, no loop. What tools generate with.

    with Writer.open("Qwen3-0.6B", engine="vllm") as writer:
        prompts = load_prompts(writer.config.data, writer.tokenizer, ["aime24.parquet"])
        rollouts = writer.generate(prompts, n=4, sampling=Sampling(512, stop_ids=writer.stop_ids))

It works in one process and under torchrun, where what `tp` leaves over are replicas that share the
prompts out.
"""

import json
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_opd import build
from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.config_file import load_config
from megatron_opd.model import build_model, load_hf
from megatron_opd.preflight import check_writer
from megatron_opd.rollout import RolloutEngine, Sampling
from megatron_opd.types import Prompt, Rollout


class Writer:
    """Write responses with a Hugging Face directory; every rank calls every method.

    Opening checks everything that can be checked without weights; the first `generate` loads them.
    Its engines are those of a run, so vLLM gets its weights from Megatron's copy, which stays.
    """

    def __init__(self, config: cfg.Config, parallel: mesh.Parallel, *, leave: bool = False):
        self.config, self.parallel, self.leave = config, parallel, leave
        checked = parallel.owner(lambda: check_writer(config, parallel.world))
        self.tokenizer, self.vocab_size, self.stop_ids = checked
        self.synced = False

    @classmethod
    def open(
        cls,
        path: str,
        *,
        engine: str = "megatron",
        tp: int = 1,
        dtype: str = "bfloat16",
        max_prompt_tokens: int = 1024,
        max_tokens: int = 7168,
        batch_size: int = 64,
        vllm: dict[str, Any] | None = None,
        url: str | None = None,
        data: dict[str, Any] | None = None,
        parallel: mesh.Parallel | None = None,
    ) -> Self:
        """Check `path` and its engine, and join the process groups.

        Names and meanings are those of a run's config; `data` has further keys of that section,
        which is then `config.data`. With `parallel`, groups that exist are used, and stay when the
        writer is closed: several writers may share them.

        Raises:
            ValueError: one line.
        """
        tp, pp = (parallel.tp, parallel.pp) if parallel else (tp, 1)
        keys: dict[str, Any] = {
            "student": {"path": path, "dtype": dtype},
            # experts that are split want sequences cut, though only their training needs it
            "parallel": {"tp": tp, "pp": pp, "sequence_parallel": tp > 1},
            "data": {"prompts": ["-"], "max_prompt_tokens": max_prompt_tokens, **(data or {})},
            "rollout": {"engine": engine, "max_tokens": max_tokens, "batch_size": batch_size},
            # the one objective without a teacher; nothing is trained
            "objective": {"divergence": "cross_entropy", "support": "sampled", "k": 1},
            "train": {"microbatch_tokens": max_prompt_tokens + max_tokens},
            "vllm": vllm or {},
        }
        keys["rollout"] |= {"tp": tp} if engine == "vllm" else {}
        keys["rollout"] |= {"url": url} if url is not None else {}
        config = load_config([], [f"{name}={json.dumps(value)}" for name, value in keys.items()])
        if parallel is not None:
            return cls(config, parallel)
        joined = mesh.initialize(tp, sequence_parallel=tp > 1)
        try:
            return cls(config, joined, leave=True)
        except ValueError:
            mesh.shutdown()
            raise

    @cached_property
    def engine(self) -> RolloutEngine:
        """The engine, with the weights; collective."""
        path = self.config.student.path
        model = build_model(
            path,
            self.parallel,
            dtype=build.DTYPES[self.config.student.dtype],
            trainable=False,
            seed=None,
        )
        load_hf(model, path, self.parallel, vocab_size=self.vocab_size)
        return build.drawing_engine(self.config, model, self.parallel, self.vocab_size)

    def generate(
        self, prompts: list[Prompt], *, n: int = 1, sampling: Sampling, seed: int = 0
    ) -> list[Rollout]:
        """Return `n` rollouts per prompt, in prompt order, on every rank.

        A response depends on `seed`, its prompt's index and its number among the n, and not on
        which other prompts are asked with it, beyond the rounding of batched matrix products.
        """
        if not self.synced or self.config.rollout.engine == "vllm":
            # vLLM gives weights and memory back after every call; a server keeps what it was sent
            self.engine.sync()
            self.synced = True
        parallel = self.parallel
        mine = prompts[parallel.dp_rank :: parallel.dp]
        rollouts = self.engine.generate(mine, n=n, sampling=sampling, seed=seed)
        told: list[Any] = [None] * parallel.dp
        dist.all_gather_object(told, rollouts, group=parallel.dp_group)
        joined: list[list[Rollout]] = [[] for _ in prompts]
        for replica, written in enumerate(told):
            for place in range(0, len(written), n):
                joined[replica + place // n * parallel.dp] = written[place : place + n]
        return [rollout for of_one in joined for rollout in of_one]

    def close(self) -> None:
        """Let the engine go, and leave the groups that `open` joined."""
        if "engine" in vars(self):
            self.engine.close()
        if self.leave:
            mesh.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
