"""Student and teacher of a config in one process: who writes, who verifies, what both say.

Shape suffixes: N tokens of a microbatch · T packed ones · H hidden size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from megatron_opd import build, inputs
from megatron_opd import config as cfg
from megatron_opd.bench import Bench, Who
from megatron_opd.evaluation import is_right, text_of
from megatron_opd.model import enter_head, forward
from megatron_opd.parallel import Parallel
from megatron_opd.preflight import preflight
from megatron_opd.rollout import request_seed
from megatron_opd.told import Told
from megatron_opd.types import HiddenScores, Microbatch, Prompt, Rollout


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
        self.lead = self.objective.lead
        self.sampling, _ = build.samplings(config, self.objective, plan.stop_ids)
        assert config.teacher is not None
        how = {"vocab_size": self.vocab_size, "k": self.lead.k}
        self.bench = Bench(config, config.teacher, parallel, **how)
        for problem in self.bench.problems.values():
            raise ValueError(problem)
        self.models = self.bench.models

    def write(
        self, who: Who, prompts: Sequence[Prompt], *, n: int, draw: int = 0, shorter: int = 0
    ) -> list[Rollout]:
        """Return `n` responses per prompt, drawn as the run draws them, `shorter` tokens less.

        `draw` names the random numbers.
        """
        sampling = replace(self.sampling, max_tokens=self.sampling.max_tokens - shorter)
        return self.bench.write(who, prompts, sampling, request_seed(self.config.seed, draw), n=n)

    def is_right(self, prompt: Prompt, response_ids: Sequence[int]) -> bool:
        """Ask the verifier, eval.reward."""
        return is_right(self.reward, text_of(response_ids, self.tokenizer), prompt)

    def hidden(self, batch: Microbatch) -> Tensor:
        """Return the student's hidden states at the supervised tokens, [N, H], with their graph."""
        hidden_T1H = forward(self.models["student"], batch)
        return enter_head(hidden_T1H, self.parallel).index_select(0, batch.source_N)

    def score(self, batch: Microbatch) -> HiddenScores:
        """Return the teacher's."""
        (scores,) = self.bench.hidden("teacher", [batch])
        return scores

    def look(self, rollouts: list[Rollout]) -> Told:
        """Verify responses, and ask both models about every token of theirs."""
        right = [self.is_right(r.prompt, r.response_ids) for r in rollouts]
        at = self.lead.student_temperature, self.lead.teacher_temperature
        return self.bench.look(rollouts, right, temperatures=at)


def _first_step(config: cfg.Config, sources: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """Return the prompts of the first step, after checking that they can be verified."""
    taken = inputs.build_stream(config, sources).take(config.train.prompts_per_step)
    for prompt in taken:
        if prompt.answer is None:
            raise ValueError(
                f"data.answer_key: prompt {prompt.index} of '{prompt.source}' has no answer, with "
                f"which eval.reward={config.eval.reward} compares; name the column that has it"
            )
    return taken


def _misfits(config: cfg.Config, world: int) -> Iterator[tuple[bool, str]]:
    """Yield (is it so, what to tell the user) for configs that a probe cannot look at."""
    teacher, whole = config.teacher, cfg.Parallel().model_dump(exclude={"timeout_minutes"})
    axes = config.parallel.model_dump(include=set(whole))
    split = {key: size for key, size in axes.items() if size != whole[key]}
    remedy = " ".join(f"parallel.{key}={json.dumps(whole[key])}" for key in split)
    yield (
        world > 1 or bool(split),
        f"parallel: got {', '.join(f'{key}={size}' for key, size in split.items()) or 'replicas'} "
        f"on {world} ranks, expected one rank: a probe compares whole gradients and distributions; "
        + (f"add {remedy}" if split else "start it without torchrun"),
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
