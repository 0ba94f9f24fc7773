"""How many bytes a run needs on its fullest rank: arithmetic on config.json, nothing is allocated.

All of it is a GPU's: activations are the tensors that the portable layers keep for their backward
there, and the loss takes the memory that it takes there. Not counted: what lives within one layer,
communication buffers, the CUDA context, and what the allocator cannot reuse.
"""

import math
from collections.abc import Mapping

from megatron_opd.config import Config, Frozen, Teacher, losses
from megatron_opd.loss import Objective, Total
from megatron_opd.loss.shard import ARITHMETIC, chunk_tokens
from megatron_opd.model import Architecture, architecture, padded_vocab
from megatron_opd.model.hf_map import manifest, weights

WIDTH = {"bfloat16": 2, "float32": 4}  # bytes
Memory = dict[str, dict[str, int]]  # phase → what → bytes
Judges = Mapping[str, tuple[Frozen, str]]  # name → section and payload


def count_parameters(path: str) -> int:
    """Return the parameters of a Hugging Face directory's network, tied ones once."""
    return sum(math.prod(shape) for shape in manifest(architecture(path)).values())


def peak(memory: Memory) -> int:
    """Return the bytes of the phase that needs most, with what is always there."""
    phases = {phase: sum(parts.values()) for phase, parts in memory.items()}
    return phases.pop("always") + max(phases.values())


def estimate(config: Config, objective: Objective | Total, judges: Judges, dp: int) -> Memory:
    """Return what is always there, and what each phase of a step adds to it."""
    student = architecture(config.student.path)
    memory: Memory = {
        "always": _training_state(config, student, dp),
        "rollout": {},
        "score": {},
        "train": _training(config, objective, judges, student),
    }
    engine = config.rollout.engine
    if engine == "vllm":
        memory["rollout"] = _vllm(config, student)
    elif engine == "megatron" or (engine == "replay" and config.eval.prompts):
        memory["rollout"]["key-value cache"] = _cache(config, student, dp)
    if judges:
        _add_judges(memory, config, judges, dp)
    return memory


def _training_state(config: Config, student: Architecture, dp: int) -> dict[str, int]:
    size = _fullest_stage(student, config.parallel.tp, config.parallel.pp)
    width = WIDTH[config.student.dtype]
    # two running means, and the float32 weights behind bfloat16 ones
    states = size * (12 if width == 2 else 8)
    return {
        "student weights": size * width,
        "gradients, float32": size * 4,
        "optimizer states": states // (dp if config.optimizer.distributed else 1),
    }


