"""Hugging Face checkpoint folders on disk: slices read lazily, shards written one at a time."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_opd.model.config import DTYPES, HFConfig, read_config, read_json
from megatron_opd.model.hf_map import Shape

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# what belongs to a model besides its weights and config.json
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


class TensorFiles:
    """The safetensors of one checkpoint folder. Only headers are read until `read` is called."""

    def __init__(self, folder: str | Path):
        """Open every file.

        Raises:
            ValueError: no safetensors, a file or an index that cannot be read or is cut off, or a
                file that the index names is absent.
        """
        self.folder = Path(folder)
        self.bytes_read = 0
        self._slices: dict[str, Any] = {}
        for file in self._files():
            try:
                opened = safe_open(file, framework="pt")
                names = opened.keys()
                self._slices.update({name: opened.get_slice(name) for name in names})
            except (OSError, SafetensorError) as problem:
                raise ValueError(f"{file}: not a readable safetensors file: {problem}") from None

    def _files(self) -> list[Path]:
        single, index = (self.folder / f"model.safetensors{end}" for end in ("", ".index.json"))
        if not index.exists() and not single.exists():
            raise ValueError(f"{self.folder}: has neither {single.name} nor {index.name}")
        if not index.exists():
            return [single]
        file_of = read_json(index, "an index of safetensors").get("weight_map")
        named = isinstance(file_of, dict) and all(isinstance(x, str) for x in file_of.values())
        if not named or not file_of:
            raise ValueError(f"{index}: has no weight_map, expected one from tensor to file names")
        files = sorted(set(file_of.values()))
        absent = [name for name in files if not (self.folder / name).exists()]
        if absent:
            raise ValueError(f"{index}: names files that are missing: {_some(absent)}")
        return [self.folder / name for name in files]

    def shape(self, name: str) -> Shape:
        return tuple(self._slices[name].get_shape())

    def dtype(self) -> torch.dtype:
        """Return the one dtype of all tensors.

        Raises:
            ValueError: they differ, or it is not a floating-point dtype of a model.
        """
        found = {piece.get_dtype() for piece in self._slices.values()}
        if len(found) > 1 or found - set(_DTYPES):
            raise ValueError(
                f"{self.folder}: tensors of dtype {_some(sorted(found))}, expected all of one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[found.pop()]

    def check(self, expected: Mapping[str, Shape], free_rows: set[str]) -> None:
        """Compare names and shapes before anything is read; rows of `free_rows` may differ.

        Raises:
            ValueError: tensors are missing, unknown or of another shape; names them.
        """
        problems = {
            "missing": [name for name in expected if name not in self._slices],
            "unknown": [n for n in self._slices if n not in expected and not _ignored(n)],
            "wrong shape": [
                f"{name} {list(self.shape(name))} (expected {list(shape)})"
                for name, shape in expected.items()
                if name in self._slices and not self._fits(name, shape, name in free_rows)
            ],
        }
        told = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        if told:
            raise ValueError(f"{self.folder}: tensors do not fit config.json: {told}")

    def _fits(self, name: str, shape: Shape, free_rows: bool) -> bool:
        first = 1 if free_rows else 0
        return self.shape(name)[first:] == shape[first:]

    def read(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """Read `start:stop` along `dim` (None: the whole tensor), and nothing else."""
        piece = self._slices[name]
        if dim is None:
            tensor = piece[:]
        elif dim == 0:
            tensor = piece[start:stop]
        else:
            tensor = piece[:, start:stop]
        self.bytes_read += tensor.nbytes
        return tensor


def _ignored(name: str) -> bool:
    """Rotary tables and second copies of a tied embedding: transformers skips them as well."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class ShardWriter:
    """Write tensors that arrive in manifest order as numbered safetensors and their index."""

    def __init__(self, folder: Path, sizes: Mapping[str, int], max_shard_bytes: int):
        """Plan the shards: `sizes` is name → bytes, in order."""
        self.folder, self.total = folder, sum(sizes.values())
        self.shard_of: dict[str, int] = {}
        self.pending: dict[str, Tensor] = {}
        shard, used = 0, 0
        for name, size in sizes.items():
            if used and used + size > max_shard_bytes:
                shard, used = shard + 1, 0
            self.shard_of[name], used = shard, used + size
        self.shards = shard + 1
        self.left = Counter(self.shard_of.values())

    def _file(self, shard: int) -> str:
        if self.shards == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; write its shard when that is complete.

        Raises:
            OSError: the disk is full.
        """
        shard = self.shard_of[name]
        self.pending[name] = tensor.detach().cpu().contiguous()
        self.left[shard] -= 1
        if self.left[shard] == 0:
            file, self.pending, tensors = self.folder / self._file(shard), {}, self.pending
            try:
                save_file(tensors, file, metadata={"format": "pt"})
            except SafetensorError as problem:
                raise OSError(f"{file}: {problem}") from None

    def finish(self) -> None:
        """Write the index, when there is more than one shard."""
        assert not any(self.left.values()), "every planned tensor was added"
        if self.shards > 1:
            files = {name: self._file(shard) for name, shard in self.shard_of.items()}
            index = {"metadata": {"total_size": self.total}, "weight_map": files}
            text = json.dumps(index, indent=2)
            (self.folder / "model.safetensors.index.json").write_text(text)


def fresh_folder(draft: Path, final: Path) -> None:
    """Create `draft`, empty, to be renamed to `final`.

    Raises:
        ValueError: `final` exists.
    """
    if final.exists():
        raise ValueError(f"{final} exists; remove it or choose another name")
    shutil.rmtree(draft, ignore_errors=True)  # what a killed run left half written
    draft.mkdir(parents=True)


def write_description(
    source: HFConfig, folder: Path, dtype: torch.dtype, stop_ids: tuple[int, ...] = ()
) -> None:
    """Write all of a Hugging Face folder but the weights.

    `config.json` gets the dtype that the weights have, under the key it uses. If `source` is a
    folder, its generation defaults and tokenizer come along. A generation by these defaults ends
    with any of `stop_ids` too.

    Raises:
        ValueError: a file of `source` cannot be read.
    """
    config = read_config(source)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    _write_json(folder / "config.json", {**config, key: _NAMES[dtype]})
    if not isinstance(source, Mapping):
        _copy_companions(Path(source), folder)
    if stop_ids:
        _add_stops(folder / "generation_config.json", config, stop_ids)


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _add_stops(file: Path, config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> None:
    """Add to the ids that end a generation; without the file, `config.json` has held them."""
    if file.exists():
        defaults = read_json(file, "generation defaults")
    else:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        defaults = {key: config[key] for key in keys if config.get(key) is not None}
    known = defaults.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    _write_json(file, {**defaults, "eos_token_id": sorted({*known, *stop_ids})})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
