"""Measure what generation and the sync of weights cost: vLLM alone, co-located, and the student."""

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megatron_opd.rollout import Sampling
from megatron_opd.rollout.vllm_options import INSTALL, installed
from megatron_opd.tables import markdown
from megatron_opd.types import Prompt

DESCRIPTION = """\
Generation: seconds of the same requests in vLLM alone (its own process, no Megatron), in the
co-located engine (its sleep and the way to rollouts included) and in the embedded engine, without
and with the most likely ids. Sync: seconds from the student's weights to an engine that is awake,
beside one copy of as many bytes on the same device. Memory: what a process grows by from its 5th
sync to the last, and what sleep gives back on a GPU. Values are medians; repeats are interleaved,
and a ratio is the median of the rounds' ratios. Models are Qwen3 with random weights: a tiny one,
and for the timed syncs one of 110 M parameters; a flag for the size counts for both. Targets are
for these sizes, on two cores."""
COLUMNS = ("measured", "median", "a second", "ratio", "target")
SETTLED = 5  # syncs after which memory is to stay as it is
LIMITS = {"a sync": "< 0.5 s", "growth": "≤ 4 MiB", "co-located": "≤ 1.20"}
TRANSPORT = (  # of the co-located engine's options, what vLLM alone has no use for
    "load_format",
    "weight_transfer_config",
    "worker_extension_cls",
    "worker_cls",
    "distributed_executor_backend",
    "enable_sleep_mode",
)


@dataclass(frozen=True)
class Size:
    """A Qwen3 with attention heads of 64."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int


TINY = Size(layers=2, hidden=128, ffn=384, heads=2, vocab=1024)
STUDENT = Size(layers=12, hidden=768, ffn=2048, heads=12, vocab=32000)  # 110 M, tied


@dataclass(frozen=True)
class Row:
    """One measured quantity, and what it is compared with in the same run."""

    measured: str
    value: float
    unit: str
    repeats: list[float] = field(default_factory=list)
    rate: float | None = None
    rate_unit: str = ""
    ratio: float | None = None
    of: str = ""
    target: str = ""


def make_folder(size: Size, folder: Path, positions: int) -> Path:
    """Write a configuration and a tokenizer, whose tokens are numbers; return the folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(id): id for id in range(size.vocab)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="0")
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": 64,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,  # as every small Qwen3
        "hidden_act": "silu",
        "initializer_range": 0.02,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_prompts(options: argparse.Namespace, size: Size) -> list[Prompt]:
    """Draw prompts of one length."""
    generator = torch.Generator().manual_seed(0)
    shape = options.prompts, options.prompt_tokens
    rows = torch.randint(size.vocab, shape, generator=generator).tolist()
    return [Prompt(index, tuple(row), "") for index, row in enumerate(rows)]


def make_engine(options: argparse.Namespace, size: Size, folder: Path):
    """Build a student and the co-located engine beside it."""
    from megatron_opd import parallel as mesh
    from megatron_opd.model import build_model
    from megatron_opd.rollout.vllm_engine import VllmEngine

    parallel = mesh.initialize()
    length = options.prompt_tokens + options.max_tokens
    source = make_folder(size, folder, length)
    return VllmEngine(
        build_model(source, parallel, dtype=getattr(torch, options.dtype)),
        parallel,
        folder=str(source),
        vocab_size=size.vocab,
        tp=1,
        batch_size=options.prompts,
        max_length=length,
        seed=0,
        options={},
    )


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call takes until the device is done, and its value."""
    _wait()
    start = time.perf_counter()
    value = function()
    _wait()
    return time.perf_counter() - start, value


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# What runs in a process of its own: each function prepares, and returns what measures.

Answer = tuple[float, list[list[int]]]  # seconds, token ids of every response


def engines(options: argparse.Namespace, folder: Path) -> Callable[[str, int], Answer]:
    """Prepare the co-located and the embedded engine; write down what vLLM alone is to do."""
    from megatron_opd.model import save_hf
    from megatron_opd.rollout import vllm_engine
    from megatron_opd.rollout.megatron import MegatronEngine
    from megatron_opd.rollout.requests import make_requests

    size, batch = sized(options, TINY), options.prompts
    located = make_engine(options, size, folder / "source")
    embedded = MegatronEngine(
        located.model, located.parallel, vocab_size=size.vocab, batch_size=batch
    )
    prompts = make_prompts(options, size)
    samplings = {k: Sampling(options.max_tokens, top_ids=k) for k in (0, options.top_ids)}

    weights, length = folder / "weights", options.prompt_tokens + options.max_tokens
    save_hf(located.model, folder / "source", weights, located.parallel)
    fields = located.fields(str(weights), 1, batch, length)
    requests = make_requests(prompts, 1, 0)
    parameters = {
        k: [vllm_engine.sampling_params(r, s) for r in requests] for k, s in samplings.items()
    }
    same = {name: value for name, value in fields.items() if name not in TRANSPORT}
    (folder / "alone.pickle").write_bytes(pickle.dumps((same, prompts, parameters)))

    def measure(who: str, k: int) -> Answer:
        engine = {"co-located": located, "embedded": embedded}[who]
        engine.sync()
        generate = partial(engine.generate, prompts, n=1, sampling=samplings[k], seed=0)
        took, rollouts = seconds(generate)
        return took, [list(rollout.response_ids) for rollout in rollouts]

    return measure


def alone(options: argparse.Namespace, folder: Path) -> Callable[[int], Answer]:
    """Prepare vLLM as anybody runs it, with the same options, weights and requests."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch._dynamo.config.disable = not torch.cuda.is_available()  # as the co-located engine has it
    from vllm import LLM

    @cache  # when first asked: by then the other process has written what, and has gone to sleep
    def load() -> tuple[LLM, list[dict[str, Any]], dict[int, Any]]:
        fields, prompts, parameters = pickle.loads((folder / "alone.pickle").read_bytes())
        inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        return LLM(**fields), inputs, parameters

    def measure(k: int) -> Answer:
        llm, inputs, parameters = load()
        llm.reset_prefix_cache()  # as after a sync
        took, outputs = seconds(lambda: llm.generate(inputs, parameters[k], use_tqdm=False))
        return took, [list(output.outputs[0].token_ids) for output in outputs]

    return measure


