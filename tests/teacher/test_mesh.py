"""A teacher on a mesh of its own: the same loss and gradient, and nothing travels for nothing."""

import contextlib
import itertools
from collections import Counter
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf, load_head, load_hf
from megatron_opd.step import Judgement, make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.mesh import MeshTeacher
from megatron_opd.teacher.relayout import Meshes, Size
from tests.distributed import run_ranks
from tests.hf import write_checkpoint
from tests.layouts import Layout, pack_here
from tests.tiny import VOCAB, make_prompts, make_rollouts, qwen3
from tests.training import ADAMW, PADDED, SHAPES, assert_same

WAYS = {  # what is minimised, and what travels for it
    "student_topk": (Objective("student_topk", k=8, chunk_tokens=7), "hidden"),
    "full": (Objective("full", teacher_temperature=0.7, chunk_tokens=16), "hidden"),
    "teacher_topk": (
        Objective("teacher_topk", "forward_kl", k=8, normalize="vocab", tail=True),
        "topk",
    ),
    "sampled": (Objective("sampled", form="policy_gradient", teacher_temperature=0.7), "sampled"),
}
MESHES = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write a dense teacher, one whose head is its embedding, and one of experts."""
    folder = tmp_path_factory.mktemp("teachers")
    for family in ("qwen3", "qwen3_tied", "qwen3_moe"):
        write_checkpoint(folder / family, family, vocab_size=47)
    return folder


def _teacher(parallel, own, way, folder, **how):
    """Build a teacher on the student's mesh, or on one with the axes `own`."""
    objective, payload = WAYS[way]
    how |= dict(vocab_size=VOCAB, payload=payload, k=objective.k)
    how |= dict(temperature=objective.teacher_temperature)
    frozen = dict(dtype=torch.float32, trainable=False, seed=None)
    if own is None:
        model = build_model(folder, parallel, padded_vocab=PADDED, **frozen)
        load_hf(model, folder, parallel, vocab_size=VOCAB)
        return MegatronTeacher(model, parallel, **how)
    judging, head = mesh.another(**own), None
    with judging.current():
        model = build_model(folder, judging, **frozen)
        load_hf(model, folder, judging, vocab_size=VOCAB)
    if payload == "hidden":
        cut = dict(padded_vocab=PADDED, vocab_size=VOCAB, dtype=torch.float32)
        head = load_head(folder, parallel, **cut)
    inner = MegatronTeacher(model, judging, **how, keeps_head=False)
    return MeshTeacher(inner, parallel, head)


def _step(rank, layout, own, ways, folder, tokens, shares):
    """Take a step each way, from the same weights; return metrics, weights and bytes sent."""
    parallel, results = layout.join(), {}
    rollouts = make_rollouts(SHAPES)
    mine = rollouts[shares[parallel.dp_rank]] if shares else rollouts[parallel.dp_rank :: layout.dp]
    batches = pack_here(mine, parallel, microbatch_tokens=tokens, measure_fraction=0.5, seed=4)
    for way in ways:
        model = build_model(qwen3(), parallel, dtype=torch.float32, padded_vocab=PADDED, seed=1)
        student = make_student(model, parallel, ADAMW, steps=10, vocab_size=VOCAB)
        teacher = _teacher(parallel, own, way, folder)
        judged = [Judgement(scores) for scores in teacher.score(batches)]
        metrics = train_step(student, batches, judged, WAYS[way][0])
        weights = {name: tensor.clone() for name, tensor in export_hf(model, parallel)}
        record = [metrics.reduce(None, parallel.device)]
        results[way] = record, weights, getattr(teacher, "bytes_sent", 0)
    return results


@cache
def one_process(folder):
    (results,) = run_ranks(_step, 1, Layout(), None, tuple(WAYS), folder, 25, None)
    return results


