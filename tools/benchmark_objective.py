"""Measure the objective against a linear layer + Megatron-Core's cross entropy on the same inputs.

Shape suffixes: T tokens · C tokens at once · H hidden size · V vocabulary (this rank's rows of a
head, all columns of logits) · K support size.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from megatron_opd import parallel as mesh
from megatron_opd import platform
from megatron_opd.loss import Objective
from megatron_opd.tables import markdown
from megatron_opd.types import Head, HiddenScores, Microbatch, SampledScores, TopKScores

DESCRIPTION = """\
Time, memory and gradient error of the loss, forward and backward: from hidden states to their
gradient and the head's. The baseline is a linear layer followed by Megatron-Core's
vocab_parallel_cross_entropy: three products of the size of the head. Repeats are interleaved with
the baseline's; ratios are of medians, and beside them stands what they should be at most. Memory
is the peak of a process of its own above what lay there before, without the two gradients. Errors
are against float64, over the first 128 tokens and the whole vocabulary: the largest, relative to
the largest entry of the gradient, and the norm, relative to the gradient's."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SHAPE = ("tokens", "vocab", "hidden", "k", "tp", "dtype")
RATIO = ("× baseline", "target")
COLUMNS = ("loss", "s", *RATIO, "MiB", *RATIO, "largest error", "norm of error")
ERROR_TOKENS, TOKENS_AT_ONCE, ROWS_AT_ONCE, PAGE = 128, 64, 8192, 4096


@dataclass(frozen=True)
class Row:
    """A loss by its definition D = Σ_{v∈S} f(s_v, t_v), who computes it, what is asked of it."""

    definition: str
    support: str
    normalize: str | None = None  # of a top-k support: support | vocab
    scores: str = "hidden"  # what is given of the teacher: hidden | topk | sampled
    tail: bool = False
    time: float | None = None  # target, as a ratio to the baseline
    memory: float | None = None  # likewise
    peer: Callable[["Inputs"], Callable[..., Tensor]] | None = None  # None: ours


# f of s = log p of the student and t = log q of the teacher; of one draw, what has its gradient
DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda s, t: -s,
    "policy_gradient": lambda s, t: (s - t).detach() * s,
    "reverse_kl": lambda s, t: s.exp() * (s - t),
    "forward_kl": lambda s, t: t.exp() * (t - s),
    "jsd": lambda s, t: (t.exp() * (t - _mean(s, t)) + s.exp() * (s - _mean(s, t))) / 2,
}


def _mean(s: Tensor, t: Tensor) -> Tensor:
    return torch.logaddexp(s, t) - s.new_tensor(2.0).log()


# Peers: imported only when asked for. Each loader returns a function of the student's logits and
# of the teacher's logits or top k; the sum of its values is the loss.


def trl_jsd(inputs: "Inputs"):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    if inputs.parallel.tp > 1:
        raise ImportError("wants the whole vocabulary on one rank")
    return partial(GKDTrainer.generalized_jsd_loss, beta=0.5, reduction="sum")


def swift_jsd(inputs: "Inputs"):
    from swift.megatron.trainers import vocab_parallel_utils as shard
    from swift.rlhf_trainers.gkd_loss import jsd_loss

    softmax, kl = shard.vocab_parallel_log_softmax, shard.vocab_parallel_kl_div
    return lambda z_TV, t_TV: jsd_loss(z_TV, t_TV, 0.5, softmax, kl)


def modelopt_kl(inputs: "Inputs", topk: bool = False):
    from modelopt.torch.distill.plugins import megatron

    make = partial(megatron.TopKLogitsKLLoss, top_k=inputs.k) if topk else megatron.LogitsKLLoss
    loss = make(SimpleNamespace(tensor_model_parallel_size=inputs.parallel.tp))
    return lambda z_TV, t_TV: loss(z_TV.unsqueeze(1), t_TV.unsqueeze(1))[0]


def verl_topk(inputs: "Inputs"):
    from verl.trainer.distillation.megatron.losses import _VocabParallelKLDivergence as Loss

    return lambda z_TV, top: Loss.apply(z_TV, top.logp_NK, top.ids_NK, None)[0]


