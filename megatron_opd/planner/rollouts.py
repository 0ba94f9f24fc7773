"""What it takes to write the responses, and to give the engine the weights that write them."""

from dataclasses import replace
from math import ceil

from megatron_opd.planner.layout import Layout
from megatron_opd.planner.network import Network
from megatron_opd.planner.setting import Phase, Setting, exchange
from megatron_opd.planner.traffic import Flow

ELSEWHERE = ("replay", "vllm_server")  # engines that take no time of these ranks


def rollout(setting: Setting, layout: Layout) -> Phase:
    """Read the prompts and write the responses, a full batch at a time.

    A step of decoding reads the weights and the keys and values so far once, or multiplies, which
    takes longer; of the embedded engine, pipeline stages take turns.
    """
    section = setting.config.rollout
    if section.engine in ELSEWHERE:
        return Phase({})
    tp = section.tp if section.engine == "vllm" else layout.tp
    engines = setting.ranks // tp if section.engine == "vllm" else layout.dp * layout.cp
    own = ceil(setting.sequences / engines)
    batch = min(own, section.batch_size)
    network, waves = setting.student.at(Layout(tp=tp)), ceil(own / batch)
    told = exchange(setting, network.layout, _told(setting, network, batch, waves))
    decode, prefill = _decode(setting, network, batch), _prefill(setting, network, batch)
    parts = {"decode": waves * decode, "prefill": waves * prefill, **told.parts}
    return replace(told, parts=parts)


def _decode(setting: Setting, network: Network, batch: int) -> float:
    """Return the seconds in which a batch writes its responses."""
    context = setting.prompt + setting.response / 2
    ops = network.matrix_flops(0) + network.head_flops() + network.attention_flops(0) * context
    read = network.read_bytes(batch) + batch * context * network.cache_bytes()
    step = max(read / setting.rate("hbm"), batch * ops / setting.rate("prefill"))
    return setting.response * (step + network.arch.layers * setting.achieved.latency_s)


def _prefill(setting: Setting, network: Network, batch: int) -> float:
    """Return the seconds in which a batch of prompts is read; causal: half of all pairs."""
    ops = network.matrix_flops(0) * setting.prompt
    ops += network.attention_flops(0) * setting.prompt**2 / 2
    return batch * ops / setting.rate("prefill")


def _told(setting: Setting, network: Network, batch: int, waves: int) -> list[Flow]:
    """Return what an engine's tensor-parallel ranks add up: prompts at once, then tokens."""
    if network.layout.tp == 1:
        return []
    reduces = waves * (2 * network.arch.layers + 1)
    tokens = batch * (setting.prompt + setting.response)
    size = reduces * tokens * network.arch.hidden * network.width
    return [Flow("tp", "all_reduce", size, reduces * (1 + setting.response))]


def sync(setting: Setting, layout: Layout) -> Phase:
    """Stream the weights into vLLM: every rank gets each one whole."""
    if setting.config.rollout.engine != "vllm":
        return Phase({})
    size, tensors = setting.student.bytes, len(setting.student.rows)
    flows = [Flow("tp", "all_gather", size / layout.pp, tensors / layout.pp)]
    flows += [Flow("pp", "broadcast", size, tensors)]
    moved = exchange(setting, layout, [f for f in flows if layout.ranks(f.axis) > 1])
    copied = 2 * size / setting.rate("hbm")
    return replace(moved, parts={"copy": copied, **moved.parts})
