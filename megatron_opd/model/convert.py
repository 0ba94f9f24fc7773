"""Convert a checkpoint between Hugging Face and `torch_dist`: no model is built, no ranks joined.

Both formats hold whole tensors, so converting is copying, one tensor at a time, by the weight map.
"""

import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_opd.model.config import architecture
from megatron_opd.model.dist_files import MegatronFiles
from megatron_opd.model.hf_files import (
    TensorFiles,
    sane,
    scan,
    some,
    write_description,
)
from megatron_opd.model.hf_map import Shape, Weight, manifest, spare_layers, weights
from megatron_opd.model.hf_writer import ShardWriter
from megatron_opd.model.parts import JOURNAL, write_whole
from megatron_opd.model.stored import Place, places
from megatron_opd.model.torch_dist import HF, write_companions

log = logging.getLogger("megatron_opd")
_PIECE_BYTES = 1 << 26  # of a tensor, read and written in one go
Files = TensorFiles | MegatronFiles
Dtypes = Mapping[str, torch.dtype]  # of each Hugging Face tensor, once it is converted


def open_hf(folder: Path) -> TensorFiles:
    """Open a Hugging Face checkpoint whose tensors are those of its `config.json`.

    Raises:
        ValueError: it is not supported, or a file or tensor is missing, cut off or of other shape.
    """
    arch, files = architecture(folder), TensorFiles(folder)
    files.check(manifest(arch), free_rows=set(), spare=spare_layers(arch))
    return files


def dtypes(files: Files, every: Sequence[Weight], dtype: torch.dtype | None) -> Dtypes:
    """Return the dtype of each tensor; None: the one that it has.

    Raises:
        ValueError: it has one that no model has.
    """
    kept = {name: files.dtype_of(name) for weight in every for name in weight.hf}
    if dtype is None:
        return kept
    return {name: weight.dtype(dtype) for weight in every for name in weight.hf}


def main_dtype(kinds: Dtypes) -> torch.dtype:
    """Return the dtype of most tensors: the one that `config.json` names."""
    return Counter(kinds.values()).most_common(1)[0][0]


