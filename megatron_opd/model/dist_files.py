"""Read a `torch_dist` checkpoint as the Hugging Face tensors that are in it: no ranks, no model.

Its files hold chunks of the stored tensors, each of them a small zip archive of `torch.save`. Just
the bytes that are asked for are read; of a chunk that is read whole the checksum is compared.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_opd.model.config import DTYPES, Architecture, read_json
from megatron_opd.model.hf_files import some
from megatron_opd.model.hf_map import Shape, Weight, weights
from megatron_opd.model.stored import Place, find, unread

_BLOCK = 1 << 24  # bytes copied at a time
_LATEST = "latest_checkpointed_iteration.txt"  # of Megatron-LM, beside its iter_0000100 folders

Box = tuple[tuple[int, int], ...]  # (start, stop) along each dim of a stored tensor


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the folder with the checkpoint: `folder`, or the newest of Megatron-LM's in it.

    Raises:
        ValueError: there is none, or not in this format.
    """
    folder = Path(folder)
    latest = folder / _LATEST
    if not (folder / "metadata.json").exists() and latest.exists():
        iteration = latest.read_text().strip()
        name = iteration if iteration == "release" else f"iter_{iteration:0>7}"
        folder = folder / name
    if not (folder / "metadata.json").exists():
        raise ValueError(f"{folder}: has no metadata.json, expected a Megatron checkpoint")
    backend = read_json(folder / "metadata.json", "a checkpoint's format").get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(f"{folder}: sharded_backend={backend!r}, expected 'torch_dist'")
    return folder


class MegatronFiles:
    """The weights of one checkpoint folder. Only what it says of itself is read until `read`."""

    def __init__(self, folder: str | Path, arch: Architecture):
        """Find every tensor of `arch`.

        Raises:
            ValueError: no such checkpoint, a file of it is missing or cut off, or it is one of
                another model.
        """
        self.folder, self.bytes_read = checkpoint_folder(folder), 0
        try:
            metadata = FileSystemReader(self.folder).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as problem:
            told = " ".join(str(problem).split())
            file = self.folder / ".metadata"
            raise ValueError(f"{file}: not the metadata of a checkpoint: {told}") from None
        self._where: dict[MetadataIndex, Any] = metadata.storage_data
        self._stored = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._places: dict[str, tuple[Place, Weight]] = {}
        self._find(arch)
        self._check_files()
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._last: tuple[str, Box, Tensor] | None = None

    def _find(self, arch: Architecture) -> None:
        shapes = {key: tuple(value.size) for key, value in self._stored.items()}
        for weight in weights(arch):
            found = find(weight, shapes, arch)
            if found is None:
                raise ValueError(
                    f"{self.folder}: {weight.megatron[-1]} is missing: a checkpoint of another "
                    "model than config.json describes"
                )
            for name, (place, expected) in zip(weight.hf, found, strict=True):
                got = shapes[place.key]
                if got[weight.vocab :] != expected[weight.vocab :] or got[0] < expected[0]:
                    raise ValueError(
                        f"{self.folder}: {place.key} has shape {list(got)}, expected "
                        f"{list(expected)}"
                    )
                self._places[name] = place, weight
        more = unread((place for place, _ in self._places.values()), shapes)
        if more:
            raise ValueError(f"{self.folder}: {some(more)}: not in the model of config.json")

    def _check_files(self) -> None:
        """Compare the lengths of the files before anything is read."""
        ends: dict[str, int] = {}
        ours = {place.key for place, _ in self._places.values()}
        for index, info in self._where.items():
            if index.fqn in ours:
                end = max(ends.get(info.relative_path, 0), info.offset + info.length)
                ends[info.relative_path] = end
        for name, end in ends.items():
            file = self.folder / name
            size = file.stat().st_size if file.exists() else None
            if size is None:
                raise ValueError(f"{file}: is missing, of {len(ends)} files with the weights")
            if size < end:
                raise ValueError(f"{file}: is cut off: it has {size} bytes, expected {end}")

    def files(self) -> list[Path]:
        return sorted({self.folder / info.relative_path for info in self._where.values()})

    def shape(self, name: str) -> Shape:
        place, weight = self._places[name]
        if weight.vocab:
            return tuple(self._stored[place.key].size)[len(place.at) :]
        return weight.hf[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises:
            ValueError: it is not a floating-point dtype of a model.
        """
        key = self._places[name][0].key
        dtype = self._stored[key].properties.dtype
        if dtype not in DTYPES.values():
            raise ValueError(
                f"{self.folder}: {key} has dtype {dtype}, expected {', '.join(DTYPES)}"
            )
        return dtype

    def read(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """Read `start:stop` along `dim` of a Hugging Face tensor (None: the whole tensor).

        Raises:
            ValueError: a file is not what it was written as.
        """
        (place, weight), shape = self._places[name], self.shape(name)
        bounds = [(0, size) for size in shape]
        if dim is not None:
            bounds[dim] = (start, stop)
        (first, last), lead = bounds[0], tuple((i, i + 1) for i in place.at)
        if weight.groups == 1:
            rows = (place.row + first, place.row + last)
            return self._box(place, (*lead, rows, *bounds[1:])).flatten(0, len(lead))
        per, own = weight.shard_shape(1)[0] // weight.groups, shape[0] // weight.groups
        begin, end = first // own, -(-last // own)  # the groups
        box = (*lead, (begin * per, end * per), *bounds[1:])
        if self._last is None or self._last[:2] != (place.key, box):  # q, k and v come in turn
            self._last = place.key, box, self._box(place, box)
        groups = self._last[2].flatten(0, len(lead)).unflatten(0, (end - begin, per))
        mine = groups[:, place.row : place.row + own].flatten(0, 1)
        return mine[first - begin * own : last - begin * own]

    def _box(self, place: Place, box: Box) -> Tensor:
        """Read part of a stored tensor out of the chunks that it was written in."""
        key, shape = place.key, tuple(stop - start for start, stop in box)
        stored = self._stored[key]
        whole, filled = torch.empty(shape, dtype=stored.properties.dtype), 0
        for chunk, common in _overlaps(self._at(place), box):
            inside = tuple(
                (a - at, b - at) for (a, b), at in zip(common, chunk.offsets, strict=True)
            )
            part = self._chunk(key, chunk, inside)
            if part.shape == whole.shape and part.dtype == whole.dtype:
                return part  # all of it
            there = tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(common, box, strict=True))
            whole[there] = part
            filled += part.numel()
        if filled != whole.numel():
            raise ValueError(f"{self.folder}: {key} is not whole: chunks of it are missing")
        return whole

    def _at(self, place: Place) -> list[ChunkStorageMetadata]:
        """Return the chunks of one layer and expert: all of them are tens of thousands."""
        if place.key not in self._chunks:
            self._chunks[place.key] = {}
            for chunk in self._stored[place.key].chunks:
                axes = zip(chunk.offsets, chunk.sizes, place.at, strict=False)
                for at in product(*(range(start, start + size) for start, size, _ in axes)):
                    self._chunks[place.key].setdefault(at, []).append(chunk)
        return self._chunks[place.key].get(place.at, [])

    def _chunk(self, key: str, chunk: ChunkStorageMetadata, box: Box) -> Tensor:
        info = self._where[MetadataIndex(key, chunk.offsets)]
        file = self.folder / info.relative_path
        try:
            with file.open("rb") as stream:
                part = _inside(_Window(stream, info.offset, info.length), chunk.sizes, box)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as it:
            told = " ".join(str(it).split())[:200]
            raise ValueError(f"{file}: {key} cannot be read: {told}; copy it again") from None
        self.bytes_read += part.nbytes
        return part


class _Window(io.RawIOBase):
    """Part of a file as a file: zip archives look for their index at the end."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int):
        self.stream, self.offset, self.length, self.at = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.at)]
        self.stream.seek(self.offset + self.at)
        count = self.stream.readinto(view)
        self.at += count
        return count