def student(options: argparse.Namespace, folder: Path) -> Callable[[], dict[str, float]]:
    """Prepare syncs of the larger model."""
    return syncs(options, sized(options, STUDENT), folder)


def tiny(options: argparse.Namespace, folder: Path) -> Callable[[], dict[str, float]]:
    """Prepare syncs of the tiny one: 100 MB that come and go would hide what does not go."""
    return syncs(options, sized(options, TINY), folder)


def syncs(options: argparse.Namespace, size: Size, folder: Path) -> Callable[[], dict[str, float]]:
    """Prepare a sync, beside a copy of as many bytes; seconds, and the memory afterwards."""
    from megatron_opd.model import export_hf

    engine, prompts = make_engine(options, size, folder), make_prompts(options, size)[:1]
    tensors = export_hf(engine.model, engine.parallel, vocab_size=size.vocab)
    count = sum(tensor.nbytes for _, tensor in tensors)
    source = torch.ones(count, dtype=torch.uint8, device=engine.parallel.device)
    target = source.clone()

    def measure() -> dict[str, float]:
        sync, awake = seconds(engine.sync)[0], _on_device("awake")
        engine.generate(prompts, n=1, sampling=Sampling(1), seed=0)  # and sleep
        asleep, copy = _on_device("asleep"), seconds(lambda: target.copy_(source))[0]
        resident = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
        memory = {"resident": int(resident) / 2**10, **awake, **asleep}
        return {"bytes": count, "sync": sync, "copy": copy, **memory}

    return measure


def _on_device(when: str) -> dict[str, float]:
    """Return MiB in use on the GPU, where there is one, and how many of them torch allocated."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    return {when: (total - free) / 2**20, f"{when}, allocated": allocated / 2**20}


def _serve(prepare: Callable[..., Callable], options: argparse.Namespace, folder, pipe) -> None:
    torch.set_num_threads(options.threads)
    measure = prepare(options, folder)
    with suppress(EOFError, BrokenPipeError):  # the asker is done
        while True:
            pipe.send(measure(*pipe.recv()))


@contextmanager
def process(prepare: Callable[..., Callable], *args: Any) -> Iterator[Callable]:
    """Start a fresh process; yield the function that asks it to measure. It waits meanwhile.

    Raises:
        RuntimeError: it died; it has told why.
    """
    print(f"{prepare.__name__} ...", file=sys.stderr)
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(prepare, *args, theirs))
    child.start()
    theirs.close()

    def ask(*question: Any) -> Any:
        pipe.send(question)
        return pipe.recv()

    try:
        yield ask
    except (EOFError, BrokenPipeError):
        raise RuntimeError(f"the process of {prepare.__name__} died, see above") from None
    finally:
        pipe.close()
        child.join()


def generation(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure the three engines with and without most likely ids, in turns.

    Raises:
        RuntimeError: vLLM alone drew other tokens than the co-located engine on a CPU.
    """
    times: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(process(engines, options, folder))
        theirs = stack.enter_context(process(alone, options, folder))
        for _ in range(1 + options.repeats):
            for k in (0, options.top_ids):
                answers = {
                    "co-located": ours("co-located", k),
                    "embedded": ours("embedded", k),
                    "vLLM alone": theirs(k),
                }
                for who, (took, _) in answers.items():
                    times.setdefault((who, k), []).append(took)
                same = answers["vLLM alone"][1] == answers["co-located"][1]
                if not same and not torch.cuda.is_available():
                    raise RuntimeError("vLLM alone drew other tokens: it did other work")
    return [_generated(options, times, who, k) for k in (0, options.top_ids) for who in OTHER]


