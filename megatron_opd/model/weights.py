"""Weights in and out: load a Hugging Face checkpoint, draw a random one, export, save.

Every rank reads just its own slices. Exporting streams: one fused parameter at a time is whole.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.model.config import Architecture, HFConfig, architecture
from megatron_opd.model.dist_files import MegatronFiles
from megatron_opd.model.gpt import Stage
from megatron_opd.model.hf_files import TensorFiles, fresh_folder, sane, write_description
from megatron_opd.model.hf_map import (
    Shape,
    Weight,
    manifest,
    spare_layers,
    stage_parameters,
    weights,
)
from megatron_opd.model.hf_writer import ShardWriter
from megatron_opd.parallel import Parallel
from megatron_opd.types import Head

log = logging.getLogger("megatron_opd")
# name, whole shape, dim, start, stop → the slice (dim None: the whole tensor)
_Read = Callable[[str, Shape, int | None, int, int], Tensor]


def load_hf(
    model: Stage, folder: str | Path, parallel: Parallel, *, vocab_size: int | None = None
) -> int:
    """Load a Hugging Face checkpoint into `model` and return the bytes this rank read; collective.

    The vocabulary tables may have other rows than the model: missing rows become zero, and rows
    that do not fit are dropped, unless one of the first `vocab_size` (default: all that config.json
    counts) is among them. Layers that predict further tokens are left out, with a warning.

    Raises:
        ValueError: files, names or shapes do not fit (before any tensor is read), or a tensor is
            not finite or all zero. On every rank.
    """

    def load() -> int:
        needed = vocab_size or model.architecture.vocab_rows
        files = _open(folder, model.architecture, needed)
        _check_rows("the model's padded vocabulary", model.vocab_size, needed)
        if parallel.is_main and files.any_begins(spare_layers(model.architecture)):
            log.warning("%s: its multi-token prediction is neither trained nor exported", folder)
        fill_from(model, files)
        return files.bytes_read

    return parallel.agree(load)[parallel.rank]


def fill_from(model: Stage, files: TensorFiles | MegatronFiles) -> None:
    """Read every parameter of this rank.

    Raises:
        ValueError: a file cannot be read, or a tensor is not finite or all zero.
    """
    rows = {name: files.shape(name)[0] for name in _tables(model.architecture)}
    _fill(model, _reader(files, model.architecture), rows)


def _reader(files: TensorFiles | MegatronFiles, arch: Architecture) -> _Read:
    zeros = {name for w in weights(arch) if w.start == 0 for name in w.hf}

    def read(name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
        piece = files.read(name, dim, start, stop)
        return sane(piece, f"{files.folder}: {name}", may_be_zero=name in zeros)

    return read


def load_head(
    folder: str | Path,
    parallel: Parallel,
    *,
    padded_vocab: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> Head | None:
    """Load this rank's rows of a checkpoint's output projection, and nothing else; collective.

    Of `padded_vocab` rows over the tensor-parallel ranks, as `load_hf` fills them. None before the
    last pipeline stage.

    Raises:
        ValueError: as `load_hf`. On every rank.
    """
    arch, mine = architecture(folder), 0
    if parallel.is_last_stage:
        mine = padded_vocab // parallel.tp
    weight_VH = torch.empty(mine, arch.hidden, dtype=dtype)

    def load() -> None:
        files = _open(folder, arch, vocab_size)
        table = [weight for weight in weights(arch) if weight.vocab][-1]  # tied: the embedding's
        rows = {name: files.shape(name)[0] for name in table.hf}
        read = _reader(files, arch)
        if mine:
            shard = _shard(table, weight_VH, read, rows, parallel.tp_rank, parallel.tp)
            weight_VH.copy_(shard)

    parallel.agree(load)
    return Head(weight_VH.to(parallel.device), vocab_size, parallel.tp_group) if mine else None


def check_files(folder: str | Path, *, vocab_size: int = 0) -> None:
    """Check a checkpoint against its own `config.json`: headers are read, tensors are not.

    Raises:
        ValueError: `config.json` is not supported, a file cannot be read, is missing or is cut off,
            names or shapes do not fit, or a vocabulary table has fewer than `vocab_size` rows.
    """
    _open(folder, architecture(folder), vocab_size)


def _open(folder: str | Path, arch: Architecture, needed: int) -> TensorFiles:
    files, tables = TensorFiles(folder), _tables(arch)
    files.check(manifest(arch), free_rows=tables, spare=spare_layers(arch))
    for name in tables:
        _check_rows(f"{name} of {files.folder}", files.shape(name)[0], needed)
    return files


def _tables(arch: Architecture) -> set[str]:
    return {name for weight in weights(arch) if weight.vocab for name in weight.hf}


def _check_rows(table: str, rows: int, needed: int) -> None:
    if rows < needed:
        raise ValueError(f"{table} has {rows} rows, expected at least {needed}")


def init_random(model: Stage, *, seed: int) -> None:
    """Draw weights to train from scratch: N(0, initializer_range), norms that do nothing, biases 0.

    Projections back into the residual stream get initializer_range / √(2 · layers), as Megatron
    does. A tensor's values depend on its Hugging Face name and `seed` alone: not on the layout.
    """
    arch = model.architecture
    rows = {name: weight for weight in weights(arch) for name in weight.hf}

    def draw(name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
        constant = rows[name].start
        if constant is not None:
            whole = torch.full(shape, constant)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            std = arch.init_std / (math.sqrt(2 * arch.layers) if rows[name].cut == 1 else 1)
            whole = std * torch.randn(shape, generator=generator)
        return whole if dim is None else whole.narrow(dim, start, stop - start)

    _fill(model, draw, {})


@torch.no_grad()
def _fill(model: Stage, read: _Read, rows: dict[str, int]) -> None:
    """Assemble every parameter of this rank; `rows` overrides the row count of a table."""
    parameters, groups = stage_parameters(model), model.chunks[0].pg_collection
    for weight in weights(model.architecture):
        for name in weight.megatron:
            if name in parameters:
                shard = parameters.pop(name)
                tp = groups.tp if weight.expert is None else groups.expt_tp
                shard.copy_(_shard(weight, shard, read, rows, tp.rank(), tp.size()))
    assert not parameters, f"parameters without a Hugging Face name: {list(parameters)}"


def _shard(
    weight: Weight, like: Tensor, read: _Read, rows: dict[str, int], rank: int, tp: int
) -> Tensor:
    if weight.vocab:
        (name, shape), local = next(iter(weight.hf.items())), like.size(0)
        stop = min((rank + 1) * local, rows.get(name, shape[0]))
        start = min(rank * local, stop)
        table = torch.zeros(like.shape, dtype=like.dtype)
        table[: stop - start] = read(name, shape, 0, start, stop)
        return table
    parts = []
    for name, shape in weight.hf.items():
        size = 0 if weight.cut is None else shape[weight.cut] // tp
        parts.append(read(name, shape, weight.cut, rank * size, (rank + 1) * size))
    return weight.fuse(parts, tp)


def exported(model: Stage, vocab_size: int | None) -> Architecture:
    """Return the architecture whose manifest `export_hf` follows."""
    rows = vocab_size or model.architecture.vocab_rows
    return replace(model.architecture, vocab_rows=rows)


@torch.no_grad()
def export_hf(
    model: Stage, parallel: Parallel, *, vocab_size: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor, whole, in manifest order, on every rank of the replica.

    Collective over the replica: all its ranks iterate to the end. Where replicas share experts, it
    is over all of them (see `Parallel.exports`). Tables have `vocab_size` rows
    (None: those of config.json). Tensors have the model's device and dtype (but see
    `Weight.dtype`), and may share memory with its parameters: do not write.
    """
    parameters, arch = stage_parameters(model), exported(model, vocab_size)
    assert model.vocab_size >= arch.vocab_rows, "a table that was cut on loading is not whole"
    for weight in weights(arch):
        stage, _ = parallel.place(weight.layer, arch.layers)
        if stage == parallel.pp_rank:
            whole = _gather(weight, _shard_of(weight, parameters, model, parallel), parallel)
        else:
            dtype, device = weight.dtype(model.config.params_dtype), parallel.device
            whole = [torch.empty(s, dtype=dtype, device=device) for s in weight.hf.values()]
        for name, tensor in zip(weight.hf, whole, strict=True):
            if parallel.pp > 1:
                source = dist.get_global_rank(parallel.pp_group, stage)
                dist.broadcast(tensor, source, group=parallel.pp_group)
            yield name, tensor


