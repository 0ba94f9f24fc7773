"""One job: the parts that its config asks for, and what is kept of their work."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_opd import ahead, build, checkpoint, cost, inputs, schedule, transcript
from megatron_opd import config as cfg
from megatron_opd.advantage import of_tokens, summary, with_advantages
from megatron_opd.ahead import Ahead, key
from megatron_opd.balance import rounds, share_out
from megatron_opd.clock import Clock
from megatron_opd.evaluation import evaluate, texts
from megatron_opd.loss import Objective, Total
from megatron_opd.metrics import Metrics, RunLog, console_line
from megatron_opd.model import save_hf
from megatron_opd.packing import pack
from megatron_opd.parallel import Parallel
from megatron_opd.preflight import preflight
from megatron_opd.reward import scored
from megatron_opd.rollout import request_seed
from megatron_opd.rollout.mixed import MixedEngine
from megatron_opd.rollout.vllm_server import ServerEngine
from megatron_opd.step import Judgement
from megatron_opd.stream import numbered
from megatron_opd.types import Microbatch, Rollout, SampledScores, Scores
from megatron_opd.watch import Watch
from megatron_opd.zigzag import part_of

log = logging.getLogger("megatron_opd")


class Job:
    """Student, judges, engine, data and files of one run; every rank calls every method."""

    def __init__(self, config: cfg.Config, parallel: Parallel):
        self.config, self.parallel = config, parallel
        self.folder = Path(config.run.dir)
        plan = parallel.owner(lambda: preflight(config, parallel.world))
        self.steps, self.held_out, self.tokenizer = plan.steps, plan.held_out, plan.tokenizer
        self.warnings = plan.warnings
        self.stream = inputs.build_stream(config, plan.sources)
        self.run_log: RunLog | None = None
        self.ahead: Ahead | None = None  # the responses of the next step
        self.staleness = 0  # updates that the student is ahead of the weights that wrote a step
        size = plan.vocab_size
        self.student = build.build_student(config, parallel, vocab_size=size, steps=self.steps)
        self.objective = build.build_objective(config)
        judges = build.judges(config, self.objective)
        self.cost = cost.of_rollouts(config, self.objective, judges)
        self.balance = 1.0  # mean over highest cost of the replicas' shares of a step
        self.watch = Watch(vocab_size=size, k=self.objective.k)
        self.judges = build.build_judges(config, self.objective, self.student)
        self.engine, self.eval_engine = build.build_engines(config, self.student, self.tokenizer)
        self.sampling, self.eval_sampling = build.samplings(config, self.objective, plan.stop_ids)
        self.eval_reward = build.build_reward(config)
        self.training_reward = build.build_training_reward(config)

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
            state = checkpoint.load(newest, self.student, self.judges.followers)
            self.stream.load_state_dict(state["stream"])
            step = state["step"]
            if "ahead" in state:
                self.ahead = ahead.load(state["ahead"], self.stream.prompts, self.parallel)
        self.parallel.main_only(lambda: self._check_export(step))
        self.run_log = self.parallel.main_only(lambda: build.open_log(self.config, step))
        if self.parallel.is_main:
            self.watch.recall(self.folder / "metrics.jsonl")
            self._announce(step, newest)
        return step

    def _announce(self, step: int, newest: Path | None) -> None:
        parallel, train = self.parallel, self.config.train
        for line in self.warnings:
            log.warning("warning: %s", line)
        log.info(
            "%d steps of %d prompts × %d responses; %d ranks = %s × dp %d; in %s",
            self.steps,
            train.prompts_per_step,
            self.config.rollout.n,
            parallel.world,
            self.config.parallel.told,
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
        rollouts, self.ahead = written.split(self.config.train.prompts_per_step)
        if self.config.rollout.async_depth and step < self.steps:
            self.ahead = self._begin(step + 1, step - 1, clock)
        clock.lap("rollout")
        self.staleness = step - 1 - written.updates
        return [replace(rollout, masked=self._is_masked(rollout)) for rollout in rollouts]

    def _begin(self, step: int, updates: int, clock: Clock) -> Ahead:
        """Have a round of responses written by the weights of now, after `updates` steps."""
        clock.lap("rollout")
        self.engine.sync()
        clock.lap("sync")
        if isinstance(self.engine, MixedEngine):
            self.engine.fraction = schedule.at(self.config, step).rollout.data_fraction
        train, write = self.config.train, self.engine.generate
        rounds = min(train.updates_per_rollout, self.steps - step + 1)
        taken = [self.stream.take(train.prompts_per_step) for _ in range(rounds)]
        prompts = numbered([prompt for of_step in taken for prompt in of_step])
        if self.config.rollout.async_depth:
            assert isinstance(self.engine, ServerEngine)
            write = self.engine.submit
        writing = write(
            prompts[self.parallel.dp_rank :: self.parallel.dp],
            n=self.config.rollout.n,
            sampling=self.sampling,
            seed=request_seed(self.config.seed, step),
        )
        return Ahead(updates, tuple(map(key, prompts)), writing)

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

    def reward(self, rollouts: list[Rollout], clock: Clock) -> list[Rollout]:
        """Say what each response is worth, and how much more than the others of its prompt.

        One rank of a replica scores its responses: of a function that asks a clock or a server,
        ranks would keep different answers.

        Raises:
            ValueError: a reward that is no finite number; on every rank.
        """
        how = self.config.reward.normalize
        if self.training_reward is not None:
            head = self.parallel.head_rank
            scores = self.parallel.agree(lambda: self._scores(rollouts), ranks=(head,))[head]
            rollouts = [replace(r, reward=x) for r, x in zip(rollouts, scores, strict=True)]
            clock.lap("reward")
        if any(rollout.reward is None for rollout in rollouts):
            return rollouts
        return with_advantages(rollouts, how=how)

    def _scores(self, rollouts: list[Rollout]) -> list[float]:
        assert self.training_reward is not None
        said = texts(rollouts, self.tokenizer)
        return [
            scored(self.training_reward, text, rollout.prompt)
            for text, rollout in zip(said, rollouts, strict=True)
        ]

    def pack(self, rollouts: list[Rollout], step: int) -> list[Microbatch]:
        """Share the step's rollouts out to the replicas, and pack what comes to this one."""
        limit, section = self.config.train.microbatch_tokens, self.config.metrics
        whole, parallel = self.objective.group_normalize != "none", self.parallel
        mine, self.balance = share_out(rollouts, self.cost, parallel, whole_prompts=whole)
        how = {
            "microbatch_tokens": limit,
            "cost": self.cost,
            "multiple": parallel.tp if parallel.sequence_parallel else 1,
            "cp": parallel.cp,
            "measure_fraction": section.token_fraction if self._measures_at(step) else 0.0,
            "seed": request_seed(self.config.seed, step),
        }
        cp = {"size": parallel.cp, "rank": parallel.cp_rank, "group": parallel.cp_group}
        return [
            part_of(batch, **cp).to(parallel.device)
            for own, count in rounds(mine, limit, parallel)
            for batch in pack(own, count=count, **how)
        ]

    def _measures_at(self, step: int) -> bool:
        return step in (1, self.steps) or step % self.config.metrics.every == 0

    def score(self, microbatches: list[Microbatch]) -> list[Judgement]:
        """Ask teachers and base, where there are such, about every microbatch."""
        return self.judges.score(microbatches)

    def compare(
        self, microbatches: list[Microbatch], judgements: list[Judgement]
    ) -> list[Microbatch]:
        """Compare the rewards of tokens over their prompts, where the objective wants it.

        On the last pipeline stage, which alone has them, and needs them.
        """
        how = self.objective.group_normalize
        if how == "none" or not self.parallel.is_last_stage:
            return microbatches
        return of_tokens(microbatches, [_sampled(one.teacher) for one in judgements], how=how)

    def objective_at(self, step: int) -> Objective | Total:
        """Return what is minimised at a step."""
        if not self.config.schedules:
            return self.objective
        return build.build_objective(schedule.at(self.config, step))

    def follow(self, metrics: Metrics) -> None:
        """Let the teachers that are running means of the student take its update in."""
        for name, distance in self.judges.follow().items():
            metrics.set(name, distance)

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
            metrics.mean("rollout/data_fraction", not rollout.drawn, 1)
        for name, (total, count) in summary(rollouts).items():
            metrics.mean(name, total, count)
        packed = sum(len(r.prompt.token_ids) + len(r.response_ids) - 1 for r in rollouts)
        room = len(microbatches) * self.config.train.microbatch_tokens
        metrics.mean("train/packed_tokens", packed * self.parallel.dp, 1)
        metrics.mean("train/fill", packed, room)
        self._measure_traffic(metrics, microbatches)
        metrics.mean("train/microbatches", len(microbatches), 1)
        record = metrics.reduce(None, self.parallel.device)
        rate = record["train/packed_tokens"] / seconds["time/step_s"]
        counts = {
            "train/balance": self.balance,
            "data/epoch": self.stream.epoch,
            "rollout/staleness_steps": self.staleness,
        }
        return record | counts | seconds | {"perf/tokens_per_s": rate}

    def _measure_traffic(self, metrics: Metrics, microbatches: list[Microbatch]) -> None:
        """Say what all ranks sent for judges on meshes of their own, for each supervised token."""
        sent = self.judges.traffic()
        if sent is not None:
            counts = self.parallel.tp_rank == 0 and self.parallel.is_last_stage
            supervised = sum(batch.mask_N.sum() for batch in microbatches) if counts else 0.0
            metrics.mean("teacher/bytes_per_token", sent, supervised)

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
            self.eval_reward,
            n=self.config.eval.n,
            sampling=self.eval_sampling,
            seed=request_seed(self.config.seed, 0),
            tokenizer=self.tokenizer,
            parallel=self.parallel,
        )

    def log(self, step: int, record: dict[str, float]) -> None:
        """Write a step's record and tell the user."""
        if step:
            scheduled = schedule.values(self.config, step).items()
            record = record | {f"schedule/{name}": number for name, number in scheduled}
        if self.run_log is not None:
            self.run_log.log(step, record)
            for line in self.watch.see(step, record):
                log.warning("warning: step %d: %s", step, line)
            every = self.config.run.print_every
            if step % every == 0 or step == self.steps or "eval/accuracy" in record:
                log.info(console_line(step, self.steps, record))

    def save_rollouts(self, step: int, rollouts: list[Rollout]) -> None:
        """Write the step's rollouts of rank 0's replica as text, when due."""
        every = self.config.run.save_rollouts_every
        if not every or step % every or not self.parallel.is_main:
            return
        transcript.write(
            self.folder / "rollouts" / f"step_{step:06d}.jsonl", rollouts, self.tokenizer
        )

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
            averages=self.judges.followers,
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
        self.judges.close()


def _sampled(scores: Scores | None) -> Tensor:
    """Return the teacher's log q(y), as which alone it answers where rewards are compared."""
    assert isinstance(scores, SampledScores)
    return scores.logp_N
