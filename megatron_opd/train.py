"""The loop: generate, reward, pack, score, step, log, save. All else is a part that it is given."""

from contextlib import closing

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.clock import Clock
from megatron_opd.job import Job
from megatron_opd.step import train_step


def main(config: cfg.Config) -> None:
    """Run one job from its config; every rank calls this.

    Raises:
        ValueError: bad input, the same line on every rank.
    """
    parallel = mesh.initialize(
        config.parallel.tp,
        config.parallel.pp,
        cp=config.parallel.cp,
        ep=config.parallel.ep,
        etp=config.parallel.etp,
        vpp=config.parallel.vpp,
        sequence_parallel=config.parallel.sequence_parallel,
        seed=config.seed,
        timeout_minutes=config.parallel.timeout_minutes,
    )
    with closing(Job(config, parallel)) as job:
        start = job.restore()
        if job.evaluates_at(start) and start == 0:
            job.log(0, job.evaluate())
        for step in range(start + 1, job.steps + 1):
            clock = Clock()
            rollouts = job.reward(job.generate(step, clock), clock)
            microbatches = job.pack(rollouts, step)
            judgements = job.score(microbatches)
            microbatches = job.compare(microbatches, judgements)
            clock.lap("score")
            metrics = train_step(job.student, microbatches, judgements, job.objective_at(step))
            job.follow(metrics)
            del judgements  # hidden states of every token: gone before the next rollout
            clock.lap("train")
            record = job.measure(metrics, rollouts, microbatches, clock.read())
            if job.evaluates_at(step):
                record |= job.evaluate()
            job.log(step, record)
            job.save_rollouts(step, rollouts)
            if job.saves_at(step):
                job.save(step)
        if config.run.export:
            job.export()
    mesh.shutdown()