def _fullest_stage(arch: Architecture, tp: int, pp: int) -> int:
    """Return the parameters on one rank of the pipeline stage that has most."""
    stages = [0] * pp
    for weight in weights(arch):
        size = sum(math.prod(shape) for shape in weight.hf.values())
        if weight.vocab:
            size = size // arch.vocab_rows * padded_vocab(arch.vocab_rows, tp)
        if weight.cut is not None:
            size //= tp
        stages[weight.layer * pp // arch.layers] += size
        if weight.vocab and arch.tied and pp > 1:  # the last stage keeps a copy as its head
            stages[-1] += size
    return max(stages)


def _vllm(config: Config, student: Architecture) -> dict[str, int]:
    """What a full batch needs; on a GPU vLLM takes all of its gpu_memory_utilization."""
    tokens = config.rollout.batch_size * config.longest_sequence
    width, tp = WIDTH[config.student.dtype], config.rollout.tp
    return {
        "vLLM weights": count_parameters(config.student.path) * width // tp,
        "vLLM key-value cache": tokens * student.cache_elements(tp) * width,
    }


def _cache(config: Config, student: Architecture, dp: int) -> int:
    """Keys and values of the sequences that are decoded together, at their longest."""
    parallel, rollout, prompt = config.parallel, config.rollout, config.data.max_prompt_tokens
    tokens = 0
    if rollout.engine == "megatron":
        sequences = min(rollout.batch_size, config.train.prompts_per_step // dp * rollout.n)
        tokens = sequences * (prompt + rollout.max_tokens)
    if config.eval.prompts:  # of which there may be enough for a full batch
        longest = prompt + (config.eval.max_tokens or rollout.max_tokens)
        tokens = max(tokens, rollout.batch_size * longest)
    size = tokens * student.cache_elements() * WIDTH[config.student.dtype]
    return size // (parallel.tp * parallel.pp)


def _training(
    config: Config, objective: Objective | Total, judges: Judges, student: Architecture
) -> dict[str, int]:
    columns = padded_vocab(student.vocab_rows, config.parallel.tp) // config.parallel.tp
    width = WIDTH[config.student.dtype]
    tokens = objective.chunk_tokens or chunk_tokens(
        columns, width, "cuda", dense_gradient=objective.over_vocabulary
    )
    hidden = {name for name, (_, payload) in judges.items() if payload == "hidden"}
    models = 1 + len(hidden & {"base"}) + bool(hidden - {"base"})  # a sample has one teacher
    # of the part of a chunk that arithmetic works on: its own, and float32 copies of bfloat16
    buffers = (8 if judges else 4) + (models if width == 2 else 0)
    return {
        "activations": _activations(config, student),
        "logits of a chunk": models * tokens * columns * width,
        "arithmetic on them, float32": buffers * min(tokens * columns, ARITHMETIC["cuda"]) * 4,
    }


def _activations(config: Config, student: Architecture) -> int:
    parallel, hidden = config.parallel, student.hidden
    # elements per token of a layer: inputs and outputs of its norms
    shared = hidden / (parallel.tp if parallel.sequence_parallel else 1)
    # queries projected, copied for their norm, rotated, and their outputs in two layouts; keys
    # projected and rotated; values
    queries = 4 + student.qk_norm - (config.train.recompute == "selective")
    attention = (queries * student.heads + 3 * student.kv_heads) * student.head_dim
    # gate, up, silu(gate), a second up (Megatron adds 0 to it), the product; cosines and sines
    layer = 4 * shared + (attention + 5 * student.ffn) / parallel.tp + 4 * student.head_dim
    layers = student.layers // parallel.pp
    kept = shared * layers + layer if config.train.recompute == "full" else layer * layers
    in_flight = parallel.pp  # microbatches that the first stage holds
    width = WIDTH[config.student.dtype]
    return int(kept * config.train.microbatch_tokens * width * in_flight)


def _add_judges(memory: Memory, config: Config, judges: Judges, dp: int) -> None:
    kept, away, k = {}, {}, max(loss.k for loss in losses(config).values())
    tokens = config.train.prompts_per_step // dp * config.rollout.n * config.rollout.max_tokens
    for name, (section, payload) in judges.items():
        _add_weights(memory["always"], away, config, name, section, payload == "hidden")
        hidden, width = architecture(config.folder(section)).hidden, _width(config, section)
        what, per_token = {
            "hidden": ("hidden states", hidden * width),
            "topk": ("top k", k * (8 + 4)),  # int64 ids, float32 logarithms
            "sampled": ("log-probabilities", 4),
        }[payload]
        kept[name] = f"{name} {what}", tokens * per_token
    teachers = [kept.pop(name) for name in list(kept) if name != "base"]
    found = dict(kept.values())
    if teachers:  # a sample has one of them
        found |= [max(teachers, key=lambda answer: answer[1])]
    if away:  # they come one after the other
        largest = max(away, key=lambda name: away[name])
        memory["score"][largest] = away[largest]
    memory["score"] |= found
    memory["train"] |= found


def _add_weights(
    always: dict[str, int],
    away: dict[str, int],
    config: Config,
    name: str,
    section: Frozen,
    keeps_head: bool,
) -> None:
    """Add a judge's weights where they are between uses; `keeps_head`: the loss needs its head."""
    weights = section.weights if isinstance(section, Teacher) else "file"
    if weights == "live":  # the student's
        return
    arch, width = architecture(config.folder(section)), _width(config, section)
    elements = _fullest_stage(arch, config.parallel.tp, config.parallel.pp)
    size, head = elements * width, 0
    if section.offload and keeps_head:
        columns = padded_vocab(arch.vocab_rows, config.parallel.tp) // config.parallel.tp
        head = always[f"{name} head"] = columns * arch.hidden * width
    (away if section.offload else always)[f"{name} weights"] = size - head
    if weights == "ema" and width == 2 and not section.offload:
        always[f"{name} mean, float32"] = elements * 4


def _width(config: Config, section: Frozen) -> int:
    """Return the bytes of a judge's weight."""
    return WIDTH[section.dtype or config.student.dtype]
