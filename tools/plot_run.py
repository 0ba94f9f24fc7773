"""Draw the dynamics of one or more runs, side by side, as pictures and as one page.

python tools/plot_run.py RUN [RUN ...] --out DIR

A RUN is the directory of a run (run.dir), or NAME=DIRECTORY. DIR gets one file a picture (accuracy,
overlap, entropies, stability, extreme advantages, maps by position, rewards, time) and index.html
with all of them, the last values, and how the configs differ. What was not logged is left out, and
said so.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_opd.plots import read_runs, write_report
from megatron_opd.plots.report import FORMATS


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, read, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="DIRECTORY or NAME=DIRECTORY")
    parser.add_argument("--out", default="plots", metavar="DIR", help="default: plots")
    parser.add_argument(
        "--smooth", type=int, default=1, metavar="N", help="draw means over N steps"
    )
    parser.add_argument(
        "--formats", nargs="+", default=["png"], metavar="FORMAT", help=", ".join(FORMATS)
    )
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.runs)
        files, missing = write_report(
            runs, options.out, formats=options.formats, smooth=options.smooth
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in missing:
        print(f"left out: {line}")
    print(files[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
