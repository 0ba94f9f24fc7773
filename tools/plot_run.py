"""Draw accuracy, reverse KL, overlap and entropies of one or more runs.

python tools/plot_run.py runs/a [runs/b ...] --out curves.png
"""

import argparse
import sys
from pathlib import Path

from megatron_opd.plots import plot_dynamics, read_metrics


def main() -> int:
    """Parse, read, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="directories of runs (run.dir)")
    parser.add_argument("--out", default="curves.png", help="picture to write: .png, .pdf or .svg")
    options = parser.parse_args()
    try:
        runs = {Path(folder).name: read_metrics(folder) for folder in options.runs}
        plot_dynamics(runs, options.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
