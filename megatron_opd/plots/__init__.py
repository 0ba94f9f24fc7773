"""Pictures of runs, from their metrics.jsonl and config.yaml.

records.py reads runs · panels.py lists what is drawn together · lines.py, heatmaps.py, bars.py draw
it · report.py writes the pictures and one page with all of them.
"""

from megatron_opd.plots.lines import plot_dynamics
from megatron_opd.plots.records import Run, read_metrics, read_runs
from megatron_opd.plots.report import write_report

__all__ = ["Run", "plot_dynamics", "read_metrics", "read_runs", "write_report"]
