"""Student and teacher of a config in one process: who writes, who verifies, what both say.

Shape suffixes: R responses · T tokens of them all, one response after the other · N those of a
microbatch · H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_opd import build
from megatron_opd import config as cfg
from megatron_opd.loss import dynamics
from megatron_opd.loss.shard import Projector, Ranks, chunk_tokens
from megatron_opd.loss.view import View
from megatron_opd.model import (
    HiddenGPT,
    architecture,
    build_model,
    enter_head,
    forward,
    load_hf,
    padded_vocab,
)
from megatron_opd.packing import pack
from megatron_opd.parallel import Parallel
from megatron_opd.preflight import preflight
from megatron_opd.probes.told import Told
from megatron_opd.reward import scored
from megatron_opd.rollout import request_seed
from megatron_opd.rollout.megatron import MegatronEngine
from megatron_opd.stream import PromptStream
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.types import HiddenScores, Microbatch, Prompt, Rollout

Who = Literal["student", "teacher"]


class Pair:
    """Both models, frozen, on one rank, and the prompts of the run's first step.

    Raises:
        ValueError: one line, before a model is loaded.
    """

    def __init__(self, config: cfg.Config, parallel: Parallel):
        for wrong, line in _misfits(config, parallel.world):
            if wrong:
                raise ValueError(line)
        self.config, self.parallel = config, parallel
        plan = preflight(config, parallel.world, writes=False)
        # a run without eval.prompts verifies nothing; a probe does
        self.warnings = [x for x in plan.warnings if not x.startswith("eval.reward:")]
        self.tokenizer, self.vocab_size = plan.tokenizer, plan.vocab_size
        self.prompts = _first_step(config, plan.sources)
        self.reward, self.objective = build.build_reward(config), build.build_objective(config)
        # of several terms, the one that asks the teacher says what is compared, and how
        self.lead = next(term for term in self.objective.terms if term.needs_teacher)
        self.sampling, _ = build.samplings(config, self.objective, plan.stop_ids)
        assert config.teacher is not None
        self.models = {"student": self._load(config.student), "teacher": self._load(config.teacher)}
        self.judge = MegatronTeacher(
            self.models["teacher"], parallel, vocab_size=self.vocab_size, payload="hidden"
        )

    def _load(self, section: cfg.Student | cfg.Teacher) -> HiddenGPT:
        """Build one model with its weights; both have the student's rows of the vocabulary."""
        config, parallel = self.config, self.parallel
        path = config.student.path if section.path is None else section.path
        own = isinstance(section, cfg.Student) or section.path is None
        drawn = path == config.student.path and config.student.init == "random"
        model = build_model(
            path,
            parallel,
            dtype=build.DTYPES[section.dtype or config.student.dtype],
            padded_vocab=padded_vocab(architecture(config.student.path).vocab_rows, parallel.tp),
            megatron=build.megatron_fields(config) if own else None,
            trainable=False,
            seed=config.seed if drawn else None,
        )
        if not drawn:
            load_hf(model, path, parallel, vocab_size=self.vocab_size)
        return model

    def write(
        self, who: Who, prompts: Sequence[Prompt], *, n: int, draw: int = 0, shorter: int = 0
    ) -> list[Rollout]:
        """Return `n` responses per prompt, drawn as the run draws them, `shorter` tokens less.

        `draw` names the random numbers.
        """
        size, batch = self.vocab_size, self.config.rollout.batch_size
        engine = MegatronEngine(self.models[who], self.parallel, vocab_size=size, batch_size=batch)
        longest = self.sampling.max_tokens - shorter
        return engine.generate(
            list(prompts),
            n=n,
            sampling=replace(self.sampling, max_tokens=longest),
            seed=request_seed(self.config.seed, draw),
        )

    def is_right(self, prompt: Prompt, response_ids: Sequence[int]) -> bool:
        """Ask the verifier: eval.reward above ½."""
        text = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        return scored(self.reward, text, prompt) > 0.5

    def microbatches(self, rollouts: Sequence[Rollout]) -> Iterator[Microbatch]:
        """Pack responses in their order, as many at a time as train.microbatch_tokens holds."""
        limit, taken, tokens = self.config.train.microbatch_tokens, [], 0
        for rollout in rollouts:
            length = len(rollout.prompt.token_ids) + len(rollout.response_ids)
            if taken and tokens + length > limit:
                yield from pack(taken, microbatch_tokens=limit, count=1)
                taken, tokens = [], 0
            taken.append(rollout)
            tokens += length
        yield from pack(taken, microbatch_tokens=limit, count=1)

    def hidden(self, batch: Microbatch) -> Tensor:
        """Return the student's hidden states at the supervised tokens, [N, H]."""
        hidden_T1H = forward(self.models["student"], batch)
        return enter_head(hidden_T1H, self.parallel).index_select(0, batch.source_N)

    def score(self, batch: Microbatch) -> HiddenScores:
        """Return the teacher's."""
        (scores,) = self.judge.score([batch.as_judged()])
        assert isinstance(scores, HiddenScores)
        return scores

    @torch.no_grad()
    def look(self, rollouts: list[Rollout]) -> Told:
        """Verify responses, and ask both models about every token of theirs."""
        parts: dict[str, list[Tensor]] = {}
        for batch in self.microbatches(rollouts):
            batch = batch.to(self.parallel.device)
            for view in self._views(batch):
                for name, value_M in (dynamics.student(view) | dynamics.teacher(view)).items():
                    parts.setdefault(name, []).append(value_M.double().cpu())
        metric_T = {name: torch.cat(values).numpy() for name, values in parts.items()}
        right_R = np.array([self.is_right(r.prompt, r.response_ids) for r in rollouts])
        return Told(rollouts, right_R, metric_T)

    def _views(self, batch: Microbatch) -> Iterator[View]:
        """Yield chunks of tokens as both models see them, at the objective's temperatures."""
        head, judged = self.models["student"].head(self.vocab_size), self.score(batch)
        student = Projector(self.hidden(batch), head, self.lead.student_temperature)
        teacher = Projector(judged.hidden_NH, judged.head, self.lead.teacher_temperature)
        weight_VH = head.weight_VH
        size = len(weight_VH), weight_VH.element_size(), weight_VH.device.type
        step = chunk_tokens(*size, dense_gradient=False)
        for start in range(0, len(batch.target_N), step):
            rows = slice(start, start + step)
            shards = student.shard(rows), teacher.shard(rows)
            yield View(batch, rows, *shards, Ranks(head.group), k=self.lead.k)


