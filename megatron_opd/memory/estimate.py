"""What a rank holds: always, and while rollouts are written, judged and learned from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_opd.config import Config, Frozen, Mesh, Teacher, losses
from megatron_opd.loss import Objective, Total
from megatron_opd.memory import activations
from megatron_opd.memory.chunks import logits, summary
from megatron_opd.memory.share import WIDTH, Share, count_parameters
from megatron_opd.model import architecture

Memory = dict[str, dict[str, int]]  # phase → what → bytes
Judges = Mapping[str, tuple[Frozen, str]]  # name → section and payload


def peak(memory: Memory) -> int:
    """Return the bytes of the phase that needs most, with what is always there."""
    phases = {phase: sum(parts.values()) for phase, parts in memory.items()}
    return phases.pop("always") + max(phases.values())


def estimate(
    config: Config, objective: Objective | Total, judges: Judges, dp: int, *, device: str = "cuda"
) -> Memory:
    """Return what is always there, and what each phase of a step adds, on the fullest rank.

    `device` is "cpu" or "cuda", where the run is to be: the loss takes other chunks there.
    """
    layout = config.parallel
    world = layout.tp * layout.pp * layout.cp * dp
    ranks = {
        _stages(rank, world, layout, judges): _Rank(config, objective, judges, rank, world, device)
        for rank in range(world)
    }
    return max((rank.memory() for rank in ranks.values()), key=peak)


def _stages(rank: int, world: int, layout: Mesh, judges: Judges) -> tuple[int, ...]:
    """Return the pipeline stages that a rank has of every model: all else is alike."""
    meshes = [layout, *(s.parallel for s, _ in judges.values() if s.parallel is not None)]
    return tuple(rank // (world // mesh.pp) for mesh in meshes)


@dataclass(frozen=True)
class _Rank:
    config: Config
    objective: Objective | Total
    judges: Judges
    rank: int
    world: int
    device: str

    def memory(self) -> Memory:
        found: Memory = {
            "always": self._always(),
            "rollout": self._rollout(),
            "score": {},
            "train": self._train(),
            "update": self._update(),
        }
        if self.judges:
            self._score(found)
        return {phase: {k: n for k, n in parts.items() if n} for phase, parts in found.items()}

    @cached_property
    def student(self) -> Share:
        return self._share(self.config.student.path, self.config.student.dtype, None)

    def _share(self, path: str, dtype: str, mesh: Mesh | None) -> Share:
        own, arch = mesh or self.config.parallel, architecture(path)
        rows = architecture(self.config.student.path).vocab_rows
        return Share(
            arch,
            own,
            stage=self.rank // (self.world // own.pp),
            world=self.world,
            cp=self.config.parallel.cp if mesh is None else 1,
            width=WIDTH[dtype],
            device=self.device,
            rows=rows if mesh is None else arch.vocab_rows,
        )

    # What is always there, and the update

    def _always(self) -> dict[str, int]:
        found = {"student weights": self.student.weights}
        return found if self.config.optimizer.offload else found | self._training_state()

    def _training_state(self) -> dict[str, int]:
        return {
            "gradients, float32": sum(self.student.parameters) * 4,
            "optimizer states": self._optimized * (12 if self.student.width == 2 else 8),
        }

    @property
    def _optimized(self) -> int:
        return self.student.optimized(distributed=self.config.optimizer.distributed)

    def _update(self) -> dict[str, int]:
        # torch's AdamW takes the roots of all second moments at once on a GPU
        arithmetic = {"arithmetic of AdamW": self._optimized * 4} if self.device == "cuda" else {}
        return (self._training_state() if self.config.optimizer.offload else {}) | arithmetic

    # Rollouts

    @property
    def dp(self) -> int:
        parallel = self.config.parallel
        return self.world // (parallel.tp * parallel.pp * parallel.cp)

    @property
    def _sequences(self) -> int:
        """Sequences of a step on a replica."""
        return self.config.train.prompts_per_step // self.dp * self.config.rollout.n

    def _rollout(self) -> dict[str, int]:
        config, engine = self.config, self.config.rollout.engine
        if engine == "vllm":
            return self._vllm()
        found = {}
        if engine == "megatron" or (engine == "replay" and config.eval.prompts):
            sequences, tokens = self._decoded()
            share, prompts = self.student, sequences * config.data.max_prompt_tokens
            cache = share.arch.cache_elements(share.tp) // share.arch.layers * len(share.layers)
            found["key-value cache"] = tokens * cache * share.width
            at_work = activations.forward(share, scattered=False)
            found["a layer on all prompts"] = int(prompts * at_work)
        return found

    def _decoded(self) -> tuple[int, int]:
        """Return the sequences that are decoded together, and their tokens, at their longest."""
        rollout, prompt = self.config.rollout, self.config.data.max_prompt_tokens
        sequences = tokens = 0
        if rollout.engine == "megatron":
            sequences = min(rollout.batch_size, -(-self._sequences // self.student.cp))
            tokens = sequences * (prompt + rollout.max_tokens)
        if self.config.eval.prompts:  # of which there may be enough for a full batch
            sequences = rollout.batch_size
            longest = prompt + (self.config.eval.max_tokens or rollout.max_tokens)
            tokens = max(tokens, sequences * longest)
        return sequences, tokens

    def _vllm(self) -> dict[str, int]:
        """What a full batch needs; on a GPU vLLM takes all of its gpu_memory_utilization."""
        config, share = self.config, self.student
        tokens = config.rollout.batch_size * config.longest_sequence
        width, tp = share.width, config.rollout.tp
        return {
            "vLLM weights": count_parameters(config.student.path) * width // tp,
            "vLLM key-value cache": tokens * share.arch.cache_elements(tp) * width,
        }

    # What a step learns from

    @property
    def _longest(self) -> int:
        """Tokens of the longest sequence of a microbatch: nothing comes after the last one."""
        return self.config.longest_judged - 1

    @property
    def _tokens(self) -> int:
        """Tokens of the largest microbatch on a rank."""
        limit, all_of_them = self.config.train.microbatch_tokens, self._sequences * self._longest
        return min(limit, all_of_them) // self.student.cp

    @property
    def _supervised(self) -> float:
        """Return what share of a rank's tokens is supervised, at most.

        Of the 2 · cp chunks of a sequence it has the i-th from the start and from the end.
        """
        cp, longest = self.student.cp, self._longest
        prompt, chunk = longest - self.config.rollout.max_tokens, longest / (2 * cp)
        of_chunks = [min(max((i + 1) * chunk - prompt, 0), chunk) for i in range(2 * cp)]
        return max(of_chunks[i] + of_chunks[-1 - i] for i in range(cp)) / (2 * chunk)

    @property
    def _in_flight(self) -> float:
        """Return how many microbatches' activations a stage keeps at a time.

        1F1B runs pp − 1 − stage forwards before it alternates; the interleaved schedule twice as
        many, and all but one chunk of pp microbatches, each of a chunk.
        """
        mesh, share = self.config.parallel, self.student
        fit = max(1, self.config.train.microbatch_tokens // self._longest)
        count = -(-self._sequences // fit)
        ahead = mesh.pp - 1 - share.stage
        if mesh.vpp == 1:
            return min(ahead + 1, count)
        return min(2 * ahead + (mesh.vpp - 1) * mesh.pp + 1, count * mesh.vpp) / mesh.vpp

    def _train(self) -> dict[str, int]:
        share, recompute = self.student, self.config.train.recompute
        tokens, longest = self._tokens, self._longest
        kept = tokens * activations.kept(share, recompute, longest)
        found = {"activations": int(kept * self._in_flight)}
        if share.mesh.sequence_parallel:
            found["gathered tokens"] = tokens * share.arch.hidden * share.width
        at_work = {
            "backward of a layer": int(tokens * activations.backward(share, recompute, longest))
        }
        if share.is_last:
            loss = self._loss(int(tokens * self._supervised))
            at_work = max(at_work, loss, key=lambda parts: sum(parts.values()))
        return found | at_work | self._kept_gradients()

    def _kept_gradients(self) -> dict[str, int]:
        if not self.config.optimizer.offload:
            return {}
        return {"gradients, float32": sum(self.student.parameters) * 4}

    def _loss(self, supervised: int) -> dict[str, int]:
        hidden = {name for name, (_, payload) in self.judges.items() if payload == "hidden"}
        judges = len(hidden & {"base"}) + bool(hidden - {"base"})  # a sample has one teacher
        return logits(
            self.objective,
            self.student,
            supervised,
            judges=judges,
            fraction=self.config.metrics.token_fraction,
            heard=bool(self.judges),
        )

    # Judges

    def _score(self, found: Memory) -> None:
        """Add the judges' weights, their work, and what they say."""
        answers, away, work = {}, {}, {}
        for name, (section, payload) in self.judges.items():
            share = self._judge(section)
            self._weights(name, share, found["always"], away)
            work[f"{name} at work"] = self._work(share, payload)
            what, bytes_per_token = self._answer(share, payload)
            answers[name] = f"{name} {what}", self._answered * bytes_per_token
        teachers = [answers.pop(name) for name in list(answers) if name != "base"]
        said = [*answers.values(), *([max(teachers, key=lambda x: x[1])] if teachers else [])]
        for phase in ("score", "train", "update"):  # a sample has one teacher
            found[phase] |= dict(said)
        for parts in (away, work):  # judges take turns
            largest = max(parts, key=lambda name: parts[name], default=None)
            found["score"] |= {largest: parts[largest]} if largest else {}

    def _judge(self, section: Frozen) -> Share:
        dtype = section.dtype or self.config.student.dtype
        return self._share(self.config.folder(section), dtype, section.parallel)

    @property
    def _answered(self) -> int:
        """Return the tokens whose judgements are here: on the last stage."""
        tokens = self._sequences * self._longest / self.student.cp * self._supervised
        return int(tokens) if self.student.is_last else 0

    def _work(self, share: Share, payload: str) -> int:
        """Return what a judge's forward takes, or its logits then where it sums them up."""
        tokens = self._tokens * self.student.cp // share.cp
        layer = int(tokens * activations.forward(share))
        if payload == "hidden" or not share.is_last:
            return layer
        supervised = int(tokens * self._supervised)
        states = (tokens + supervised) * share.arch.hidden * share.width
        return max(layer, states + summary(self.objective, share, supervised))

    def _weights(self, name: str, share: Share, always: dict[str, int], away: dict[str, int]):
        """Say where a judge's weights are between uses."""
        section, payload = self.judges[name]
        weights = section.weights if isinstance(section, Teacher) else "file"
        if weights == "live":  # the student's
            return
        size, own = share.weights, section.parallel is not None
        if payload == "hidden" and self.student.is_last and (section.offload or own):
            # the loss multiplies by the head: it stays, cut as the student's
            head = always[f"{name} head"] = self.student.columns * share.arch.hidden * share.width
            size -= 0 if own else head
        (away if section.offload else always)[f"{name} weights"] = size
        if weights == "ema" and share.width == 2 and not section.offload:
            always[f"{name} mean, float32"] = sum(share.parameters) * 4

    def _answer(self, share: Share, payload: str) -> tuple[str, int]:
        """Return what a judge says of a token, and its bytes."""
        k = max(loss.k for loss in losses(self.config).values())
        return {
            "hidden": ("hidden states", share.arch.hidden * share.width),
            "topk": ("top k", k * (8 + 4)),  # int64 ids, float32 logarithms
            "sampled": ("log-probabilities", 4),
        }[payload]
