"""Weights in and out: load a Hugging Face checkpoint, draw a random one, export, save.

Every rank reads just its own slices. Exporting streams: one fused parameter at a time is whole.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.model.config import Architecture, HFConfig, architecture
from megatron_opd.model.gpt import Stage
from megatron_opd.model.hf_files import ShardWriter, TensorFiles, fresh_folder, write_description
from megatron_opd.model.hf_map import Shape, Weight, manifest, stage_parameters, weights
from megatron_opd.parallel import Parallel

# name, whole shape, dim, start, stop → the slice (dim None: the whole tensor)
_Read = Callable[[str, Shape, int | None, int, int], Tensor]


def load_hf(
    model: Stage, folder: str | Path, parallel: Parallel, *, vocab_size: int | None = None
) -> int:
    """Load a Hugging Face checkpoint into `model` and return the bytes this rank read; collective.

    The vocabulary tables may have other rows than the model: missing rows become zero, and rows
    that do not fit are dropped, unless one of the first `vocab_size` (default: all that config.json
    counts) is among them.

    Raises:
        ValueError: files, names or shapes do not fit (before any tensor is read), or a tensor is
            not finite or all zero. On every rank.
    """

    def load() -> int:
        needed = vocab_size or model.architecture.vocab_rows
        files = _open(folder, model.architecture, needed)
        _check_rows("the model's padded vocabulary", model.vocab_size, needed)

        def read(name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
            return _sane(files.read(name, dim, start, stop), f"{folder}: {name}")

        rows = {name: files.shape(name)[0] for name in _tables(model.architecture)}
        _fill(model, read, rows)
        return files.bytes_read

    return parallel.agree(load)[parallel.rank]


def check_files(folder: str | Path, *, vocab_size: int = 0) -> None:
    """Check a checkpoint against its own `config.json`: headers are read, tensors are not.

    Raises:
        ValueError: `config.json` is not supported, a file cannot be read, is missing or is cut off,
            names or shapes do not fit, or a vocabulary table has fewer than `vocab_size` rows.
    """
    _open(folder, architecture(folder), vocab_size)


def _open(folder: str | Path, arch: Architecture, needed: int) -> TensorFiles:
    files, tables = TensorFiles(folder), _tables(arch)
    files.check(manifest(arch), free_rows=tables)
    for name in tables:
        _check_rows(f"{name} of {files.folder}", files.shape(name)[0], needed)
    return files


def _tables(arch: Architecture) -> set[str]:
    return {name for weight in weights(arch) if weight.vocab for name in weight.hf}


def _check_rows(table: str, rows: int, needed: int) -> None:
    if rows < needed:
        raise ValueError(f"{table} has {rows} rows, expected at least {needed}")


def _sane(tensor: Tensor, name: str) -> Tensor:
    """Refuse what an interrupted download or a lost offload leaves behind.

    A bias may be zero: untrained models have them.
    """
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has values that are not finite")
    if tensor.numel() and not name.endswith(".bias") and not tensor.any():
        raise ValueError(f"{name} is all zero")
    return tensor


def init_random(model: Stage, *, seed: int) -> None:
    """Draw weights to train from scratch: N(0, initializer_range), norms 1, biases 0.

    Projections back into the residual stream get initializer_range / √(2 · layers), as Megatron
    does. A tensor's values depend on its Hugging Face name and `seed` alone: not on the layout.
    """
    arch, std = model.architecture, {}
    for weight in weights(arch):
        scale = 1 / math.sqrt(2 * arch.layers) if weight.cut == 1 else 1.0
        std.update(dict.fromkeys(weight.hf, scale * arch.init_std))

    def draw(name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
        if len(shape) == 1:
            whole = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            whole = std[name] * torch.randn(shape, generator=generator)
        return whole if dim is None else whole.narrow(dim, start, stop - start)

    _fill(model, draw, {})


@torch.no_grad()
def _fill(model: Stage, read: _Read, rows: dict[str, int]) -> None:
    """Assemble every parameter of this rank; `rows` overrides the row count of a table."""
    parameters, tp = stage_parameters(model), model.chunks[0].pg_collection.tp
    for weight in weights(model.architecture):
        for name in weight.megatron:
            if name in parameters:
                shard = parameters.pop(name)
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

    Collective over the replica: all its ranks iterate to the end. Tables have `vocab_size` rows
    (None: those of config.json). Tensors have the model's device and dtype, and may share memory
    with its parameters: do not write.
    """
    parameters, arch = stage_parameters(model), exported(model, vocab_size)
    assert model.vocab_size >= arch.vocab_rows, "a table that was cut on loading is not whole"
    for weight in weights(arch):
        stage, _ = parallel.place(weight.layer, arch.layers)
        if stage == parallel.pp_rank:
            shard = next(parameters[name] for name in weight.megatron if name in parameters)
            whole = _gather(weight, shard.detach(), parallel)
        else:
            dtype, device = model.config.params_dtype, parallel.device
            whole = [torch.empty(s, dtype=dtype, device=device) for s in weight.hf.values()]
        for name, tensor in zip(weight.hf, whole, strict=True):
            if parallel.pp > 1:
                source = dist.get_global_rank(parallel.pp_group, stage)
                dist.broadcast(tensor, source, group=parallel.pp_group)
            yield name, tensor


def _gather(weight: Weight, shard: Tensor, parallel: Parallel) -> list[Tensor]:
    """Join the tensor-parallel ranks' parts of each Hugging Face tensor."""
    parts = weight.split(shard, parallel.tp)
    if weight.cut is not None and parallel.tp > 1:
        for i, part in enumerate(parts):
            ranks = [torch.empty_like(part) for _ in range(parallel.tp)]
            dist.all_gather(ranks, part.contiguous(), group=parallel.tp_group)
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
    itemsize, shapes = model.config.params_dtype.itemsize, manifest(model.architecture)
    sizes = {name: itemsize * math.prod(shape) for name, shape in shapes.items()}
    writer = ShardWriter(draft, sizes, max_shard_bytes)
    problem = _write(writer, model, parallel) if parallel.dp_rank == 0 else None

    def publish() -> None:
        if problem is not None:
            raise problem
        writer.finish()
        write_description(source, draft, model.config.params_dtype, stop_ids)
        draft.rename(final)

    parallel.owner(publish)


def _write(writer: ShardWriter, model: Stage, parallel: Parallel) -> OSError | None:
    """Write the tensors on rank 0 and return what went wrong there.

    The other ranks of the replica wait in the export, so it is seen through even after an error.
    """
    problem = None
    for name, tensor in export_hf(model, parallel):
        if parallel.is_main and problem is None:
            try:
                writer.add(name, tensor)
            except OSError as error:
                problem = error
    return problem