OTHER = {"vLLM alone": "", "co-located": "vLLM alone", "embedded": "co-located"}


def _generated(options: argparse.Namespace, times: dict, who: str, k: int) -> Row:
    """Return the row of an engine, compared with the engine above it."""
    repeats, other = times[who, k][1:], OTHER[who]
    median = statistics.median(repeats)
    return Row(
        f"generation, {who}" + (f", {k} ids" if k else ""),
        median,
        "s",
        repeats,
        rate=options.prompts * options.max_tokens / median,
        rate_unit="tokens",
        ratio=_ratio(repeats, times[other, k][1:]) if other else None,
        of=other,
        target=LIMITS.get(who, ""),
    )


def _ratio(mine: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))


def synchronisation(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure syncs and plain copies in turns; on a GPU also its memory, awake and asleep."""
    with process(student, options, folder) as ask:
        counts = [ask() for _ in range(1 + options.repeats)]
    series = {name: [count[name] for count in counts] for name in counts[0]}
    count, _ = int(series.pop("bytes")[0]), series.pop("resident")
    mine, copies = (series.pop(name)[1:] for name in ("sync", "copy"))
    sync, copy = statistics.median(mine), statistics.median(copies)
    size, ratio, target = f"{count / 2**20:.0f} MiB", _ratio(mine, copies), LIMITS["a sync"]
    return [
        Row(f"copy of {size}", copy, "s", copies, count / copy / 1e9, "GB"),
        Row(f"sync of {size}", sync, "s", mine, count / sync / 1e9, "GB", ratio, "copy", target),
        *_on_gpu(series),
    ]


def growth(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure what a process grows by from sync to sync."""
    with process(tiny, options, folder) as ask:
        resident = [ask()["resident"] for _ in range(options.syncs)]
    grown, span = resident[-1] - resident[SETTLED - 1], f"{SETTLED} to {options.syncs}"
    return [Row(f"growth, sync {span}", grown, "MiB", resident, target=LIMITS["growth"])]


def _on_gpu(series: dict[str, list[float]]) -> list[Row]:
    """Return the rows of a GPU's memory, and of what sleep gives back."""
    if not series:
        return []
    given = [a - b for a, b in zip(series["awake"], series["asleep"], strict=True)]
    return [
        Row(f"GPU, {name}", statistics.median(values), "MiB", values)
        for name, values in {**series, "given back by sleep": given}.items()
    ]


def sized(options: argparse.Namespace, default: Size) -> Size:
    """Return a size, as far as the user did not give another."""
    sizes = asdict(default).items()
    return Size(**{name: getattr(options, name) or value for name, value in sizes})


def cells(row: Row) -> list[str]:
    """Return the columns of a row of the table."""
    return [
        row.measured,
        f"{row.value:.3f} s" if row.unit == "s" else f"{row.value:.1f} {row.unit}",
        "" if row.rate is None else f"{row.rate:.4g} {row.rate_unit}",
        "" if row.ratio is None else f"{row.ratio:.2f} × {row.of}",
        row.target,
    ]


def table(rows: list[Row]) -> str:
    """Return an aligned Markdown table, and a line about what is left out."""
    text = markdown(COLUMNS, [cells(row) for row in rows])
    if not any(row.measured.startswith("GPU") for row in rows):
        text += "\nleft out: the memory that sleep gives back, there is no GPU"
    return text


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    for name in asdict(TINY):
        tiny, student = getattr(TINY, name), getattr(STUDENT, name)
        parser.add_argument(f"--{name}", type=int, help=f"of both models ({tiny}; {student})")
    for name, default, text in (
        ("prompts", 64, "prompts, all generated at once"),
        ("prompt-tokens", 32, "length of a prompt"),
        ("max-tokens", 64, "length of every response"),
        ("top-ids", 16, "most likely ids that come with a token"),
        ("repeats", 7, "times that everything is timed, after one to warm up"),
        ("syncs", 50, "syncs of the tiny model, after each of which memory is looked at"),
        ("threads", 1, "threads of a process"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Find what the user got wrong before any process starts.

    Raises:
        ValueError: one line: key, got, expected, fix.
    """
    least = {"syncs": SETTLED + 1}
    for name, value in vars(options).items():
        if isinstance(value, int) and value < least.get(name, 1):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: got {value}, expected {least.get(name, 1)} or more")
    vocab = sized(options, TINY).vocab
    if options.top_ids > vocab:
        raise ValueError(f"--top-ids: got {options.top_ids}, expected at most --vocab {vocab}")
    if not installed():
        raise ValueError(f"vLLM: is not installed; {INSTALL}")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    options = arguments(argv)
    try:
        check(options)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes started from here
    rows = []
    for measure in (generation, synchronisation, growth):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(options, Path(folder))
    options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
