"""One job: the parts that its config asks for, and what is kept of their work."""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opd import build, checkpoint
from megatron_opd import config as cfg
from megatron_opd.data import PromptStream, vocab_size
from megatron_opd.packing import needed_microbatches, pack
from megatron_opd.parallel import Parallel
from megatron_opd.rollout import request_seed
from megatron_opd.types import Microbatch, Rollout


class Job:
    """Student, teacher, engine, data and files of one run; every method is collective."""

    def __init__(self, config: cfg.Config, parallel: Parallel):
        self.config, self.parallel = config, parallel
        self.folder = Path(config.run.dir)
        self.tokenizer = build.load_tokenizer(config.student.path)
        size, stops = vocab_size(self.tokenizer), build.stop_ids(config, self.tokenizer)
        prompts, self.held_out = parallel.owner(lambda: build.load_data(config, self.tokenizer))
        self.steps = build.count_steps(config, len(prompts))
        self.stream = PromptStream(prompts, config.seed, config.data.shuffle)
        self.student = build.build_student(config, parallel, vocab_size=size, steps=self.steps)
        self.teacher = build.build_teacher(config, parallel, vocab_size=size)
        self.objective = build.build_objective(config)
        self.writer = build.embedded_engine(config, self.student)  # answers evaluation prompts
        self.engine = build.build_engine(config, self.writer, self.tokenizer)
        self.sampling = build.sampling(config, stops)
        self.eval_sampling = build.eval_sampling(config, stops)

    def restore(self) -> int:
        """Open the log, from the newest checkpoint when resuming; return the last finished step."""
        step, newest = 0, None
        if self.config.run.resume:
            newest = checkpoint.latest(self.folder / "checkpoints", self.parallel)
        if newest is not None:
            state = checkpoint.load(newest, self.student)
            self.stream.load_state_dict(state["stream"])
            step = state["step"]
        self.run_log = self.parallel.main_only(lambda: build.run_log(self.config, step))
        return step

    def generate(self, step: int) -> list[Rollout]:
        """Write this replica's responses to its share of the step's prompts."""
        prompts = self.stream.take(self.config.train.prompts_per_step)
        return self.engine.generate(
            prompts[self.parallel.dp_rank :: self.parallel.dp],
            n=self.config.rollout.n,
            sampling=self.sampling,
            seed=request_seed(self.config.seed, step),
        )

    def pack(self, rollouts: list[Rollout]) -> list[Microbatch]:
        """Pack this replica's rollouts into as many microbatches as every other replica."""
        limit = self.config.train.microbatch_tokens
        needed = torch.tensor(needed_microbatches(rollouts, limit), device=self.parallel.device)
        dist.all_reduce(needed, dist.ReduceOp.MAX, group=self.parallel.dp_group)
        multiple = self.parallel.tp if self.parallel.sequence_parallel else 1
        packed = pack(rollouts, microbatch_tokens=limit, count=int(needed), multiple=multiple)
        return [batch.to(self.parallel.device) for batch in packed]