def _overlaps(
    chunks: Sequence[ChunkStorageMetadata], box: Box
) -> Iterator[tuple[ChunkStorageMetadata, Box]]:
    for chunk in chunks:
        ends = [(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        common = tuple(
            (max(a, start), min(b, stop)) for (a, b), (start, stop) in zip(ends, box, strict=True)
        )
        if all(a < b for a, b in common):
            yield chunk, common


def _inside(window: Any, shape: Shape, box: Box) -> Tensor:
    """Read the box out of one archived tensor: whole rows of it, then what is asked of them."""
    like = torch.load(window, map_location="meta", weights_only=True)
    if tuple(like.shape) != tuple(shape):
        raise EOFError(f"it has shape {list(like.shape)}, expected {list(shape)}")
    if not like.is_contiguous():
        window.seek(0)
        whole = torch.load(window, map_location="cpu", weights_only=True)
        return whole[tuple(slice(a, b) for a, b in box)]
    dim = next((i for i, size in enumerate(shape) if size > 1), 0)  # those before are 1
    start, stop = box[dim]
    row = math.prod(shape[dim + 1 :]) * like.itemsize
    raw = _record(window, start * row, (stop - start) * row)
    slab = raw.view(like.dtype).view(*shape[:dim], stop - start, *shape[dim + 1 :])
    return slab[(slice(None),) * (dim + 1) + tuple(slice(a, b) for a, b in box[dim + 1 :])]


def _record(window: _Window, start: int, size: int) -> Tensor:
    """Read bytes of the tensor in an archive, which does not compress it."""
    with zipfile.ZipFile(window) as archive:
        (record,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    window.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", window.read(4))
    window.seek(record.header_offset + 30 + name + extra + start)
    raw, checksum = torch.empty(size, dtype=torch.uint8), 0
    view, filled = raw.numpy().data, 0
    while filled < size:
        count = window.readinto(view[filled : filled + _BLOCK])
        if not count:
            raise EOFError(f"it ends after {filled} of {size} bytes")
        checksum = zlib.crc32(view[filled : filled + count], checksum)
        filled += count
    if size == record.file_size and checksum != record.CRC:
        raise EOFError("its checksum is wrong")
    return raw
