"""The co-located engine: vLLM inside the trainer's processes, asleep while the student trains.

`tp` neighbouring ranks of a tensor-parallel group make one engine, so a replica of tp × pp trainer
ranks holds tp × pp / `tp` engines: they share its requests out and join the answers. Weights stream
from rank to rank in memory, bucket by bucket; no file, and no second copy of the model.

Shape suffixes: T tokens of a response · K = 1 + the most likely ids that were asked for.
"""

import gc
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd import platform
from megatron_opd.model import Stage, export_hf
from megatron_opd.model.hf_map import manifest
from megatron_opd.model.weights import exported
from megatron_opd.parallel import Parallel
from megatron_opd.rollout.requests import Request, answered, buckets, make_requests
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.types import Prompt, Rollout

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from megatron_opd.rollout import vllm_worker

warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated")  # vLLM's

_Answer = tuple[np.ndarray, np.ndarray, Literal["stop", "length"]]  # ids_TK, logp_TK, why it ended
_ENVIRONMENT = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "LD_LIBRARY_PATH")  # what vLLM overwrites


class VllmEngine:
    """Generate with vLLM on the student's own ranks.

    Every rank of a replica calls every method and gets the same rollouts. `options` are fields of
    vLLM's EngineArgs. Ids at or above `vocab_size` do not exist for the engine.

    Raises:
        ValueError: what vLLM finds wrong with its options.
    """

    def __init__(
        self,
        model: Stage,
        parallel: Parallel,
        *,
        folder: str,
        vocab_size: int,
        tp: int,
        batch_size: int,
        max_length: int,
        seed: int,
        options: dict[str, Any],
        bucket_bytes: int = 2**28,
    ):
        self.model, self.parallel, self.vocab_size = model, parallel, vocab_size
        self.bucket_bytes, self.version, self.awake = bucket_bytes, 0, False
        self.cpu = parallel.device.type == "cpu"
        self.engines = parallel.replica_size // tp  # of this replica
        column = parallel.pp_rank * parallel.cp + parallel.cp_rank
        self.engine = (column * parallel.tp + parallel.tp_rank) // tp  # this rank's
        self.speaks = parallel.tp_rank % tp == 0  # one rank of an engine tells the others
        self.host = _Host(seed)
        fields = self.fields(folder, tp, batch_size, max_length) | options
        with self.host.apart():
            try:
                self.llm = LLM(**fields)
            except (ValueError, TypeError) as error:  # its options are checked in many places
                raise ValueError(f"vllm: {' '.join(str(error).split())}") from None
            self.llm.init_weight_transfer_engine({"init_info": {}})
        self._sleep()

    def fields(self, folder: str, tp: int, batch_size: int, max_length: int) -> dict[str, Any]:
        """Return the fields of vLLM's EngineArgs that are not the user's to set."""
        dtype = self.model.config.params_dtype
        fields: dict[str, Any] = {
            "model": folder,
            "load_format": "dummy",  # the first sync brings the weights
            "hf_overrides": {"vocab_size": self.vocab_size},
            "generation_config": "vllm",
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_length,
            "max_num_seqs": batch_size,
            "tensor_parallel_size": tp,
            "distributed_executor_backend": "external_launcher",
            "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from
            "max_logprobs": -1,
            "weight_transfer_config": {"backend": vllm_worker.BACKEND},
            "worker_extension_cls": f"{vllm_worker.__name__}.Extension",
            "disable_log_stats": True,
        }
        if not self.cpu:
            return fields | {"enable_sleep_mode": True, "gpu_memory_utilization": 0.4}
        token = self.model.architecture.cache_elements(tp) * dtype.itemsize
        return fields | {
            "enforce_eager": True,
            "worker_cls": "megatron_opd.rollout.vllm_cpu_worker.CpuWorker",
            "kv_cache_memory_bytes": max(2**26, batch_size * (max_length + 128) * token),
        }

    def sync(self) -> None:
        """Stream the student's weights into the engine, which wakes up; collective.

        Raises:
            ValueError: the engine's model has other tensors than the student.
        """
        self.version += 1
        shapes = manifest(exported(self.model, self.vocab_size))
        with self.host.apart():
            self._wake("weights")
            for problem in self.llm.collective_rpc("accepts", args=(shapes,))[0]:
                raise ValueError(f"rollout.engine: vLLM does not take the student: {problem}")
            self.llm.start_weight_update()
            stream = export_hf(self.model, self.parallel, vocab_size=self.vocab_size)
            for bucket in buckets(stream, self.bucket_bytes):
                self.llm.update_weights({"update_info": {"weights": bucket}})
            self.llm.finish_weight_update(str(self.version))
            self._wake("kv_cache")
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache, which the old weights filled")
        self.awake = True

    def generate(
        self, prompts: list[Prompt], *, n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """Return `n` rollouts per prompt in prompt order, and sleep; `seed` names the draw."""
        assert self.awake, "sync first: generating while asleep would never end"
        requests = make_requests(prompts, n, seed)
        mine = requests[self.engine :: self.engines]
        with self.host.apart():
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(request.prompt.token_ids)} for request in mine],
                [sampling_params(request, sampling) for request in mine],
                use_tqdm=self.parallel.is_main and sys.stderr.isatty(),
            )
            self._sleep()
        said = [_answer(output.outputs[0], sampling.top_ids) for output in outputs]
        return [
            answered(request, *answer, version=self.version)
            for request, answer in zip(requests, self._join(said, len(requests)), strict=True)
        ]

    def _join(self, said: list[_Answer], count: int) -> list[_Answer]:
        """Return all engines' answers in the order of the requests, the same on every rank."""
        if self.parallel.replica_size == 1:
            return said
        # ranks of an engine compute the same tokens; that they do is not left to rounding
        told: list[Any] = [None] * self.parallel.replica_size
        mine = (self.engine, said) if self.speaks else None
        dist.all_gather_object(told, mine, group=self.parallel.replica_group)
        joined: list[Any] = [None] * count
        for engine, answers in filter(None, told):
            joined[engine :: self.engines] = answers
        return joined

    def _wake(self, part: str) -> None:
        if not self.cpu:  # a CPU has nowhere to move the memory to
            self.llm.wake_up(tags=[part])

    def _sleep(self) -> None:
        """Give back weights and cache: the next sync brings both."""
        self.awake = False
        if not self.cpu:
            self.llm.sleep(level=2)

    def close(self) -> None:
        """Take the engine apart. Takes the process groups with it: the last thing a job does."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


class _Host:
    """The process that vLLM is a guest in: what it changes there is put back.

    vLLM draws from, and reseeds, the process-wide generators; it gets a set of its own.
    """

    def __init__(self, seed: int):
        self.seed, self.guest = seed, None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Run vLLM's code: with its own random state, without Megatron's substitutions."""
        host, environment, set_num_threads = _generators(), dict(os.environ), torch.set_num_threads
        if self.guest is None:
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)
            torch.manual_seed(self.seed)
        else:
            _restore(self.guest)
        # on a CPU, where nothing else is compiled, compiling the sampler only costs seconds
        eager = torch._dynamo.config.patch(disable=not torch.cuda.is_available())
        try:
            with platform.suspended(), eager:
                yield
        finally:
            self.guest = _generators()
            _restore(host)
            torch.set_num_threads = set_num_threads  # a CPU worker makes it do nothing
            for name in _ENVIRONMENT:
                os.environ.pop(name, None)
                if name in environment:
                    os.environ[name] = environment[name]


def _generators() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])


def sampling_params(request: Request, sampling: Sampling) -> SamplingParams:
    """Return what vLLM is told of one request."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=request.seed,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # the ids that stop are listed
        logprobs=sampling.top_ids,
        flat_logprobs=True,
        detokenize=False,
    )


def _answer(output: Any, top: int) -> _Answer:
    """Read vLLM's flat lists: at every token the drawn id comes first, then the `top` ids."""
    shape = len(output.token_ids), 1 + top
    ids_TK = np.array(output.logprobs.token_ids, dtype=np.int32).reshape(shape)
    logp_TK = np.array(output.logprobs.logprobs, dtype=np.float32).reshape(shape)
    return ids_TK, logp_TK, output.finish_reason