def _shard_of(
    weight: Weight, parameters: dict[str, Tensor], model: Stage, parallel: Parallel
) -> Tensor:
    """Return this rank's part of a weight; of an expert, from the rank that has it."""
    shard = next((parameters[name] for name in weight.megatron if name in parameters), None)
    experts = model.architecture.experts
    if weight.expert is None or experts is None or parallel.ep == 1:
        assert shard is not None, f"{weight.megatron[0]} is not on its stage"
        return shard.detach()
    if shard is None:
        shape = weight.shard_shape(parallel.etp)
        shard = torch.empty(shape, dtype=model.config.params_dtype, device=parallel.device)
    owner = weight.expert * parallel.ep // experts.count
    source = dist.get_global_rank(parallel.ep_group, owner)
    dist.broadcast(shard.detach(), source, group=parallel.ep_group)
    return shard.detach()


def _gather(weight: Weight, shard: Tensor, parallel: Parallel) -> list[Tensor]:
    """Join the tensor-parallel ranks' parts of each Hugging Face tensor."""
    tp, group = parallel.tp, parallel.tp_group
    if weight.expert is not None:
        tp, group = parallel.etp, parallel.etp_group
    parts = weight.split(shard, tp)
    if weight.cut is not None and tp > 1:
        for i, part in enumerate(parts):
            ranks = [torch.empty_like(part) for _ in range(tp)]
            dist.all_gather(ranks, part.contiguous(), group=group)
            parts[i] = torch.cat(ranks, weight.cut)
    rows = [shape[0] for shape in weight.hf.values()]
    return [part[:n].contiguous() for part, n in zip(parts, rows, strict=True)]