KL, PG, S = "reverse_kl", "policy_gradient", "support"
BASELINE = Row("cross_entropy", "sampled")
ROWS = {
    "full": Row(KL, "full", time=1.5, memory=1 / 8),
    "full_forward_kl": Row("forward_kl", "full", time=1.5, memory=1 / 8),
    "full_jsd": Row("jsd", "full", time=1.5, memory=1 / 8),
    "sampled": Row(PG, "sampled", time=1.5, memory=1 / 8),
    "sampled_given": Row(PG, "sampled", scores="sampled", time=1.1, memory=1 / 8),
    "student_topk": Row(KL, "student_topk", S, time=0.45, memory=1 / 40),
    "teacher_topk": Row(KL, "teacher_topk", S, scores="topk", time=0.1, memory=1 / 40),
    "rollout_topk": Row(KL, "rollout_topk", S, time=0.1, memory=1 / 40),
    "union": Row(KL, "union", S),
    "student_topk_tail": Row(KL, "student_topk", "vocab", tail=True),
    "teacher_topk_vocab": Row("forward_kl", "teacher_topk", "vocab", scores="topk"),
}
TOPK = partial(modelopt_kl, topk=True)
PEERS = {
    "trl_jsd": Row("jsd", "full", peer=trl_jsd),
    "swift_jsd": Row("jsd", "full", peer=swift_jsd),
    "modelopt_kl": Row("forward_kl", "full", peer=modelopt_kl),
    "modelopt_topk": Row("forward_kl", "teacher_topk", S, peer=TOPK),
    "verl_topk": Row("forward_kl", "teacher_topk", "vocab", scores="topk", peer=verl_topk),
}
ALL = {"baseline": BASELINE, **ROWS, **PEERS}


@dataclass(frozen=True)
class Inputs:
    """A student, a teacher that shares its hidden states, and a microbatch; this rank's rows."""

    parallel: mesh.Parallel
    k: int
    hidden_TH: Tensor
    weight_VH: Tensor
    gradient_VH: Tensor  # fp32, as Megatron's main_grad
    teacher_weight_VH: Tensor
    batch: Microbatch
    topk: TopKScores
    sampled: SampledScores

    def first(self, n: int) -> "Inputs":
        """Return the problem of the first n tokens."""
        cut = {name: _cut(getattr(self, name), n) for name in ("batch", "topk", "sampled")}
        hidden_TH = self.hidden_TH.detach()[:n].clone().requires_grad_()
        return replace(self, hidden_TH=hidden_TH, **cut)

    def forget(self) -> None:
        """Drop the gradients that autograd left."""
        self.hidden_TH.grad = self.weight_VH.grad = None


def _cut(noun, n: int):
    return replace(noun, **{k: v[:n] for k, v in vars(noun).items() if isinstance(v, Tensor)})


