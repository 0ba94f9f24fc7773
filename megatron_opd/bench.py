"""Both models of a run, frozen, on its ranks: they write, and say what they think of every token.

Shape suffixes: R responses · T tokens of them all, one response after the other · N those of a
microbatch · H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd import build
from megatron_opd import config as cfg
from megatron_opd.loss import Objective, dynamics
from megatron_opd.loss.shard import Projector, Ranks, chunk_tokens
from megatron_opd.loss.view import View
from megatron_opd.model import Stage, architecture, build_model, load_hf, padded_vocab
from megatron_opd.packing import pack, packed_tokens
from megatron_opd.parallel import Parallel
from megatron_opd.rollout import RolloutEngine, Sampling
from megatron_opd.rollout.megatron import MegatronEngine
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.told import Told
from megatron_opd.types import HiddenScores, Microbatch, Prompt, Rollout

Who = Literal["student", "teacher"]
Temperatures = tuple[float, float]  # of the student, of the teacher


class Bench:
    """Student and teacher, of which none trains; every rank calls every method.

    Raises:
        ValueError: the teacher is to have a mesh of its own.
    """

    def __init__(
        self,
        config: cfg.Config,
        teacher: cfg.Teacher,
        parallel: Parallel,
        *,
        vocab_size: int,
        k: int,
    ):
        if teacher.parallel is not None:
            raise ValueError(
                "teacher.parallel: set, but here both models are split alike; set it to null, and "
                "parallel to what fits both"
            )
        self.config, self.parallel, self.vocab_size, self.k = config, parallel, vocab_size, k
        self.teacher = teacher
        self.models: dict[str, Stage] = {}
        self.problems: dict[str, str] = {}  # of models that cannot be loaded, in a line
        for who, section in (("student", config.student), ("teacher", teacher)):
            try:
                self.models[who] = self._load(section)
            except ValueError as problem:
                self.problems[who] = str(problem)
        if "teacher" in self.problems and "student" in self.models:
            self.models["teacher"] = self.models["student"]  # which can still be looked at
        self.judges = {
            who: MegatronTeacher(model, parallel, vocab_size=vocab_size, payload="hidden")
            for who, model in self.models.items()
        }
        self.engine: RolloutEngine | None = None

    def _load(self, section: cfg.Student | cfg.Teacher) -> Stage:
        """Build one model with its weights; both have the student's rows of the vocabulary."""
        config, parallel = self.config, self.parallel
        path = section.path or config.student.path
        random = path == config.student.path and config.student.init == "random"
        rows = architecture(config.student.path).vocab_rows
        model = build_model(
            path,
            parallel,
            dtype=build.DTYPES[section.dtype or config.student.dtype],
            padded_vocab=padded_vocab(rows, parallel.tp),
            megatron=config.megatron if path == config.student.path else None,
            trainable=False,
            seed=config.seed if random else None,
        )
        if not random:
            load_hf(model, path, parallel, vocab_size=self.vocab_size)
        return model

    @property
    def same_weights(self) -> bool:
        """Whether both models are one; on every rank."""
        mine, theirs = (dict(model.named_parameters()) for model in self.models.values())
        same = mine.keys() == theirs.keys() and all(
            mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name])
            for name in mine
        )
        return all(self.parallel.agree(lambda: same))

    def mine(self, things: Sequence[Any]) -> list[Any]:
        """Return this replica's share."""
        return list(things[self.parallel.dp_rank :: self.parallel.dp])

    def write(
        self, who: Who, prompts: Sequence[Prompt], sampling: Sampling, seed: int, *, n: int = 1
    ) -> list[Rollout]:
        """Return this replica's responses, `n` to each prompt of its share.

        The student's come from the run's engine. The teacher answers what it reads.
        """
        mine = self.mine(prompts)
        if who == "student":
            return self._engine().generate(mine, n=n, sampling=sampling, seed=seed)
        engine = MegatronEngine(
            self.models["teacher"],
            self.parallel,
            vocab_size=self.vocab_size,
            batch_size=self.config.rollout.batch_size,
        )
        read = [replace(p, token_ids=p.teacher_token_ids or p.token_ids) for p in mine]
        rollouts = engine.generate(read, n=n, sampling=replace(sampling, top_ids=0), seed=seed)
        asked = [prompt for prompt in mine for _ in range(n)]
        return [replace(r, prompt=p) for r, p in zip(rollouts, asked, strict=True)]

    def _engine(self) -> RolloutEngine:
        """Return the run's engine, with the student's weights."""
        if self.engine is None:
            student, size = self.models["student"], self.vocab_size
            self.engine = build.drawing_engine(self.config, student, self.parallel, size)
        self.engine.sync()  # each time: between rounds it sleeps
        return self.engine

    def batches(self, rollouts: Sequence[Rollout]) -> list[Microbatch]:
        """Pack this replica's responses in their order, as many at a time as fit."""
        limit = self.config.train.microbatch_tokens
        packed: list[list[Rollout]] = []
        tokens = 0
        for rollout in rollouts:
            length = packed_tokens(rollout)
            if not packed or tokens + length > limit:
                packed.append([])
                tokens = 0
            packed[-1].append(rollout)
            tokens += length
        return [
            batch.to(self.parallel.device)
            for together in packed
            for batch in pack(together, microbatch_tokens=limit, count=1, multiple=self._multiple)
        ]

    @property
    def _multiple(self) -> int:
        return self.parallel.tp if self.parallel.sequence_parallel else 1

    def hidden(self, who: Who, batches: list[Microbatch]) -> list[HiddenScores]:
        """Return a model's hidden states at the supervised tokens; none but on the last stage."""
        if who == "teacher":
            batches = [batch.as_judged() for batch in batches]
        scores = self.judges[who].score(batches)
        return [one for one in scores if isinstance(one, HiddenScores)]

    @torch.no_grad()
    def look(
        self,
        rollouts: list[Rollout],
        right: Sequence[bool],
        *,
        temperatures: Temperatures = (1.0, 1.0),
        drawn_at: float | None = None,
    ) -> Told:
        """Ask both models about every token of this replica's responses; return all replicas'.

        `right` is the verifier's word on each. `drawn_at`: the temperature at which an engine drew
        them, whose log-probabilities are then compared with the student's.
        """
        batches = self.batches(rollouts)
        hidden = zip(*(self.hidden(who, batches) for who in ("student", "teacher")), strict=True)
        parts: dict[str, list[Tensor]] = {}
        for batch, (student, teacher) in zip(batches, hidden, strict=False):
            for view in self._views(batch, student, teacher, temperatures, drawn_at):
                for name, value_N in _said(view).items():
                    parts.setdefault(name, []).append(value_N.double().cpu())
        metric_T = {name: torch.cat(values).numpy() for name, values in parts.items()}
        return self._gather(rollouts, right, metric_T)

    def _views(
        self,
        batch: Microbatch,
        student: HiddenScores,
        teacher: HiddenScores,
        temperatures: Temperatures,
        drawn_at: float | None,
    ) -> Iterator[View]:
        """Yield chunks of tokens as both models see them."""
        projectors = [
            Projector(scores.hidden_NH, scores.head, temperature)
            for scores, temperature in zip((student, teacher), temperatures, strict=True)
        ]
        weight_VH = student.head.weight_VH
        size = len(weight_VH), weight_VH.element_size(), weight_VH.device.type
        step = chunk_tokens(*size, dense_gradient=False)
        ratio = None if drawn_at is None else temperatures[0] / drawn_at
        for start in range(0, len(batch.target_N), step):
            rows = slice(start, start + step)
            shards = projectors[0].shard(rows), projectors[1].shard(rows)
            ranks = Ranks(student.head.group)
            yield View(batch, rows, *shards, ranks, k=self.k, rollout_ratio=ratio)

    def _gather(
        self, rollouts: list[Rollout], right: Sequence[bool], metric_T: dict[str, np.ndarray]
    ) -> Told:
        """Put the replicas' shares together, in the order of the prompts, on every rank."""
        parallel = self.parallel
        told = (rollouts, list(right), metric_T) if parallel.rank == parallel.head_rank else None
        seen: list[Any] = [None] * parallel.world
        dist.all_gather_object(seen, told)
        shares = [share for share in seen if share is not None and share[0]]
        return Told(
            [rollout for share in shares for rollout in share[0]],
            np.array([good for share in shares for good in share[1]], bool),
            {name: np.concatenate([share[2][name] for share in shares]) for name in shares[0][2]},
        )

    @torch.no_grad()
    def control(self, objective: Objective, rollouts: list[Rollout]) -> float:
        """Return the objective a token where the student is its own teacher, on every rank."""
        batches = self.batches(rollouts)
        sums = torch.zeros(2, dtype=torch.float64)
        models = [self.hidden("student", batches) for _ in range(2)]  # two forwards
        base = models[1] if objective.needs_base else [None] * len(models[1])
        for batch, student, teacher, basis in zip(batches, *models, base, strict=False):
            judged = objective(student.hidden_NH, student.head, batch, teacher, basis)
            sums += torch.tensor([float(judged.loss), float(judged.count)], dtype=torch.float64)
        if self.parallel.rank != self.parallel.head_rank:
            sums.zero_()  # its tensor-parallel peers have the same
        sums = sums.to(self.parallel.device)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def close(self) -> None:
        """Let the engine go, if one was needed."""
        if self.engine is not None:
            self.engine.close()


def _said(view: View) -> dict[str, Tensor]:
    """Return what is known of every token, by the names of the metrics."""
    known = dynamics.student(view) | dynamics.teacher(view)
    for who, ids_NK in zip(("student", "teacher"), view.top_ids, strict=True):
        known[f"{who}/first_choice"] = ids_NK[:, 0]
    if view.rollout_ratio is not None:
        means, maxima = dynamics.policy(view)
        known |= means | maxima
    return known