def check(folder, layout, own, *, ways=tuple(WAYS), tokens=25, shares=None):
    """Compare with one process; return the bytes that all ranks sent, each way."""
    ranks = run_ranks(_step, layout.world, layout, own, ways, folder, tokens, shares)
    for way in ways:
        one, other = one_process(folder)[way], ranks[0][way]
        assert_same(one, other, atol=1e-6)
        for name in ("loss/objective", "optim/grad_norm"):
            assert other[0][0][name] == pytest.approx(one[0][0][name], rel=2e-6), name
    return {way: sum(results[way][2] for results in ranks) for way in ways}


@pytest.mark.parametrize("teacher", MESHES, ids=Layout.__str__)
@pytest.mark.parametrize("student", MESHES, ids=Layout.__str__)
def test_loss_and_gradient_are_those_of_one_process(root, student, teacher):
    layout = student._replace(dp=max(1, teacher.world // student.world))
    ways = tuple(WAYS)[layout.world // 4 :]  # two of them are of hidden states
    sent = check(root / "qwen3", layout, dict(tp=teacher.tp, pp=teacher.pp), ways=ways)
    if student == teacher:
        assert not any(sent.values())  # each microbatch stays where it was


@pytest.mark.parametrize(
    ("layout", "own"),
    [
        (Layout(tp=2, sp=True), dict(pp=2, vpp=2)),  # more microbatches than there are
        (Layout(dp=2), dict(tp=2, sequence_parallel=True)),
        (Layout(cp=2), dict(tp=2)),
        (Layout(cp=2, tp=2), dict(pp=2)),
        (Layout(pp=2, vpp=2), {}),
    ],
    ids=str,
)
def test_so_they_are_at_every_other_layout(root, layout, own):
    check(root / "qwen3", layout, own)


@pytest.mark.parametrize("own", [dict(tp=2), dict(pp=2)], ids=str)
def test_a_teacher_whose_head_is_its_embedding(root, own):
    check(root / "qwen3_tied", Layout(dp=2), own, ways=("full", "teacher_topk"))


@pytest.mark.parametrize("own", [dict(ep=2), dict(tp=2, ep=2, etp=1)], ids=str)
def test_a_teacher_of_experts_beside_a_dense_student(root, own):
    """Its two replicas judge two microbatches and one, and meet in every layer all the same."""
    how = dict(ways=("student_topk", "sampled"), tokens=40, shares=[slice(0, 7), slice(7, 8)])
    check(root / "qwen3_moe", Layout(dp=2), own, **how)


def _told(rank, folder):
    """Ask the teacher on each mesh about responses that it reads after prompts of its own."""
    parallel = Layout(cp=2).join()
    read = make_prompts([9, 2, 6, 1, 11, 3, 7, 4], seed=5)
    rollouts = [
        replace(r, prompt=replace(r.prompt, teacher_token_ids=other.token_ids))
        for r, other in zip(make_rollouts(SHAPES), read, strict=True)
    ]
    batches = pack_here(rollouts, parallel, microbatch_tokens=60)
    contexts = [batch.as_judged() for batch in batches]
    assert all(batch.context for batch in batches)
    teachers = [_teacher(parallel, own, "full", folder) for own in (None, dict(tp=2))]
    return [[one.hidden_NH for one in teacher.score(contexts)] for teacher in teachers]


def test_a_teacher_that_reads_other_prompts(root):
    for shared, own in run_ranks(_told, 2, root / "qwen3"):
        assert all(len(one) for one in shared)
        assert max((x - y).abs().max() for x, y in zip(shared, own, strict=True)) < 1e-5


def _unasked(rank, folder):
    """Only the first replica asks; the other one judges for it."""
    parallel = Layout(dp=2).join()
    batches = pack_here(make_rollouts(SHAPES), parallel, microbatch_tokens=25) if rank == 0 else []
    teacher = _teacher(parallel, {}, "sampled", folder)
    nothing = teacher.score([])
    return len(batches), [one.logp_N for one in teacher.score(batches)], nothing


def test_a_replica_without_microbatches_judges_for_the_other(root):
    (count, scores, nothing), (none, empty, _) = run_ranks(_unasked, 2, root / "qwen3")
    assert count > 2 and len(scores) == count and not none and not empty and not nothing
    assert all((one < 0).all() for one in scores)


def _offloaded(rank, folder, way):
    parallel = Layout(dp=2).join()
    batches = pack_here(make_rollouts(SHAPES), parallel, microbatch_tokens=25)
    how = [dict(own=dict(tp=2)), dict(own=dict(tp=2), offload=True)]
    teachers = [_teacher(parallel, way=way, folder=folder, **options) for options in how]
    (plain, _), (scores, _) = ([t.score(batches) for _ in range(2)] for t in teachers)
    away = {p.numel() for p in teachers[1].inner.model.parameters()}
    return [_tensors(x) for x in plain], [_tensors(x) for x in scores], away


def _tensors(scores):
    return [x for x in vars(scores).values() if torch.is_tensor(x)]


@pytest.mark.parametrize("way", ["full", "teacher_topk"])
def test_between_uses_all_of_its_own_weights_may_leave(root, way):
    for plain, scores, away in run_ranks(_offloaded, 2, root / "qwen3_tied", way):
        assert away == {0} and len(plain) > 1
        for one, other in zip(plain, scores, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def _two_meshes(rank):
    """Return what Megatron says of the current mesh before, within and after another one."""
    first, draws = Layout(tp=2).join(), torch.get_rng_state()
    tracker = get_cuda_rng_tracker().get_states()
    second = mesh.another(pp=2)
    assert torch.equal(draws, torch.get_rng_state())
    assert get_cuda_rng_tracker().get_states().keys() == tracker.keys()

    def said():
        group = dist.get_process_group_ranks(mpu.get_data_parallel_group())
        return mpu.get_tensor_model_parallel_world_size(), mpu.is_pipeline_last_stage(), group

    seen = [said()]
    with contextlib.suppress(KeyError), second.current():
        seen.append(said())
        with first.current():
            seen.append(said())
        raise KeyError
    seen.append(said())
    mesh.shutdown()
    return seen, (first.tp, first.pp_rank), (second.tp, second.pp_rank)


def test_another_mesh_is_current_only_where_it_is_asked_for():
    for rank, (seen, first, second) in enumerate(run_ranks(_two_meshes, 2)):
        one, other = (2, True, [rank]), (1, rank == 1, [rank])
        assert seen == [one, other, one, one] and first == (2, 0) and second == (1, rank)


# What travels


def _traffic(rank, layout, own, folder):
    """Return the bytes that this rank sent each way, and what it asked about."""
    parallel = layout.join()
    mine = make_rollouts(SHAPES)[parallel.dp_rank :: parallel.dp]
    batches, sent = pack_here(mine, parallel, microbatch_tokens=25), {}
    for way in WAYS:
        teacher = _teacher(parallel, own, way, folder)
        teacher.score(batches)
        sent[way] = teacher.bytes_sent
    shapes = [(len(b.token_T), len(b.cu_seqlens), len(b.source_N)) for b in batches]
    return sent, shapes


def test_ids_go_to_the_ranks_that_do_not_have_them(root):
    """Each replica's only rank is one of the teacher's two: it has half, and needs no answer."""
    for sent, shapes in run_ranks(_traffic, 2, Layout(dp=2), dict(tp=2), root / "qwen3"):
        ids = sum(4 * (tokens + bounds + supervised) for tokens, bounds, supervised in shapes)
        assert sent["full"] == sent["teacher_topk"] == ids
        assert sent["sampled"] == ids + sum(4 * supervised for *_, supervised in shapes)


def test_answers_go_to_the_ranks_that_need_them(root):
    """All ranks have the ids; what one judged, the other tensor-parallel rank needs too."""
    ranks = run_ranks(_traffic, 2, Layout(tp=2), {}, root / "qwen3")
    supervised = sum(n for *_, n in ranks[0][1])
    total = {way: sum(sent[way] for sent, _ in ranks) for way in WAYS}
    hidden = 32 * 4 * supervised
    assert total == {
        "student_topk": hidden,
        "full": hidden,
        "teacher_topk": 8 * (4 + 4) * supervised,
        "sampled": 4 * supervised,
    }
    assert all(min(sent.values()) > 0 for sent, _ in ranks)  # both judged


def test_only_the_last_stage_is_answered(root):
    sent, _ = zip(*run_ranks(_traffic, 2, Layout(pp=2), {}, root / "qwen3"), strict=True)
    assert all(sent[0].values()) and not any(sent[1].values())


def at(rank, *, tp=1, pp=1, dp=1, cp=1):
    """Return where a rank is in a mesh that nobody has joined."""
    place = torch.arange(tp * pp * dp * cp).view(pp, dp, cp, tp).eq(rank).nonzero()[0].tolist()
    known = dict(zip(("pp_rank", "dp_rank", "cp_rank", "tp_rank"), place, strict=True))
    known |= dict(tp=tp, pp=pp, dp=dp, cp=cp, rank=rank)
    return mesh.Parallel(**{**dict.fromkeys(f.name for f in fields(mesh.Parallel)), **known})


@st.composite
def dealings(draw):
    """Return how all ranks deal some microbatches out, and the student's mesh."""
    axes = [(tp, pp, cp) for tp in (1, 2, 4) for pp in (1, 2) for cp in (1, 2)]
    (tp, pp, cp), (own_tp, own_pp, _) = draw(st.tuples(*[st.sampled_from(axes)] * 2))
    world = max(tp * pp * cp, own_tp * own_pp) * draw(st.sampled_from([1, 2]))
    student = dict(tp=tp, pp=pp, cp=cp, dp=world // (tp * pp * cp))
    teacher = dict(tp=own_tp, pp=own_pp, dp=world // (own_tp * own_pp))
    sources = st.tuples(*[st.integers(0, 9)] * cp)
    size = st.builds(Size, st.integers(1, 90), st.integers(2, 9), sources)
    asked = draw(
        st.lists(st.lists(size, max_size=5), min_size=student["dp"], max_size=student["dp"])
    )
    places = [at(rank, **student) for rank in range(world)]
    sizes = [asked[place.dp_rank] for place in places]
    both = [Meshes(places[rank], at(rank, **teacher)) for rank in range(world)]
    return [one.deal(sizes) for one in both], places


@settings(max_examples=60, deadline=None)
@given(dealings())
def test_every_microbatch_is_judged_once_and_every_token_answered_once(dealt):
    deals, places = dealt
    for deal, place in zip(deals, places, strict=True):
        if place.is_last_stage:
            rows = Counter()
            for item, part, _ in deal.answers_in():
                assert item.replica == place.dp_rank
                rows.update((item, row) for row in range(part.start, part.stop))
            mine = (item.rows(place.cp_rank) for item, _ in deal.asked)
            assert set(rows.values()) <= {1}
            assert rows.total() == sum(part.stop - part.start for part in mine)
    judged = Counter(item for deal in deals for item in deal.judged)
    ranks = deals[0].meshes.teacher_PDR[:, 0].numel()
    assert set(judged.values()) <= {ranks}
    assert len(judged) == len({item for deal in deals for item, _ in deal.asked})
    loads = [sum(item.size.tokens for item in deal.judged) for deal in deals]
    largest = max((item.size.tokens for item in judged), default=0)
    assert max(loads) <= sum(loads) / len(loads) + largest


@settings(max_examples=60, deadline=None)
@given(dealings())
def test_what_one_rank_sends_the_other_expects_in_the_same_order(dealt):
    deals, places = dealt
    pairs = list(itertools.product(range(len(deals)), repeat=2))
    sent, expected = ({pair: [] for pair in pairs} for _ in range(2))
    for rank, (deal, place) in enumerate(zip(deals, places, strict=True)):
        for item, target in deal.ids_out():
            sent[rank, target].append(item)
        for item, source in deal.ids_in():
            expected[source, rank].append(item)
        for item, rows, target in deal.answers_out():
            sent[rank, target].append((item, rows.start, rows.stop))
        for item, rows, source in deal.answers_in() if place.is_last_stage else ():
            if source != rank:
                expected[source, rank].append((item, rows.start, rows.stop))
    assert sent == expected and not any(sent[rank, rank] for rank in range(len(deals)))