def save_hf(
    model: Stage,
    source: HFConfig,
    folder: str | Path,
    parallel: Parallel,
    *,
    stop_ids: tuple[int, ...] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `from_pretrained` loads unchanged; collective over all ranks.

    `source` is the configuration the model was built from; if it is a folder, its generation
    defaults and tokenizer come along. `stop_ids` are the tokens that the model was trained to end
    with, where generation is to stop besides. Written beside `folder` and renamed when complete.

    Raises:
        ValueError: `folder` exists, a file of `source` cannot be read, or the disk is full; on
            every rank.
    """
    final = Path(folder)
    draft = final.with_name(f"tmp_{final.name}")
    parallel.owner(lambda: fresh_folder(draft, final))
    kinds = {
        name: (weight.dtype(model.config.params_dtype), shape)
        for weight in weights(model.architecture)
        for name, shape in weight.hf.items()
    }
    writer = ShardWriter(draft, kinds, max_shard_bytes)
    problem = _write(writer, model, parallel) if parallel.exports else None

    def publish() -> None:
        if problem is not None:
            raise problem
        writer.finish()
        write_description(source, draft, model.config.params_dtype, stop_ids)
        draft.rename(final)

    parallel.owner(publish)


def _write(writer: ShardWriter, model: Stage, parallel: Parallel) -> OSError | None:
    """Write the tensors on rank 0 and return what went wrong there.

    The other ranks wait in the export, so it is seen through even after an error.
    """
    problem = None
    for name, tensor in export_hf(model, parallel):
        if parallel.is_main and problem is None:
            try:
                writer.add(name, tensor)
            except OSError as error:
                problem = error
    return problem
