"""The coefficient form and its two implementations; what is kept, computed and communicated."""

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opd.loss import Objective, VocabShard
from megatron_opd.loss.fused import HeadGradient, Model, Terms
from megatron_opd.types import Head, HiddenScores
from tests.distributed import run_ranks
from tests.loss.dense import batch_of, far, judge, make_problem

SUPERVISED = Objective(support="sampled", divergence="cross_entropy")
DISTILLED = [Objective(support=support) for support in ("sampled", "student_topk", "full")]


class Watch(TorchDispatchMode):
    """Record the operations that run below it, the largest tensor that one returned, and the most
    bytes that were alive together."""

    def __init__(self):
        super().__init__()
        self.names, self.largest, self.alive, self.peak = [], 0, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.alive[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out

    def count(self, name: str) -> int:
        return sum(name in seen for seen in self.names)


def coefficients(problem, k, centred):
    """Return random c on random distinct ids, [N, k]; with Σc = 0 when centred."""
    n, v = len(problem.hidden), len(problem.weight)
    g = torch.Generator().manual_seed(5)
    ids_NK = torch.rand(n, v, generator=g).argsort(-1)[:, :k]
    c_NK = torch.randn(n, k, generator=g, dtype=torch.float64)
    return ids_NK, c_NK - c_NK.mean(-1, keepdim=True) if centred else c_NK


def gradient_of(problem, terms, temperature=0.8):
    student = Model(problem.hidden, problem.weight, temperature)
    gradient, logits = HeadGradient(student), problem.hidden @ problem.weight.T / temperature
    shard = VocabShard(logits[None], len(problem.weight))
    gradient.add(slice(0, len(problem.hidden)), terms, shard, problem.token_weight)
    return gradient.hidden_NH, gradient.weight_VH


@pytest.mark.parametrize("form", ["dense", "sparse", "vocabulary"])
def test_terms_are_coefficients_on_log_p(form):
    """Autograd through Σ w·c·log p with c held fixed is the gradient of every form of Terms."""
    problem = make_problem()
    k = 13 if form == "vocabulary" else 4
    ids, c = coefficients(problem, k, centred=form == "sparse")
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    logp = torch.log_softmax(hidden @ weight.T / 0.8, -1)
    total = ((c * logp.gather(-1, ids)).sum(-1) * problem.token_weight).sum()
    wanted = torch.autograd.grad(total, (hidden, weight))
    value, mass = torch.zeros(7), c.sum(-1)
    terms = {
        "dense": Terms(value, c, ids, mass),
        "sparse": Terms(value, c, ids),
        "vocabulary": Terms(value, torch.zeros_like(logp).scatter(-1, ids, c), mass_C=mass),
    }[form]
    with torch.no_grad():
        got = gradient_of(problem, terms)
    for x, want in zip(got, wanted, strict=True):
        assert far(x, want) < 1e-12


def test_sparse_and_dense_gradients_agree():
    problem = make_problem()
    ids, c = coefficients(problem, 5, centred=True)
    sparse = gradient_of(problem, Terms(torch.zeros(7), c, ids))
    dense = gradient_of(problem, Terms(torch.zeros(7), c, ids, c.sum(-1)))
    for a, b in zip(sparse, dense, strict=True):
        assert far(a, b) < 1e-12


def prepared(problem, trains=True):
    weight = problem.weight.clone().requires_grad_(trains)
    teacher = HiddenScores(problem.teacher_hidden, Head(problem.teacher_weight, len(weight)))
    return problem.hidden, Head(weight, len(weight)), batch_of(problem), teacher


@pytest.mark.parametrize("objective", DISTILLED, ids=lambda o: o.support)
def test_nothing_of_size_tokens_times_vocabulary_exists(objective):
    """64 tokens in chunks of 4: no tensor exceeds the logits of a chunk, or the head."""
    n, chunk, v, h = 64, 4, 501, 8
    problem = make_problem(n=n, v=v, h=h)
    chunked = Objective(support=objective.support, chunk_tokens=chunk)
    saved = []

    def save(x):
        saved.append(tuple(x.shape))
        return x

    with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss, sums, _ = chunked(*prepared(problem))
        loss.backward()
    assert watch.largest == max(2 * chunk * v, v * h)
    assert sorted(saved) == [(n, h), (v, h)]
    assert not any(x.requires_grad for x in sums.values())


@pytest.mark.parametrize("objective", DISTILLED, ids=lambda o: o.support)
def test_logits_of_one_chunk_are_alive_at_a_time(objective):
    """Both models' and two more tensors of that size, however many chunks follow each other."""
    chunk, v = 4, 5001
    chunked, peaks = Objective(support=objective.support, chunk_tokens=chunk), []
    for chunks in (1, 5):
        inputs = prepared(make_problem(n=chunks * chunk, v=v, h=1, h_teacher=1))
        with Watch() as watch:
            chunked(*inputs)
        peaks.append(watch.peak / (8 * chunk * v))
    assert 4 <= peaks[0] < 5 and peaks[1] - peaks[0] < 0.1


@pytest.mark.parametrize("objective", [SUPERVISED, *DISTILLED], ids=lambda o: o.support)
def test_no_operation_waits_for_the_device(objective):
    """Reading a number, finding true entries and indexing by a mask all stop a GPU's queue."""
    hidden, head, batch, teacher = prepared(make_problem(v=40))
    with Watch() as watch:
        objective(hidden, head, batch, teacher if objective.needs_teacher else None)
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "index", "index_put_", "equal"}
    assert not {f"aten::{name}" for name in waiting} & set(watch.names)


def test_no_gradient_no_gradient_work():
    """Without it: one product a model. With it: two more, or none where the gradient is sparse."""
    hidden, head, batch, teacher = prepared(make_problem(v=40))
    for objective, products in zip(DISTILLED, (4, 2, 4), strict=True):
        with Watch() as watch:
            objective(hidden, head, batch, teacher)
        assert watch.count("aten::mm") + watch.count("addmm") == products, objective.support
        with torch.no_grad(), Watch() as watch:
            objective(hidden, head, batch, teacher)
        assert watch.count("mm") == 2 and not watch.count("index_add"), objective.support


def count_collectives(rank, problem, objectives):
    counts = []
    for objective in objectives:
        with Watch() as watch:
            hidden, weight = problem.hidden, problem.weight.chunk(2)[rank].clone()
            teacher = problem.teacher_weight.chunk(2)[rank]
            group = dist.group.WORLD
            objective(
                hidden,
                Head(weight.requires_grad_(), 40, group),
                batch_of(problem),
                HiddenScores(problem.teacher_hidden, Head(teacher, 40, group))
                if objective.needs_teacher
                else None,
            )
        counts.append(watch.count("c10d::"))
    return counts


def test_collectives_a_chunk():
    """Normalisers, top k, log-probabilities, sums; `full` adds up its own terms as well."""
    hot = Objective(rollout_temperature=2.0)
    objectives = [SUPERVISED, *DISTILLED, hot]
    assert run_ranks(count_collectives, 2, make_problem(v=40), objectives)[1] == [3, 4, 4, 5, 5]


def test_chunks_of_any_size_are_the_same_loss():
    problem = make_problem(n=10)
    whole = judge(problem, Objective(k=4))
    for chunk_tokens in (1, 3, 9, 10, 11):
        got = judge(problem, Objective(k=4, chunk_tokens=chunk_tokens))
        for name in ("loss", "hidden", "weight"):
            assert far(got[name], whole[name]) < 1e-12, (name, chunk_tokens)