class ToMegatron:
    """Write `torch_dist` into `folder`, a file for each part; see `parts.Job`."""

    def __init__(self, source: Path, folder: Path, dtype: torch.dtype | None, *, part_bytes: int):
        """Plan the parts.

        Raises:
            ValueError: see `open_hf`, or tensors that are stored as one have several dtypes.
        """
        self.source, self.folder, self.files = source, folder, open_hf(source)
        arch = architecture(source)
        if self.files.any_begins(spare_layers(arch)):
            log.warning("%s: its multi-token prediction is left out", source)
        self.kinds = dtypes(self.files, weights(arch), dtype)
        self.parts: list[list[tuple[Weight, Place, Shape]]] = []
        self.sizes: list[int] = []
        self.of_key: dict[str, torch.dtype] = {}
        for weight, place, shape in places(arch):
            kind = self._one_dtype(weight, place)
            size = kind.itemsize * math.prod(shape[len(place.at) :])
            if not self.sizes or self.sizes[-1] + size > part_bytes:
                self.parts.append([])
                self.sizes.append(0)
            self.parts[-1].append((weight, place, shape))
            self.sizes[-1] += size

    def _one_dtype(self, weight: Weight, place: Place) -> torch.dtype:
        found = {self.kinds[name] for name in weight.hf}
        found.add(self.of_key.setdefault(place.key, self.kinds[next(iter(weight.hf))]))
        if len(found) > 1:
            names = some(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise ValueError(
                f"{self.source}: tensors of {place.key} have dtypes {names}, but Megatron stores "
                "them as one; choose with --dtype"
            )
        return self.of_key[place.key]

    def is_done(self, part: int) -> bool:
        return self._note(part).exists()

    def _note(self, part: int) -> Path:
        return self.folder / JOURNAL / f"part_{part:05d}.json"

    def do(self, part: int) -> Iterator[int]:
        file, chunks = self.folder / f"__{part}_0.distcp", []
        # its own writer keeps the last tensor of every name until the file is written
        with file.open("wb") as stream:
            for weight, place, shape in self.parts[part]:
                for row, piece in self._pieces(weight, shape[len(place.at)]):
                    offsets = (*place.at, row, *([0] * (piece.dim() - 1)))
                    sizes = (*([1] * len(place.at)), *piece.shape)
                    begin = stream.tell()
                    torch.save(piece.view(sizes), stream)
                    length = stream.tell() - begin
                    chunks.append([place.key, offsets, sizes, shape, begin, length])
                    yield piece.nbytes
            stream.flush()
            os.fsync(stream.fileno())
        write_whole(self._note(part), chunks)

    def _pieces(self, weight: Weight, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows of a fused tensor, and which is the first of them."""
        if weight.groups > 1:  # interleaved, and no large one
            parts = [torch.cat([p for _, p in self._read(name, weight)]) for name in weight.hf]
            yield 0, weight.fuse(parts, 1)
            return
        row, piece = 0, torch.empty(0)
        for name in weight.hf:
            for start, piece in self._read(name, weight):
                yield row + start, piece
            row += self.files.shape(name)[0]
        if row < rows:  # of a vocabulary table
            yield row, piece.new_zeros(rows - row, *piece.shape[1:])

    def _read(self, name: str, weight: Weight) -> Iterator[tuple[int, Tensor]]:
        """Yield one tensor of the source, converted, a few rows at a time."""
        rows, *width = self.files.shape(name)
        step, zero = max(1, _PIECE_BYTES // (4 * math.prod(width))), True
        for start in range(0, rows, step):
            piece = self.files.read(name, 0, start, min(rows, start + step))
            zero = scan(piece, f"{self.source}: {name}") and zero
            if zero and weight.start != 0 and start + step >= rows:
                raise ValueError(f"{self.source}: {name} is all zero")
            yield start, piece.to(self.kinds[name], copy=True)

    def finish(self) -> None:
        """Write what makes a checkpoint of the parts."""
        tensors: dict[str, TensorStorageMetadata] = {}
        written = []
        for part in range(len(self.parts)):
            for key, offsets, sizes, shape, *span in json.loads(self._note(part).read_text()):
                properties = TensorProperties(self.of_key[key])
                empty = TensorStorageMetadata(properties, torch.Size(shape), [])
                chunks = tensors.setdefault(key, empty).chunks
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                index = MetadataIndex(key, offsets, len(chunks) - 1)
                info = _StorageInfo(f"__{part}_0.distcp", *span)
                written.append(WriteResult(index=index, size_in_bytes=span[1], storage_data=info))
        _Writer(self.folder).finish(Metadata({**tensors}), [written])
        torch.save({}, self.folder / COMMON_STATE_FNAME)
        shutil.rmtree(self.folder / HF, ignore_errors=True)
        write_companions(self.source, self.folder, main_dtype(self.kinds))
        save_config(CheckpointingConfig("torch_dist"), str(self.folder))


class _Writer(FileSystemWriter):
    """Leaves the draft's name and a random number out of the metadata."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class ToHuggingFace:
    """Write safetensors into `folder`, a shard for each part; see `parts.Job`."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        dtype: torch.dtype | None,
        *,
        description: Path,
        part_bytes: int,
    ):
        """Plan the shards; `description` is the folder with `config.json` and the tokenizer.

        Raises:
            ValueError: see `MegatronFiles`.
        """
        self.source, self.folder, self.description = source, folder, description
        arch = architecture(description)
        self.files, every = MegatronFiles(source, arch), weights(arch)
        self.kinds = dtypes(self.files, every, dtype)
        self.weight_of = {name: weight for weight in every for name in weight.hf}
        shapes = {name: shape for weight in every for name, shape in weight.hf.items()}
        tensors = {name: (self.kinds[name], shape) for name, shape in shapes.items()}
        self.writer = ShardWriter(folder, tensors, part_bytes)
        self.shapes, self.shards = shapes, list(self.writer.shards)
        self.sizes = [
            sum(self.kinds[name].itemsize * math.prod(shapes[name]) for name in names)
            for names in self.writer.shards.values()
        ]

    def is_done(self, part: int) -> bool:
        return (self.folder / self.shards[part]).exists()

    def do(self, part: int) -> Iterator[int]:
        shard = self.writer.begin(self.shards[part])
        for name in self.writer.shards[self.shards[part]]:
            tensor = whole(self.files, name, self.shapes[name])
            may_be_zero = self.weight_of[name].start == 0
            sane(tensor, f"{self.files.folder}: {name}", may_be_zero=may_be_zero)
            tensor = tensor.to(self.kinds[name])
            shard.add(name, tensor)
            yield tensor.nbytes
        shard.close()

    def finish(self) -> None:
        self.writer.write_index()
        write_description(self.description, self.folder, main_dtype(self.kinds))


def whole(files: Files, name: str, shape: Shape) -> Tensor:
    """Read a Hugging Face tensor; of a vocabulary table the rows that are not padding."""
    return files.read(name, 0, 0, shape[0])


class Compare:
    """Read both checkpoints again and find the first tensors that differ; see `parts.Job`."""

    def __init__(self, before: Files, after: Files, every: Sequence[Weight], kinds: Dtypes):
        self.before, self.after, self.kinds = before, after, kinds
        self.parts = [weight.hf for weight in every]
        self.sizes = [
            sum(kinds[name].itemsize * math.prod(shape) for name, shape in part.items())
            for part in self.parts
        ]

    def is_done(self, part: int) -> bool:
        return False

    def do(self, part: int) -> Iterator[int]:
        """Compare the tensors of one weight.

        Raises:
            Different: names the tensor.
        """
        for name, shape in self.parts[part].items():
            expected = whole(self.before, name, shape).to(self.kinds[name])
            got = whole(self.after, name, shape)
            if got.dtype != expected.dtype or not torch.equal(_bits(got), _bits(expected)):
                raise Different(f"{self.after.folder}: {name} is not that of {self.before.folder}")
            yield got.nbytes


class Different(Exception):
    """A tensor is not what it was converted from."""


def _bits(tensor: Tensor) -> Tensor:
    """Return numbers that are equal if all bits are: 0 is not -0."""
    kind: Callable[[int], Any] = {2: torch.int16, 4: torch.int32}.__getitem__
    return tensor.view(kind(tensor.element_size()))


def evict(files: Sequence[Path]) -> None:
    """Have the kernel forget what it keeps of files, so that they are read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fingerprint(files: Sequence[Path]) -> dict[str, list[int]]:
    """Return what tells that files were not changed: length and time of modification."""
    stats = {file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
