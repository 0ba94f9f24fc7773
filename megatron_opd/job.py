"""One job: the parts that its config asks for, and what is kept of their work."""

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opd import ahead, build, checkpoint
from megatron_opd import config as cfg
from megatron_opd.ahead import Ahead
from megatron_opd.clock import Clock
from megatron_opd.data import PromptStream
from megatron_opd.evaluation import evaluate
from megatron_opd.metrics import Metrics, RunLog, console_line
from megatron_opd.model import save_hf
from megatron_opd.packing import needed_microbatches, pack
from megatron_opd.parallel import Parallel
from megatron_opd.preflight import preflight
from megatron_opd.rollout import request_seed
from megatron_opd.rollout.vllm_server import ServerEngine
from megatron_opd.step import Judgement
from megatron_opd.types import Microbatch, Rollout

log = logging.getLogger("megatron_opd")


class Job:
    """Student, judges, engine, data and files of one run; every rank calls every method."""

    def __init__(self, config: cfg.Config, parallel: Parallel):
        self.config, self.parallel = config, parallel
        self.folder = Path(config.run.dir)
        plan = parallel.owner(lambda: preflight(config, parallel.world))
        self.steps, self.held_out, self.tokenizer = plan.steps, plan.held_out, plan.tokenizer
        self.warnings = plan.warnings
        self.stream = PromptStream(plan.prompts, config.seed, config.data.shuffle)
        self.run_log: RunLog | None = None
        self.ahead: Ahead | None = None  # the responses of the next step
        self.staleness = 0  # updates that the student is ahead of the weights that wrote a step
        size = plan.vocab_size
        self.student = build.build_student(config, parallel, vocab_size=size, steps=self.steps)
        self.objective = build.build_objective(config)
        self.judges = build.build_judges(config, self.objective, parallel, vocab_size=size)
        self.engine, self.eval_engine = build.build_engines(config, self.student, self.tokenizer)
        self.sampling, self.eval_sampling = build.samplings(config, self.objective, plan.stop_ids)
        self.reward = build.build_reward(config)

    def restore(self) -> int:
        """Open the log, at the newest checkpoint when resuming; return the last finished step.

        Raises:
            ValueError: the data are others than the checkpoint's, or the export at the end would
                meet one that exists.
        """
        newest, step = None, 0
        if self.config.run.resume:
            newest = checkpoint.latest(self.folder / "checkpoints", self.parallel)
        if newest is not None:
            state = checkpoint.load(newest, self.student)
            self.stream.load_state_dict(state["stream"])
            step = state["step"]
            if "ahead" in state:
                self.ahead = ahead.load(state["ahead"], self.stream.prompts, self.parallel)
        self.parallel.main_only(lambda: self._check_export(step))
        self.run_log = self.parallel.main_only(lambda: build.open_log(self.config, step))
        if self.parallel.is_main:
            self._announce(step, newest)
        return step

    def _announce(self, step: int, newest: Path | None) -> None:
        parallel, train = self.parallel, self.config.train
        for line in self.warnings:
            log.warning("warning: %s", line)
        log.info(
            "%d steps of %d prompts × %d responses; %d ranks = tp %d × pp %d × dp %d; in %s",
            self.steps,
            train.prompts_per_step,
            self.config.rollout.n,
            parallel.world,
            parallel.tp,
            parallel.pp,
            parallel.dp,
            self.folder,
        )
        if newest is not None:
            log.info("resumed after step %d, from %s", step, newest)

    def _check_export(self, step: int) -> None:
        if self.config.run.export and self.exported.exists() and step < self.steps:
            raise ValueError(
                f"run.export: '{self.exported}' exists, and step {step} is where this run goes on; "
                "remove it, or set run.export=false"
            )

    @property
    def exported(self) -> Path:
        """Where the student goes at the end."""
        return self.folder / "hf" / f"step_{self.steps:06d}"

    def generate(self, step: int, clock: Clock) -> list[Rollout]:
        """Return this replica's responses to its share of the step's prompts.

        With `rollout.async_depth`, those of the next step are under way when it returns.
        """
        written = (self.ahead or self._begin(step, step - 1, clock)).settled(self.engine)
        self.ahead = None
        if self.config.rollout.async_depth and step < self.steps:
            self.ahead = self._begin(step + 1, step - 1, clock)
        clock.lap("rollout")
        self.staleness = step - 1 - written.updates
        return [replace(rollout, masked=self._is_masked(rollout)) for rollout in written.rollouts]

    def _begin(self, step: int, updates: int, clock: Clock) -> Ahead:
        """Have the responses of a step written by the weights of now, after `updates` steps."""
        clock.lap("rollout")
        self.engine.sync()
        clock.lap("sync")
        prompts, write = self.stream.take(self.config.train.prompts_per_step), self.engine.generate
        if self.config.rollout.async_depth:
            assert isinstance(self.engine, ServerEngine)
            write = self.engine.submit
        writing = write(
            prompts[self.parallel.dp_rank :: self.parallel.dp],
            n=self.config.rollout.n,
            sampling=self.sampling,
            seed=request_seed(self.config.seed, step),
        )
        return Ahead(updates, tuple(prompt.index for prompt in prompts), writing)

    def _settle(self) -> None:
        """Wait for what is under way, where the engine is wanted for something else."""
        if self.ahead is not None:
            self.ahead = self.ahead.settled(self.engine)

    def _is_masked(self, rollout: Rollout) -> bool:
        """Say whether nothing is to be learned from a response."""
        section = self.config.rollout
        if section.mask_truncated and rollout.finish == "length":
            return True
        if section.mask_format is None:
            return False
        return not re.search(section.mask_format, self.tokenizer.decode(rollout.response_ids))

    def pack(self, rollouts: list[Rollout], step: int) -> list[Microbatch]:
        """Pack this replica's rollouts into as many microbatches as every other replica."""
        limit, section = self.config.train.microbatch_tokens, self.config.metrics
        needed = torch.tensor(needed_microbatches(rollouts, limit), device=self.parallel.device)
        dist.all_reduce(needed, dist.ReduceOp.MAX, group=self.parallel.dp_group)
        packed = pack(
            rollouts,
            microbatch_tokens=limit,
            count=int(needed),
            multiple=self.parallel.tp if self.parallel.sequence_parallel else 1,
            measure_fraction=section.token_fraction if self._measures_at(step) else 0.0,
            seed=request_seed(self.config.seed, step),
        )
        return [batch.to(self.parallel.device) for batch in packed]

    def _measures_at(self, step: int) -> bool:
        return step in (1, self.steps) or step % self.config.metrics.every == 0

    def score(self, microbatches: list[Microbatch]) -> list[Judgement]:
        """Ask the teacher and the base, where there are such, about every microbatch."""
        scores = {name: judge.score(microbatches) for name, judge in self.judges.items()}
        return [
            Judgement(**{name: of_all[index] for name, of_all in scores.items()})
            for index in range(len(microbatches))
        ]

    def measure(
        self,
        metrics: Metrics,
        rollouts: list[Rollout],
        microbatches: list[Microbatch],
        seconds: dict[str, float],
    ) -> dict[str, float]:
        """Join what the loss, the rollouts and the clock say about one step."""
        for rollout in rollouts:
            metrics.mean("rollout/response_tokens", len(rollout.response_ids), 1)
            metrics.mean("rollout/truncated_fraction", rollout.finish == "length", 1)
            metrics.mean("rollout/masked_fraction", rollout.masked, 1)
        packed = sum(batch.token_T.numel() for batch in microbatches)
        metrics.mean("train/packed_tokens", packed * self.parallel.dp, 1)
        record = metrics.reduce(None, self.parallel.device)
        rate = record["train/packed_tokens"] / seconds["time/step_s"]
        counts = {
            "train/microbatches": len(microbatches),
            "data/epoch": self.stream.epoch,
            "rollout/staleness_steps": self.staleness,
        }
        return record | counts | seconds | {"perf/tokens_per_s": rate}

    def _doubt_teacher(self, record: dict[str, float]) -> None:
        """Warn of a teacher that prefers nothing: random weights, or none, look like this."""
        uniform, entropy = math.log(self.student.vocab_size), record.get("teacher/entropy", 0.0)
        if entropy > 0.95 * uniform:
            log.warning(
                "teacher: its entropy is %.2f nats of at most %.2f, so it prefers hardly any "
                "token; are the weights in teacher.path trained, and is the prompt in its format?",
                entropy,
                uniform,
            )

    def evaluates_at(self, step: int) -> bool:
        """Say whether held-out prompts are due after `step`."""
        section = self.config.eval
        if not self.held_out:
            return False
        if step in (0, self.steps):
            return section.at_end if step else section.at_start
        return bool(section.every) and step % section.every == 0

    def evaluate(self) -> dict[str, float]:
        """Measure the student on the held-out prompts."""
        self._settle()
        self.eval_engine.sync()
        return evaluate(
            self.eval_engine,
            self.held_out,
            self.reward,
            n=self.config.eval.n,
            sampling=self.eval_sampling,
            seed=request_seed(self.config.seed, 0),
            tokenizer=self.tokenizer,
            parallel=self.parallel,
        )

    def log(self, step: int, record: dict[str, float]) -> None:
        """Write a step's record and tell the user."""
        if self.run_log is not None:
            self.run_log.log(step, record)
            if step == 1:
                self._doubt_teacher(record)
            every = self.config.run.print_every
            if step % every == 0 or step == self.steps or "eval/accuracy" in record:
                log.info(console_line(step, self.steps, record))

    def save_rollouts(self, step: int, rollouts: list[Rollout]) -> None:
        """Write the step's rollouts of rank 0's replica as text, when due."""
        every = self.config.run.save_rollouts_every
        if not every or step % every or not self.parallel.is_main:
            return
        folder = self.folder / "rollouts"
        folder.mkdir(exist_ok=True)
        with (folder / f"step_{step:06d}.jsonl").open("w") as file:
            for rollout in rollouts:
                file.write(json.dumps(self._as_text(rollout), ensure_ascii=False) + "\n")

    def _as_text(self, rollout: Rollout) -> dict:
        return {
            "prompt": rollout.prompt.text,
            "response": self.tokenizer.decode(rollout.response_ids),
            "answer": rollout.prompt.answer,
            "finish": rollout.finish,
            "masked": rollout.masked,
            "tokens": len(rollout.response_ids),
            "logp_mean": sum(rollout.logp) / len(rollout.logp),
            **_top(rollout),
        }

    def saves_at(self, step: int) -> bool:
        """Say whether a checkpoint is due after `step`."""
        every = self.config.run.save_every
        return bool(every) and (step % every == 0 or step == self.steps)

    def save(self, step: int) -> None:
        """Write a checkpoint from which the run goes on bit by bit as if never interrupted."""
        state = {"step": step, "stream": self.stream.state_dict()}
        self._settle()
        if self.ahead is not None:
            state["ahead"] = self.ahead.state_dict(self.parallel)
        checkpoint.save(
            self.folder / "checkpoints",
            self.student,
            state,
            keep=self.config.run.keep,
            source=self.config.student.path,
            stop_ids=self.sampling.stop_ids,
        )

    def export(self) -> None:
        """Write the student as a Hugging Face directory, unless a finished run has."""
        if not self.parallel.owner(self.exported.exists):
            save_hf(
                self.student.model,
                self.config.student.path,
                self.exported,
                self.parallel,
                stop_ids=self.sampling.stop_ids,
            )
        if self.parallel.is_main:
            log.info("exported %s", self.exported)

    def close(self) -> None:
        """Flush and close the log and its mirrors; let the engine go."""
        if self.run_log is not None:
            self.run_log.close()
        self.engine.close()
        for judge in self.judges.values():
            judge.close()


def _top(rollout: Rollout) -> dict[str, list]:
    """Return the engine's most likely ids and their log-probabilities, where they were kept."""
    kept = {"top_ids": rollout.top_ids, "top_logp": rollout.top_logp}
    return {name: x.tolist() for name, x in kept.items() if x is not None}