def _first_step(config: cfg.Config, sources: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """Return the prompts of the first step, after checking that they can be verified."""
    data = config.data
    stream = PromptStream(
        sources, config.seed, shuffle=data.shuffle, weights=data.weights, schedule=data.schedule
    )
    taken = stream.take(config.train.prompts_per_step)
    for prompt in taken:
        if prompt.answer is None:
            raise ValueError(
                f"data.answer_key: prompt {prompt.index} of '{prompt.source}' has no answer, with "
                f"which eval.reward={config.eval.reward} compares; name the column that has it"
            )
    return taken


def _misfits(config: cfg.Config, world: int) -> Iterator[tuple[bool, str]]:
    """Yield (is it so, what to tell the user) for configs that a probe cannot look at."""
    layout, teacher = config.parallel, config.teacher
    yield (
        world * layout.tp * layout.pp > 1,
        f"parallel: got tp={layout.tp}, pp={layout.pp} on {world} ranks, expected one rank: a "
        "probe compares whole gradients and distributions; add parallel.tp=1 parallel.pp=1",
    )
    yield (
        teacher is None or teacher.kind != "megatron",
        "teacher: a probe takes one, of kind=megatron: it writes too, and its whole distribution "
        "is looked at; set teacher.path (and teachers={}, teacher.kind=megatron)",
    )
    yield (
        config.rollout.engine != "megatron",
        f"rollout.engine: got '{config.rollout.engine}', expected megatron: both models write, in "
        "this process; add rollout.engine=megatron",
    )