def make_inputs(options: argparse.Namespace, parallel: mesh.Parallel) -> Inputs:
    """Draw logits of standard deviation 2.5, and a teacher whose top 64 overlap by about 70 %."""

    def normal(rows: int, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, options.hidden, generator=generator).mul_(scale)

    def judge(h_CH: Tensor, y_C1: Tensor) -> tuple[Tensor, ...]:
        z_CV, t_CV = (all_columns(h_CH, w_VH, parallel) for w_VH in (weight_VH, teacher_VH))
        best_CK, logq_CV = top(t_CV, options.k), t_CV.float().log_softmax(-1)
        return top(z_CV, options.k), best_CK, logq_CV.gather(-1, best_CK), logq_CV.gather(-1, y_C1)

    device, rank, scale = parallel.device, parallel.tp_rank, 2.5 / options.hidden**0.5
    weight_VH = normal(options.vocab // options.tp, 1 + rank, scale)
    teacher_VH = normal(len(weight_VH), -1 - rank, 0.21 * scale).add_(weight_VH)
    hidden_TH, weight_VH, teacher_VH = (
        x.to(device, getattr(torch, options.dtype))
        for x in (normal(options.tokens, 0), weight_VH, teacher_VH)
    )
    generator = torch.Generator().manual_seed(0)
    y_T1 = torch.randint(options.vocab, (options.tokens, 1), generator=generator).to(device)
    chunks = zip(hidden_TH.split(TOKENS_AT_ONCE), y_T1.split(TOKENS_AT_ONCE), strict=True)
    judged = zip(*(judge(*chunk) for chunk in chunks), strict=True)
    ids_TK, best_TK, best_logq_TK, logq_T1 = map(torch.cat, judged)
    return Inputs(
        parallel=parallel,
        k=options.k,
        hidden_TH=hidden_TH.requires_grad_(),
        weight_VH=weight_VH.requires_grad_(),
        gradient_VH=torch.empty_like(weight_VH, dtype=torch.float32).zero_(),
        teacher_weight_VH=teacher_VH,
        batch=one_response(y_T1.squeeze(-1), ids_TK),
        topk=TopKScores(best_TK, best_logq_TK),
        sampled=SampledScores(logq_T1.squeeze(-1)),
    )


@torch.no_grad()
def all_columns(hidden_CH: Tensor, weight_VH: Tensor, parallel: mesh.Parallel) -> Tensor:
    """Return logits over the vocabulary of all ranks, in the dtype of the hidden states."""
    blocks = weight_VH.split(ROWS_AT_ONCE)  # a head in float64 is too large
    own_CV = torch.cat([hidden_CH @ w_VH.to(hidden_CH.dtype).T for w_VH in blocks], -1)
    parts = [torch.empty_like(own_CV) for _ in range(parallel.tp)]
    dist.all_gather(parts, own_CV, group=parallel.tp_group)
    return torch.cat(parts, -1)


def top(logits_CV: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest, the lowest first among equals."""
    order_V = torch.arange(logits_CV.shape[-1], device=logits_CV.device)
    return (logits_CV.double() - 1e-13 * order_V).topk(k).indices


def one_response(target_T: Tensor, ids_TK: Tensor) -> Microbatch:
    """Return supervised tokens; the packed sequence around them plays no part."""
    token_T = torch.arange(len(target_T), device=target_T.device)
    return Microbatch(
        token_T=target_T,
        position_T=token_T,
        cu_seqlens=torch.tensor([0, len(token_T)], dtype=torch.int32, device=token_T.device),
        max_seqlen=len(token_T),
        source_N=token_T,
        target_N=target_T,
        mask_N=torch.ones_like(token_T, dtype=torch.float32),
        rollout_logp_N=torch.zeros_like(token_T, dtype=torch.float32),
        position_N=token_T,
        sequence_N=torch.zeros_like(token_T),
        measured_M=torch.empty(0, dtype=torch.int64),
        rollout_ids_NK=ids_TK,
    )


Step = Callable[[Inputs], Tensor]  # a row's loss, to be back-propagated


def make_step(row: Row, inputs: Inputs) -> Step:
    """Return the forward pass of a row; for a peer, raises what its import raises."""
    enter = mesh.tensor_parallel.copy_to_tensor_model_parallel_region  # sums the ranks' gradients

    def linear(i: Inputs) -> Tensor:
        return F.linear(enter(i.hidden_TH), i.weight_VH)

    if row is BASELINE:
        cross_entropy = mesh.tensor_parallel.vocab_parallel_cross_entropy
        return lambda i: cross_entropy(linear(i), i.batch.target_N).sum()
    if row.peer is not None:
        loss = row.peer(inputs)
        if row.scores == "topk":
            return lambda i: loss(linear(i), i.topk).sum()
        return lambda i: loss(linear(i), F.linear(i.hidden_TH.detach(), i.teacher_weight_VH)).sum()

    settings: dict[str, Any] = {"normalize": row.normalize} if row.normalize else {}
    if row.definition == PG:
        settings |= {"divergence": KL, "form": PG}
    objective = Objective(
        **{"divergence": row.definition, **settings}, support=row.support, k=inputs.k, tail=row.tail
    )
    vocab, group = len(inputs.weight_VH) * inputs.parallel.tp, inputs.parallel.tp_group

    def step(i: Inputs) -> Tensor:
        teacher = HiddenScores(i.hidden_TH.detach(), Head(i.teacher_weight_VH, vocab, group))
        scores = {"hidden": teacher, "topk": i.topk, "sampled": i.sampled}[row.scores]
        head = Head(i.weight_VH, vocab, group, gradient_VH=i.gradient_VH)
        return objective(enter(i.hidden_TH), head, i.batch, scores).loss

    return step


def seconds(step: Step, inputs: Inputs) -> float:
    """Return how long one forward and backward takes, with the slowest rank."""
    inputs.forget()
    _wait(inputs.parallel)
    start = time.perf_counter()
    step(inputs).backward()
    _wait(inputs.parallel)
    return time.perf_counter() - start


def _wait(parallel: mesh.Parallel) -> None:
    if parallel.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(group=parallel.tp_group)


def peak_bytes(step: Step, inputs: Inputs) -> int:
    """Return the peak of one forward and backward, without what was there and what stays."""
    cuda = inputs.parallel.device.type == "cuda"
    step(inputs.first(8)).backward()  # what is loaded once: kernels, threads
    inputs.forget()
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve unseen
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = torch.cuda.memory_allocated() if cuda else _status("VmRSS")
    step(inputs).backward()
    peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    kept = (inputs.hidden_TH.grad, inputs.weight_VH.grad)
    gradients = sum(x.nbytes for x in kept if x is not None)
    return max(peak - before - gradients, PAGE)


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def errors(row: Row, step: Step, inputs: Inputs) -> dict[str, float]:
    """Return the error of the worse of both gradients: its largest entry, and its norm.

    Relative to the largest entry and to the norm of the gradient in float64.
    """
    small, group = inputs.first(ERROR_TOKENS), inputs.parallel.tp_group
    small.gradient_VH.zero_()
    small.forget()
    step(small).backward()
    got_VH = small.gradient_VH if small.weight_VH.grad is None else small.weight_VH.grad
    hidden_TH, shares = small.hidden_TH.detach().double(), logit_gradient(row, small)
    share_TV = shares.chunk(inputs.parallel.tp, -1)[inputs.parallel.tp_rank]
    want_TH = torch.zeros_like(hidden_TH)
    largest, squares = hidden_TH.new_zeros(2), hidden_TH.new_zeros(2)  # of the error, of the truth
    blocks = (x.split(ROWS_AT_ONCE) for x in (small.weight_VH.detach(), got_VH, share_TV.T))
    for weight, got, share_VT in zip(*blocks, strict=True):
        want_TH += share_VT.T @ weight.double()
        want = share_VT @ hidden_TH
        largest = torch.stack([(got - want).abs().max(), want.abs().max()]).maximum(largest)
        squares += torch.stack([(got - want).square().sum(), want.square().sum()])
    for total, how in (
        (want_TH, dist.ReduceOp.SUM),
        (largest, dist.ReduceOp.MAX),
        (squares, dist.ReduceOp.SUM),
    ):
        dist.all_reduce(total, how, group=group)
    off_TH = small.hidden_TH.grad - want_TH
    head, norm = largest[0] / largest[1], (squares[0] / squares[1]).sqrt()
    return {
        "grad_error": max(off_TH.abs().max() / want_TH.abs().max(), head).item(),
        "grad_error_norm": max(off_TH.norm() / want_TH.norm(), norm).item(),
    }


def logit_gradient(row: Row, inputs: Inputs) -> Tensor:
    """Return ∂/∂z of Σ D over all columns, in float64, by the definition and autograd."""
    target_T1, batch, topk = inputs.batch.target_N.unsqueeze(-1), inputs.batch, inputs.topk
    hidden_TH, heads = inputs.hidden_TH.double(), (inputs.weight_VH, inputs.teacher_weight_VH)
    z_TV, t_TV = (all_columns(hidden_TH, weight_VH, inputs.parallel) for weight_VH in heads)
    s_TV, t_TV = z_TV.requires_grad_().log_softmax(-1), t_TV.log_softmax(-1)
    if row.scores == "topk":  # what is given is an input, and nothing else of the teacher is
        t_TV = torch.full_like(t_TV, -1e9).scatter(-1, topk.ids_NK, topk.logp_NK.double())
    if row.scores == "sampled":
        t_TV = t_TV.scatter(-1, target_T1, inputs.sampled.logp_N.double().unsqueeze(-1))
    mask_TV = torch.full_like(t_TV, row.support == "full", dtype=torch.bool)
    if row.support == "sampled":
        mask_TV.scatter_(-1, target_T1, True)
    if row.support in ("student_topk", "rollout_topk", "union"):
        mask_TV.scatter_(-1, batch.rollout_ids_NK, True)
    if row.support in ("teacher_topk", "union"):
        mask_TV.scatter_(-1, topk.ids_NK, True)
    if row.normalize == S:
        s_TV, t_TV = (x.masked_fill(~mask_TV, -1e9).log_softmax(-1) for x in (s_TV, t_TV))
    f = DEFINITIONS[row.definition]
    total = f(s_TV, t_TV).masked_fill(~mask_TV, 0.0).sum()
    if row.tail:
        total += f(*(x.masked_fill(mask_TV, -torch.inf).logsumexp(-1) for x in (s_TV, t_TV))).sum()
    return torch.autograd.grad(total, z_TV)[0]


def measure(options: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """Return the seconds of every repeat and the errors by row, and why a peer is absent."""
    steps, absent = {}, {}
    for name in options.rows:
        try:
            steps[name] = make_step(ALL[name], inputs)
        except Exception as problem:  # an import may raise anything
            if name not in PEERS:
                raise
            absent[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    rounds = range(1 + options.repeats)  # the first is to warm up
    times = [{name: seconds(step, inputs) for name, step in steps.items()} for _ in rounds]
    found = {name: errors(ALL[name], step, inputs) for name, step in steps.items()}
    return {
        "seconds": {k: [x[k] for x in times[1:]] for k in steps},
        "errors": found,
        "absent": absent,
    }


def _rank(rank: int, options: argparse.Namespace, folder: str, name: str | None) -> None:
    torch.set_num_threads(options.threads)
    for variable, value in zip(RANK_VARIABLES, (rank, rank, options.tp, options.tp), strict=True):
        os.environ[variable] = str(value)
    url = f"file://{folder}/store"
    dist.init_process_group(platform.backend(), init_method=url, rank=rank, world_size=options.tp)
    inputs = make_inputs(options, mesh.initialize(options.tp))
    if name is None:
        result = measure(options, inputs)
    else:
        result = peak_bytes(make_step(ALL[name], inputs), inputs)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    mesh.shutdown()


def launch(options: argparse.Namespace, name: str | None = None) -> Any:
    """Run the ranks and return what rank 0 measured: one row's memory, or all rows' times."""
    print(f"memory of {name} ..." if name else "times and errors ...", file=sys.stderr)
    start = "spawn" if torch.cuda.is_available() else "fork"
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (options, folder, name), nprocs=options.tp, start_method=start)
        return json.loads(Path(folder, "result").read_text())


def report(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure; return a row a loss, the baseline first, and why a peer is absent."""
    measured, rows = launch(options), []
    for name, repeats in measured["seconds"].items():
        rows.append(
            {
                "loss": name,
                **{key: getattr(options, key) for key in SHAPE},
                "seconds": statistics.median(repeats),
                "peak_bytes": launch(options, name),
                **measured["errors"][name],
                "repeats": repeats,
            }
        )
    for row in rows:
        row["baseline_seconds"] = rows[0]["seconds"]
        row["baseline_peak_bytes"] = rows[0]["peak_bytes"]
    return rows, measured["absent"]


def cells(row: dict[str, Any]) -> list[str]:
    """Return the columns of a row of the table."""
    known = ALL[row["loss"]]
    return [
        row["loss"],
        f"{row['seconds']:.3f}",
        f"{row['seconds'] / row['baseline_seconds']:.3f}",
        f"≤ {known.time:.2f}" if known.time else "",
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['peak_bytes'] / row['baseline_peak_bytes']:.3f}",
        f"≤ {known.memory:.3f}" if known.memory else "",
        f"{row['grad_error']:.0e}",
        f"{row['grad_error_norm']:.1e}",
    ]


def table(rows: list[dict[str, Any]], absent: dict[str, str]) -> str:
    """Return an aligned Markdown table, and a line for every peer that is absent."""
    text = markdown(COLUMNS, [cells(row) for row in rows])
    return "\n".join([text, *(f"{name}: absent, {why}" for name, why in absent.items())])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    for name, default, text in (
        ("tokens", 512, "supervised tokens of the microbatch"),
        ("vocab", 151936, "entries of the vocabulary"),
        ("hidden", 1024, "hidden size of student and teacher"),
        ("k", 64, "size of the top-k supports"),
        ("tp", 1, "tensor-parallel processes"),
        ("repeats", 5, "times that a row is timed, after one to warm up"),
        ("threads", 1, "threads of a process"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)} (all)")
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(PEERS)}")
    options = parser.parse_args(argv)
    options.rows = ["baseline", *filter(None, options.rows.split(","))]
    options.rows += PEERS if options.peers else ()
    return options


def check(options: argparse.Namespace) -> None:
    """Find what the user got wrong before any process starts.

    Raises:
        ValueError: one line: key, got, expected.
    """
    for name in ("tokens", "hidden", "k", "tp", "repeats", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: got {getattr(options, name)}, expected 1 or more")
    if options.vocab < options.k or options.vocab % options.tp:
        raise ValueError(
            f"--vocab: got {options.vocab}, expected a multiple of --tp {options.tp} "
            f"and at least --k {options.k}"
        )
    for name in options.rows:
        if name not in ALL:
            raise ValueError(f"--rows: got {name!r}, expected names of {', '.join(ROWS)}")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    options = arguments(argv)
    try:
        check(options)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    rows, absent = report(options)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows, absent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
