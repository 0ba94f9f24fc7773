"""Convert a checkpoint between Hugging Face and Megatron, tensor by tensor, without a GPU."""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anyone looks: conversion takes no GPU

import torch

from megatron_opd.model import architecture
from megatron_opd.model.convert import (
    Compare,
    Different,
    ToHuggingFace,
    ToMegatron,
    dtypes,
    evict,
    fingerprint,
    open_hf,
)
from megatron_opd.model.dist_files import MegatronFiles, checkpoint_folder
from megatron_opd.model.hf_map import weights
from megatron_opd.model.parts import Draft, check_room, draft_of, run
from megatron_opd.model.torch_dist import HF

DESCRIPTION = """\
Convert a checkpoint between Hugging Face safetensors and Megatron-Core torch_dist, bit by bit. No
model is built: memory is a few tensors for each worker. A Megatron checkpoint has no layout: any
tp, pp, vpp and ep loads it, and it may come from any. A training run's is one too, and so is
Megatron-LM's own: what is of their optimizer is left behind. After a crash, the same command goes
on with what is not finished."""
EXAMPLES = """\
examples:
  %(prog)s hf-to-megatron Qwen3-32B qwen3-megatron --workers 8 --verify
  %(prog)s megatron-to-hf qwen3-megatron qwen3-hf
  %(prog)s megatron-to-hf runs/qwen3/checkpoints/step_000050 qwen3-step-50 --dtype bfloat16
  %(prog)s megatron-to-hf megatron-lm/checkpoints qwen3-lm --hf Qwen3-32B"""
DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
PART_BYTES = {"hf-to-megatron": 1 << 29, "megatron-to-hf": 5_000_000_000}  # as shards commonly are


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
        sub.add_argument("src", type=Path, metavar="SRC", help="checkpoint folder to read")
        sub.add_argument("dst", type=Path, metavar="DST", help="folder to write; must not exist")
        sub.add_argument("--dtype", choices=DTYPES, default="keep", help="default: as it is")
        sub.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
        sub.add_argument(
            "--verify",
            action="store_true",
            help="then read both again and compare all bits; if DST is there, do just that",
        )
        if kind == "megatron-to-hf":
            sub.add_argument(
                "--hf", type=Path, help="folder with config.json and tokenizer (default: SRC/hf)"
            )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Find what the user got wrong in the arguments.

    Raises:
        ValueError: one line: key, got, expected.
    """
    if args.dst.exists() and not args.verify:
        raise ValueError(f"DST={args.dst} exists; remove it or choose another name")
    if args.workers < 1:
        raise ValueError(f"--workers={args.workers}, expected at least 1")
    args.dtype = DTYPES[args.dtype]
    if args.kind == "megatron-to-hf":
        args.src = checkpoint_folder(args.src)
        args.hf = args.hf or args.src / HF
        if not args.hf.exists():
            raise ValueError(
                f"{args.hf} is missing; give --hf, a folder with config.json and the tokenizer"
            )


def convert(args: argparse.Namespace) -> None:
    """Read SRC and write DST.

    Raises:
        ValueError: SRC is not what it should be. OSError: DST cannot be written.
    """
    draft, size = draft_of(args.dst), PART_BYTES[args.kind]
    if args.kind == "hf-to-megatron":
        job = ToMegatron(args.src, draft, args.dtype, part_bytes=size)
        read = [args.src / "config.json", *job.files.files()]
    else:
        job = ToHuggingFace(args.src, draft, args.dtype, description=args.hf, part_bytes=size)
        read = [args.hf / "config.json", *job.files.files()]
    settings = {
        "kind": args.kind,
        "src": str(args.src.resolve()),
        "dtype": str(args.dtype),
        "files": fingerprint(read),
    }
    check_room(args.dst, job)
    output = Draft(args.dst, settings)
    try:
        run(job, args.workers, "convert")
        job.finish()
    except ValueError:
        if not any(job.is_done(part) for part in range(len(job.sizes))):
            output.drop()
        raise
    output.publish()


def verify(args: argparse.Namespace) -> None:
    """Compare SRC and DST, as they are on the disk.

    Raises:
        Different: names the first tensor that differs. ValueError: a file cannot be read.
    """
    there = args.kind == "hf-to-megatron"
    hf, megatron = (args.src, args.dst) if there else (args.dst, args.src)
    every, files = weights(architecture(hf)), open_hf(hf)
    other = MegatronFiles(megatron, architecture(hf))
    before, after = (files, other) if there else (other, files)
    evict(after.files())
    run(Compare(before, after, every, dtypes(before, every, args.dtype)), args.workers, "verify")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 1: DST differs from SRC, 2: a one-line error."""
    args = arguments(argv)
    try:
        check(args)
        if not args.dst.exists():
            convert(args)
        if args.verify:
            verify(args)
    except Different as problem:
        print(f"different: {problem}", file=sys.stderr)
        return 1
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as problem:
        told, draft = " ".join(str(problem).split()) or "interrupted", draft_of(args.dst)
        more = (
            f"; what is finished is in {draft}: the same command goes on" if draft.exists() else ""
        )
        print(f"error: {told}{more}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
