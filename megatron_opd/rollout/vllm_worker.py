"""What runs inside vLLM's workers: the receiving end of the weight stream.

vLLM imports this module by name (`worker_extension_cls`), in the trainer's process and in a
server's alike, and that registers the transfer engine. It wants vLLM and torch, not Megatron.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

BACKEND = "megatron_opd"
_OF_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)\.weight")


@dataclass
class _Init(WeightTransferInitInfo):
    pass


@dataclass
class _Bucket(WeightTransferUpdateInfo):
    """Whole tensors under their Hugging Face names: in memory, or in a file under /dev/shm."""

    weights: list[tuple[str, Tensor]] = field(default_factory=list)
    path: str | None = None


class BucketTransfer(WeightTransferEngine[_Init, _Bucket]):
    """Load buckets of tensors as vLLM loads a checkpoint, layer by layer.

    Plain `model.load_weights` fails on a CPU, and `reload_weights` leaves tied heads and mixtures
    of experts as they were: both hold packed copies that only their own processing renews.
    """

    init_info_cls, update_info_cls = _Init, _Bucket

    def init_transfer_engine(self, init_info: _Init) -> None:
        """Do nothing: there is no connection."""

    def start_weight_update(self) -> None:
        """Forget the weights; a layer is complete, and processed, once all its tensors came."""
        if current_platform.is_cpu():
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None  # experts are packed when their kernel is built
        initialize_layerwise_reload(self.model)
        self.loaded: set[str] = set()

    def receive_weights(self, update_info: _Bucket) -> None:
        """Load one bucket. What is given must not change before the update is finished."""
        weights: Any = update_info.weights
        if update_info.path is not None:
            weights = load_file(update_info.path).items()
        model: Any = self.model
        self.loaded |= set(model.load_weights(iter(weights)) or ())

    def finish_weight_update(self) -> None:
        """Process what is left, the second copy of tied weights too.

        Raises:
            RuntimeError: parameters that no tensor was for.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            self._pack_tied()
        missing = dict(_whole_shapes(self.model)).keys() - self.loaded
        if missing:
            raise RuntimeError(f"no weights came for {', '.join(sorted(missing))}")

    def _pack_tied(self) -> None:
        """Renew what a tied head packed of the table whose memory it shares."""
        tables: dict[int, list[Any]] = {}
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding):
                weight: Any = module.weight
                tables.setdefault(weight.data_ptr(), []).append(module)
        for shared in tables.values():
            heads: list[Any] = [table for table in shared if isinstance(table, ParallelLMHead)]
            for head in heads if len(shared) > 1 else ():
                head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Do nothing: nothing was opened."""


class Extension:
    """What every worker of vLLM can be asked besides (`collective_rpc`)."""

    model_runner: Any

    def accepts(self, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """Return what is wrong with tensors of these Hugging Face names and shapes: nothing, or.

        An update that has begun cannot be taken back, and a name that is missing keeps its old
        value without a word.
        """
        model = self.model_runner.model
        wanted = dict(_whole_shapes(model))
        given: dict[str, list[tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            given.setdefault(_fused(model, name), []).append(tuple(shape))
        problems = [f"{name}: its model has none" for name in given if name not in wanted]
        problems += [f"{name}: nothing comes for it" for name in wanted if name not in given]
        for name in given.keys() & wanted.keys():
            rows, columns = sum(shape[0] for shape in given[name]), given[name][0][1:]
            if (rows, *columns) != wanted[name]:
                problems.append(f"{name}: got {(rows, *columns)}, expected {wanted[name]}")
        return problems


def _fused(model: Any, name: str) -> str:
    """Return the parameter that a Hugging Face tensor becomes a part of."""
    expert = _OF_EXPERT.fullmatch(name)
    if expert:
        routed = f"{expert[1]}.routed_experts"
        down = expert[2] == model.get_submodule(routed).ckpt_down_proj_name
        return f"{routed}.{'w2' if down else 'w13'}_weight"
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        for part in parts:
            name = name.replace(f".{part}.", f".{fused}.")
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for part, (fused, _) in getattr(mapper, "orig_to_new_stacked", {}).items():
        name = name.replace(f"{part}.", f"{fused}.")
    return name


def _whole_shapes(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every parameter as it is before ranks cut it and a CPU packs it."""
    for prefix, module in model.named_modules():
        if prefix == "lm_head" and model.config.tie_word_embeddings:
            continue  # the embedding's, under a second name
        for kind, parameter in module.named_parameters(recurse=False):
            if isinstance(module, MLAAttention):
                continue  # made of kv_b_proj, and made again when an update is finished
            shape = tuple(parameter.shape)
            if isinstance(module, RoutedExperts):  # one tensor for all, as rows
                ranks = module.moe_config.moe_parallel_config.tp_size
                wide, hidden = module.intermediate_size_per_partition * ranks, module.hidden_size
                sizes = {"w13_weight": (2 * wide, hidden), "w2_weight": (hidden, wide)}[kind]
                shape = module.global_num_experts * sizes[0], sizes[1]
            elif isinstance(module, VocabParallelEmbedding):
                shape = module.org_vocab_size, module.embedding_dim
            elif isinstance(module, QKVParallelLinear):
                heads = module.total_num_heads + 2 * module.total_num_kv_heads
                shape = heads * module.head_size, module.input_size
            elif isinstance(module, LinearBase):
                shape = module.output_size, module.input_size
            yield f"{prefix}.{kind}", shape[:1] if kind == "bias" else shape


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)
