"""What the checks look at: prompts, both models, and what they write and say; each made once."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from megatron_opd import build
from megatron_opd import config as cfg
from megatron_opd.bench import Bench, Who
from megatron_opd.data import encode_response
from megatron_opd.doctor import evidence, variants
from megatron_opd.evaluation import is_right, text_of
from megatron_opd.parallel import Parallel
from megatron_opd.preflight import Plan, load_tokenizer, preflight
from megatron_opd.probes.statistics import Estimate
from megatron_opd.rollout import request_seed
from megatron_opd.told import Told
from megatron_opd.types import Prompt, Rollout


class Material:
    """One pair of models under one config; every rank looks at the same things.

    `teacher` names one of several. `words` is how the user calls the config, for commands.
    """

    def __init__(
        self,
        config: cfg.Config,
        parallel: Parallel,
        *,
        prompts: int,
        teacher: str = "",
        words: str = "",
    ):
        self.config, self.parallel, self.count, self.words = config, parallel, prompts, words
        self.name, self.teacher = teacher, config.judging[teacher]
        self.teacher_path = config.folder(self.teacher)
        self.objective = build.build_objective(config)
        self.lead = self.objective.lead  # which asks the teacher
        self.reward = build.build_reward(config)

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's, the teacher's."""
        student = load_tokenizer("student", self.config.student.path)
        return student, load_tokenizer("teacher", self.teacher_path)

    @cached_property
    def plan(self) -> Plan:
        """Tokenizer and prompts, as the run would read them."""
        world = self.parallel.world
        return self.parallel.owner(lambda: preflight(self.config, world, writes=False))

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Some of this teacher's prompts, from all parts of the data.

        Raises:
            ValueError: it has none.
        """
        every = [
            prompt for prompt in self.plan.prompts if prompt.teacher == self.name or not self.name
        ]
        if not every:
            raise ValueError(f"teachers.{self.name}: no prompt in data.prompts names it")
        step = max(len(every) // self.count, 1)
        return every[::step][: self.count]

    @cached_property
    def bench(self) -> Bench:
        """Both models, loaded."""
        size = self.plan.vocab_size
        how = {"vocab_size": size, "k": self.lead.k}
        return Bench(self.config, self.teacher, self.parallel, **how)

    @cached_property
    def texts(self) -> dict[str, Told]:
        """What both models say of text that neither wrote: the prompts, and dataset responses."""
        found = {
            "prompts": [
                _read(
                    replace(prompt, token_ids=prompt.token_ids[:1], teacher_token_ids=None),
                    prompt.token_ids[1:],
                )
                for prompt in self.prompts
                if len(prompt.token_ids) > 1
            ],
            "responses": self.answered(self.prompts),
        }
        return {name: self.looked(rollouts) for name, rollouts in found.items() if rollouts}

    def answered(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Return the dataset's responses, or else its answers, where there are such."""
        longest, known = self.config.rollout.max_tokens, []
        for prompt in prompts:
            text = prompt.answer if prompt.response is None else prompt.response
            if text is not None:
                ids = encode_response(self.plan.tokenizer, text)
                known.append(_read(prompt, ids[:longest]))
        return known

    def looked(self, rollouts: Sequence[Rollout]) -> Told:
        """Ask both models about texts, at temperature 1."""
        mine = self.bench.mine(rollouts)
        return self.bench.look(mine, [False] * len(mine))

    @cached_property
    def ways(self) -> tuple[dict[str, list[Prompt]], list[str]]:
        """Half of the prompts, rendered in other templates, and why some cannot be."""
        some = self.prompts[: max(len(self.prompts) // 2, 1)]
        data, tokenizer = self.config.data, self.plan.tokenizer
        return self.parallel.owner(lambda: variants.rendered(data, tokenizer, some))

    @cached_property
    def student(self) -> Told:
        """The student's responses, as the run draws them."""
        return self.written("student", self.prompts)

    @cached_property
    def by_teacher(self) -> Told:
        """The teacher's responses to the same prompts."""
        return self.written("teacher", self.prompts)

    def written(self, who: Who, prompts: Sequence[Prompt]) -> Told:
        """Let a model answer as the run draws responses, and ask both about the answers.

        Raises:
            ValueError: a reward that is no finite number; on every rank.
        """
        o, stops = self.lead, self.plan.stop_ids
        sampling, _ = build.samplings(self.config, self.objective, stops)
        sampling = replace(sampling, temperature=sampling.temperature or 1.0)
        rollouts = self.bench.write(who, prompts, sampling, request_seed(self.config.seed, 0))
        right = self.parallel.agree(lambda: [self._is_right(one) for one in rollouts])
        return self.bench.look(
            rollouts,
            right[self.parallel.rank],
            temperatures=(o.student_temperature, o.teacher_temperature),
            drawn_at=sampling.temperature if who == "student" else None,
        )

    def _is_right(self, rollout: Rollout) -> bool:
        if rollout.prompt.answer is None:
            return False
        return is_right(self.reward, self.text(rollout), rollout.prompt)

    def text(self, rollout: Rollout) -> str:
        """Return a response as the verifier reads it."""
        return text_of(rollout.response_ids, self.plan.tokenizer)

    @property
    def ungraded(self) -> str:
        """Why the verifier cannot say anything; empty: it can."""
        without = sum(prompt.answer is None for prompt in self.prompts)
        return f"{without} of {len(self.prompts)} prompts have no answer" if without else ""

    @cached_property
    def accuracies(self) -> tuple[Estimate, Estimate, Estimate]:
        """The student's, the teacher's, and their difference."""
        return evidence.accuracies(self.student, self.by_teacher)

    @property
    def remedy(self) -> str:
        """The commands of a cold start: the teacher's responses to a file, and training on them."""
        c, data = self.config, self.config.data
        keys = " ".join(f"{key}={json.dumps(x)}" for key, x in data.chat_template_kwargs.items())
        options = {
            "template": data.template if data.template != "none" else "",
            "chat-template": data.chat_template if data.chat_template != "tokenizer" else "",
            "chat-template-kwargs": keys,
            "max-prompt-tokens": str(data.max_prompt_tokens),
            "max-tokens": str(c.rollout.max_tokens),
            "dtype": self.teacher.dtype or c.student.dtype,
            "reject": "truncated",
            "out": "cold_start.jsonl",
        }
        written = " ".join(f"--{name} {value}" for name, value in options.items() if value)
        no_teacher = "teachers={}" if self.name else "teacher=null"
        return (
            f"python tools/generate.py {self.teacher_path} {' '.join(data.prompts)} {written}; "
            f"python -m megatron_opd {self.words} {no_teacher} objective.support=sampled "
            "objective.divergence=cross_entropy rollout.engine=replay rollout.n=1 "
            f"data.prompts=[cold_start.jsonl] run.dir={c.run.dir}_cold_start"
        )

    def close(self) -> None:
        """Let the engine go, if there is one."""
        if "bench" in vars(self):
            self.bench.close()


def _read(prompt: Prompt, ids: Sequence[int]) -> Rollout:
    """Return a text that nobody drew."""
    return Rollout(prompt, 0, tuple(ids), (0.0,) * len(ids), "stop", drawn=False)
