"""Convert a checkpoint between Hugging Face and Megatron, on the CPU, at any tp × pp."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anyone looks: conversion takes no GPU

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from megatron_opd import parallel as mesh
from megatron_opd.model import architecture, build_model, check_layout, load_hf, save_hf
from megatron_opd.model.hf_files import TensorFiles
from megatron_opd.model.torch_dist import HF, load_megatron, save_megatron

DESCRIPTION = """\
Convert a checkpoint between Hugging Face safetensors and Megatron-Core torch_dist, bit by bit:
the dtype is kept. Works on the CPU and starts its tp × pp processes itself; a Megatron checkpoint
written at one layout loads at any other. A training run's checkpoint is one too: the state of its
optimizer is left behind."""
EXAMPLES = """\
examples:
  %(prog)s hf-to-megatron Qwen3-0.6B qwen3-megatron --tp 2
  %(prog)s megatron-to-hf qwen3-megatron qwen3-hf
  %(prog)s megatron-to-hf runs/qwen3/checkpoints/step_000050 qwen3-step-50"""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in (
        ("hf-to-megatron", "read safetensors, write torch_dist, and the tokenizer to DST/hf"),
        ("megatron-to-hf", "read torch_dist, write a folder that from_pretrained loads"),
    ):
        sub = kinds.add_parser(kind, help=text, description=text)
        sub.add_argument("src", type=Path, help="checkpoint folder to read")
        sub.add_argument("dst", type=Path, help="folder to write; must not exist")
        sub.add_argument("--tp", type=int, default=1, help="tensor-parallel processes")
        sub.add_argument("--pp", type=int, default=1, help="pipeline-parallel processes")
    return parser.parse_args(argv)


def convert(parallel: mesh.Parallel, args: argparse.Namespace) -> None:
    """Read SRC and write DST; collective."""
    source = args.src if args.kind == "hf-to-megatron" else args.src / HF
    model = build_model(source, parallel, dtype=args.dtype, seed=None)
    if args.kind == "hf-to-megatron":
        load_hf(model, source, parallel)
        save_megatron(model, source, args.dst, parallel)
    else:
        load_megatron(model, args.src, parallel)
        save_hf(model, source, args.dst, parallel)


def check(args: argparse.Namespace) -> torch.dtype:
    """Find what the user got wrong before any process starts; return the checkpoint's dtype.

    Raises:
        ValueError: one line: key, got, expected.
    """
    if args.dst.exists():
        raise ValueError(f"DST={args.dst} exists; remove it or choose another name")
    if args.kind == "hf-to-megatron":
        check_layout(args.src, args.tp, args.pp)
        return TensorFiles(args.src).dtype()
    if not (args.src / "metadata.json").exists():
        raise ValueError(f"SRC={args.src}: has no metadata.json, expected a Megatron checkpoint")
    check_layout(args.src / HF, args.tp, args.pp)
    dtype = architecture(args.src / HF).dtype
    if dtype is None:
        raise ValueError(f"{args.src / HF / 'config.json'}: dtype is missing")
    return dtype


def _rank(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    world = args.tp * args.pp
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    url = f"file://{rendezvous}/store"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world)
    try:
        convert(mesh.initialize(args.tp, args.pp), args)
    except ValueError as problem:  # known to all ranks
        (Path(rendezvous) / "error").write_text(str(problem))
    mesh.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    args = arguments(argv)
    try:
        args.dtype = check(args)
        with tempfile.TemporaryDirectory() as rendezvous:
            world = args.tp * args.pp
            start_processes(_rank, (args, rendezvous), nprocs=world, start_method="fork")
            error = Path(rendezvous) / "error"
            if error.exists():
                raise ValueError(error.read_text())
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
