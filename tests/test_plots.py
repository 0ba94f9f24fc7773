"""Pictures: what is read, what is drawn where, and that nothing covers anything."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from megatron_opd.loss import Objective
from megatron_opd.plots import Run, plot_dynamics, read_metrics, read_runs, write_report
from megatron_opd.plots.bars import draw_phases, draw_sweep
from megatron_opd.plots.heatmaps import draw_heatmaps
from megatron_opd.plots.lines import COLORS, Look, draw_lines, expand, running_mean
from megatron_opd.plots.page import html_page
from megatron_opd.plots.panels import FIGURES, HEATMAPS, OVERVIEW, Figure, Panel
from megatron_opd.plots.records import differences
from megatron_opd.plots.report import left_out
from tests.loss.dense import judge, make_problem

NAMED = {figure.name: figure for figure in FIGURES}
CONFIG = {"student": {"path": "s"}, "objective": {"k": 16}, "rollout": {"max_tokens": 8}, "seed": 0}


def records(steps=6, shift=0.0, buckets=(0, 4, 8)):
    """Return what a run could have logged: evaluation every third step, maps every second."""
    found = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "distill/overlap_ratio": 0.5 + step / 100 + shift,
            "distill/overlap_mass_student": 0.9 + shift / 10,
            "distill/overlap_mass_teacher": 0.95,
            "distill/reverse_kl": 1 / step + shift,
            "student/entropy": 0.3,
            "teacher/entropy": 0.2,
            "optim/grad_norm": 10.0**-step,
            "time/rollout_s": 2.0,
            "time/train_s": 1.0,
            "time/step_s": 3.0,
        }
        if step % 3 == 0:
            record |= {"eval/accuracy": 0.1 * step, "eval/pass@16": 0.6, "eval/pass@4": 0.5}
        if step % 2:
            means = {"student/entropy": 1 + shift, "teacher/entropy": 0.5, "distill/entropy_gap": 1}
            for metric, value in means.items():
                record |= {f"{metric}@{first}": value * (first + step) for first in buckets}
        found.append(record)
    return found


def write_run(folder, *, config=CONFIG, lines=None, **options):
    folder.mkdir(parents=True)
    lines = lines or [json.dumps(record) for record in records(**options)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


# Reading


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "no metrics.jsonl, expected the directory of a run"),
        ("", "no records yet; wait for the first step"),
        ('{"step": 1, "lo', "no records yet"),
        (
            '{"step": 1}\n{"step": \n{"step": 3}\n',
            "row 2: got '{\"step\":', expected a JSON record",
        ),
        ('{"loss": 1}\n', "row 1: got '{\"loss\": 1}', expected .* with a step"),
        ('{"step": 1, "loss": "x"}\n', "row 1: .* expected a JSON record of numbers"),
        ("[1]\n", "row 1"),
    ],
)
def test_what_is_no_log_of_metrics_is_one_line(tmp_path, text, line):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=line) as error:
        read_metrics(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_last_line_that_was_cut_off_is_left_out_and_named(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": NaN}\n{"step": 2, "a": 0.')
    (record,) = read_metrics(tmp_path)
    assert record["step"] == 1 and np.isnan(record["a"])
    assert "row 2: the last line is cut off" in caplog.text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')  # whole, without its end
    assert len(read_metrics(tmp_path)) == 2


def test_runs_are_named_after_their_folders_or_as_told(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "lr=1", "b/distill", "c/distill")]
    words = [str(folders[0]) + "/", str(folders[1]), f"seed 0={folders[2]}", str(folders[3])]
    assert [run.name for run in read_runs(words)] == ["a", "lr=1", "seed 0", "distill"]
    with pytest.raises(ValueError, match=r"are called 'distill'.*name one, as other=.*c/"):
        read_runs([str(folders[2]), str(folders[3])])


def test_a_config_that_is_none_is_one_line(tmp_path):
    folder = write_run(tmp_path / "a")
    for text, line in (("a: [", "no YAML"), ("[1]", "expected sections of a config")):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=line):
            read_runs([str(folder)])
    (folder / "config.yaml").unlink()
    assert read_runs([str(folder)])[0].config == {}


def test_positions_are_numbers_in_order_and_files_are_none():
    rows = [
        {"step": 1, "m": 9.0, "m@0": 1.0, "m@16": 3.0, "m@8": 2.0, "eval/accuracy@24": 0.5},
        {"step": 2, "m": 9.0},
        {"step": 5, "m@0": 4.0, "m@8": 5.0, "other@0": 1.0},
    ]
    run = Run("a", rows)
    grid = run.by_position("m")
    assert (grid.steps, grid.firsts) == ([1, 5], [0, 8, 16])
    np.testing.assert_array_equal(grid.values_PS, [[1, 4], [2, 5], [3, np.nan]])
    assert run.by_position("other") is None  # one bucket says nothing about positions
    assert run.metrics == {"m", "eval/accuracy@24"}
    assert run.series("m") == ([1, 2], [9.0, 9.0])


def test_configs_differ_where_a_value_does(tmp_path):
    configs = [
        {"objective": {"k": 16, "support": "full"}, "run": {"dir": "a"}, "teacher": {"path": "t"}},
        {"objective": {"k": 1, "support": "full"}, "run": {"dir": "b"}, "teacher": None},
    ]
    runs = read_runs([str(write_run(tmp_path / str(i), config=c)) for i, c in enumerate(configs)])
    assert differences(runs) == {"objective.k": [16, 1], "teacher.path": ["t", None]}
    assert differences([*runs[:1], Run("none", [])]) == {}  # unknown is not different


# Curves


def test_every_metric_of_the_models_in_a_panel_is_one_that_is_measured():
    known = judge(make_problem(), Objective(support="rollout_topk", k=4, correction="mask"))
    known = {*known["means"], *known["maxima"], "policy/clipped_fraction"}
    named = {name for figure in FIGURES for panel in figure.panels for name in panel.curves}
    named |= {m.metric for figure in HEATMAPS for m in figure.maps}
    groups = ("loss/", "distill/", "student/", "teacher/", "policy/")
    named = {name for name in named if name.startswith(groups)}
    assert len(named) > 20 and named <= known


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_a_running_mean_stays_between_its_neighbours(values, width, every):
    steps = [every * i for i in range(len(values))]
    means = running_mean(steps, values, width)
    assert len(means) == len(values)
    for i, mean in enumerate(means):
        near = [v for s, v in zip(steps, values, strict=True) if abs(s - steps[i]) <= width / 2]
        assert min(near) - 1e-6 <= mean <= max(near) + 1e-6
    if width < 2 * every:
        np.testing.assert_allclose(means, values, rtol=1e-12)


def test_a_running_mean_is_over_steps():
    assert running_mean([1, 2, 3, 4], [0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert running_mean([0, 10, 20], [0.0, 3.0, 6.0], 9) == [0.0, 3.0, 6.0]
    gap = running_mean([1, 2, 3], [2.0, np.nan, 4.0], 3)
    assert gap[0] == 2 and np.isnan(gap[1]) and gap[2] == 4


def curves_of(ax):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.get_lines()]


def test_curves_have_the_values_that_were_logged():
    runs = [Run("a", records()), Run("b", records(shift=0.1))]
    picture = draw_lines(NAMED["comparison"], Look(runs))
    titles = [ax.get_title(loc="left") for ax in picture.axes]
    assert titles == ["Accuracy on held-out prompts", "Overlap ratio (Eq. 6)"]  # no advantage
    accuracy, overlap = picture.axes
    assert curves_of(accuracy) == [([3, 6], pytest.approx([0.3, 0.6]))] * 2
    assert curves_of(overlap)[1] == (
        [1, 2, 3, 4, 5, 6],
        [r["distill/overlap_ratio"] for r in runs[1].records],
    )
    assert [to_hex(line.get_color()) for line in overlap.get_lines()] == [
        c.lower() for c in COLORS[:2]
    ]
    assert overlap.get_xlabel() == "step" and overlap.get_ylabel() == "fraction of the top k"


def test_smoothed_curves_lie_on_their_pale_originals():
    run = Run("a", records())
    picture = draw_lines(
        Figure("x", "X", (Panel("KL", "nats", {"distill/reverse_kl": ""}),)), Look([run], smooth=3)
    )
    original, smoothed = picture.axes[0].get_lines()
    steps, values = run.series("distill/reverse_kl")
    assert original.get_ydata().tolist() == values and original.get_alpha() == 0.25
    assert smoothed.get_ydata().tolist() == running_mean(steps, values, 3)


def test_what_nobody_logged_is_not_drawn():
    assert draw_lines(NAMED["extremes"], Look([Run("a", records())])) is None
    assert draw_heatmaps(HEATMAPS[1], [Run("a", records())]) is None
    assert draw_phases([Run("a", [{"step": 1}])]) is None


def test_a_star_stands_for_all_names_in_the_order_of_their_numbers():
    panel = Panel("P", "x", {"eval/pass@*": "pass@", "eval/accuracy": "mean"})
    found = expand(panel, [Run("a", records())])
    assert found == {"eval/pass@4": "pass@4", "eval/pass@16": "pass@16", "eval/accuracy": "mean"}


def test_an_axis_is_logarithmic_only_where_all_is_positive():
    figure = Figure("x", "X", (Panel("Norm", "norm", {"optim/grad_norm": ""}, log=True),))
    for lowest, scale in ((1e-9, "log"), (0.0, "linear")):
        rows = [*records(), {"step": 9, "optim/grad_norm": lowest}]
        assert draw_lines(figure, Look([Run("a", rows)])).axes[0].get_yscale() == scale


def test_different_k_are_named_where_sets_are_compared():
    runs = [Run(str(k), records(), {"objective.k": k}) for k in (1, 16)]
    titles = [
        draw_lines(NAMED[name], Look(runs)).get_suptitle() for name in ("dynamics", "training")
    ]
    assert titles == ["Dynamics (Fig. 6); objective.k differs", "Stability (Figs. 12, 18)"]


@pytest.mark.parametrize("number", [1, 2, 8])
def test_legends_and_titles_cover_neither_curves_nor_each_other(number):
    runs = [Run(f"a run of a longer name {i}", records(shift=i / 50)) for i in range(number)]
    for name in ("dynamics", "reward"):
        picture = draw_lines(NAMED[name], Look(runs))
        picture.draw_without_rendering()
        boxes = [ax.get_window_extent() for ax in picture.axes]
        boxes += [ax.get_legend().get_window_extent() for ax in picture.axes if ax.get_legend()]
        titles = [ax.get_title(loc="left") for ax in picture.axes]
        texts = [
            t
            for ax in picture.axes
            for t in ax.findobj()
            if getattr(t, "get_text", str)() in titles
        ]
        boxes += [text.get_window_extent() for text in dict.fromkeys(texts)]
        boxes += [legend.get_window_extent() for legend in picture.legends]
        boxes += [picture._suptitle.get_window_extent()]
        assert len(boxes) >= 4
        for i, box in enumerate(boxes):
            inside = picture.bbox.padded(1)
            assert (
                inside.x0 <= box.x0
                and box.x1 <= inside.x1
                and inside.y0 <= box.y0
                and box.y1 <= inside.y1
            )
            assert not any(box.padded(-0.5).overlaps(other) for other in boxes[:i]), (name, i)


def test_the_picture_of_a_demo_has_all_seeds_and_the_teachers(tmp_path):
    runs = {f"seed {i}": records(shift=i / 10) for i in range(3)}
    sizes = []
    for ending in ("png", "svg"):
        plot_dynamics(runs, tmp_path / f"curves.{ending}", teacher_accuracy=[0.8, 0.9])
        sizes.append((tmp_path / f"curves.{ending}").stat().st_size)
    assert min(sizes) > 10_000
    text = (tmp_path / "curves.svg").read_text()
    for panel in OVERVIEW.panels:
        assert f"<!-- {panel.title} -->" in text
    assert "<!-- teacher -->" in text


# Maps


def test_maps_of_all_runs_share_their_colours():
    runs = [Run("a", records()), Run("b", records(shift=1.0))]
    picture = draw_heatmaps(HEATMAPS[0], runs)
    meshes = [ax.collections[0] for ax in picture.axes[:6]]  # student a, b, teacher a, b, gap a, b
    limits = [mesh.get_clim() for mesh in meshes]
    assert len({*limits[:4]}) == 1 and len({*limits[4:]}) == 1 and limits[0] != limits[4]
    values = np.array([[first + step for step in (1, 3, 5)] for first in (0, 4, 8)])
    for mesh, factor in zip(meshes, (1, 2, 0.5, 0.5, 1, 1), strict=True):
        np.testing.assert_allclose(mesh.get_array(), values * factor)
    everything = np.concatenate([values * f for f in (1, 2, 0.5, 0.5)], axis=None)
    assert limits[0] == (0, pytest.approx(np.percentile(everything, 99)))


def test_a_cell_reaches_half_way_to_its_neighbours_and_what_has_no_token_is_empty():
    rows = [{"step": s, "student/entropy@0": 1.0, "student/entropy@4": 2.0} for s in (1, 3, 9)]
    del rows[1]["student/entropy@4"]
    picture = draw_heatmaps(HEATMAPS[0], [Run("a", rows)])
    (mesh,) = picture.axes[0].collections
    corners = mesh.get_coordinates()
    assert corners[0, :, 0].tolist() == [0, 2, 6, 12] and corners[:, 0, 1].tolist() == [0, 4, 8]
    assert mesh.get_array().mask.tolist() == [[False] * 3, [False, True, False]]


def test_many_runs_lie_below_each_other():
    wide = draw_heatmaps(HEATMAPS[0], [Run(f"run {i}", records()) for i in range(3)])
    tall = draw_heatmaps(HEATMAPS[0], [Run(f"run {i}", records()) for i in range(4)])
    first_row = [[ax.get_title(loc="left") for ax in picture.axes[:3]] for picture in (wide, tall)]
    assert first_row[0] == [f"student's entropy · run {i}" for i in range(3)]
    assert first_row[1] == [
        f"{what} · run 0" for what in ("student's entropy", "teacher's entropy", "entropy gap")
    ]


# Bars, and the setting that differs


def test_bars_add_up_to_a_step():
    rows = [{"step": s, "time/rollout_s": 2.0 * s, "time/step_s": 2.0 * s + 3} for s in (1, 2)]
    rows[1]["time/sync_s"] = 1.0
    (ax,) = draw_phases([Run("a", rows)]).axes
    widths = {c.get_label(): c.patches[0].get_width() for c in ax.containers}
    assert widths == pytest.approx({"rollout": 3.0, "sync": 0.5, "other": 2.5})


def test_the_one_number_that_differs_is_swept():
    def run(name, tokens, **more):
        return Run(name, records(), {"rollout.max_tokens": tokens, **more})

    runs = [run("a", 512, seed=0), run("b", 7168, seed=1), run("c", 2048)]
    picture = draw_sweep(runs)
    accuracy, *_ = picture.axes
    assert accuracy.get_xlabel() == "rollout.max_tokens" and accuracy.get_xscale() == "log"
    assert curves_of(accuracy) == [([x], [pytest.approx(0.6)]) for x in (512, 7168, 2048)]
    assert draw_sweep(runs[:2]) is None  # two points are a comparison
    assert draw_sweep([*runs, run("d", 512, k=4)]) is None
    assert draw_sweep([run("a", "x"), run("b", "y"), run("c", "z")]) is None
    assert draw_sweep([run("a", 1), run("b", 2), Run("c", records())]) is None


# The page


class Page(HTMLParser):
    """What a page refers to, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.images = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes["src"])
            assert attributes["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_is_pictures_and_one_page_that_needs_nothing_else(tmp_path):
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", config={**CONFIG, "seed": 1}, shift=0.1),
    ]
    runs = read_runs([f"<b>={folders[0]}", str(folders[1])])
    files, missing = write_report(runs, tmp_path / "out", smooth=3)
    assert {file.name for file in files} == {p.name for p in (tmp_path / "out").iterdir()}
    names = [file.stem for file in files if file.suffix == ".png"]
    assert names == [
        "comparison",
        "dynamics",
        "training",
        "reward",
        "entropy_by_position",
        "phases",
    ]
    text = files[-1].read_text()
    page = Page(text)
    assert page.open == [] and "http" not in re.sub('base64,[^"]*', "", text)
    for image, file in zip(page.images, files, strict=False):
        assert base64.b64decode(image.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
        assert file.read_bytes()[:4] == b"\x89PNG"
    assert len(page.images) == len(names)
    assert "&lt;b&gt;" in text and "<td>seed</td><td>0</td><td>1</td>" in text
    assert '<td>eval/accuracy</td><td><span class="first">0.3 → </span>0.6</td>' in text
    assert (
        missing == left_out(Look(runs))
        and "<li>Objective: not logged (loss/objective)</li>" in text
    )


def test_what_a_run_lacks_is_named():
    runs = [Run("a", records()), Run("b", [{"step": 1, "distill/overlap_ratio": 0.5}])]
    lines = left_out(Look(runs))
    assert "Accuracy on held-out prompts: not logged by b (eval/accuracy)" in lines
    assert "Entropy gap (Eq. 8): not logged (distill/entropy_gap)" in lines
    maps = "Entropy by position (Figs. 13, 23): not logged by b (in two buckets of "
    assert maps + "metrics.position_bucket)" in lines
    assert not any(line.startswith("Overlap ratio") for line in lines)
    assert len(set(lines)) == len(lines)


def test_a_page_warns_of_sets_of_different_sizes():
    runs = [Run(str(k), records(), {"objective.k": k}) for k in (1, 16)]
    assert "sets of different sizes" in html_page(runs, {}, [])
    assert "sets of different sizes" not in html_page(runs[:1] * 2, {}, [])


def test_formats_are_written_as_asked(tmp_path):
    run = Run("a", [{"step": 1, "optim/grad_norm": 1.0}])
    files, _ = write_report([run], tmp_path, formats=("svg", "pdf"))
    assert [file.name for file in files] == ["training.svg", "training.pdf", "index.html"]
    assert files[1].read_bytes()[:4] == b"%PDF" and "data:image/png" in files[2].read_text()


@pytest.mark.parametrize(
    ("runs", "options", "line"),
    [
        (9, {}, "got 9 runs, expected at most 8"),
        (1, {"formats": ["jpg"]}, "--formats: got 'jpg', expected some of png, pdf, svg"),
        (1, {"smooth": 0}, "--smooth: got 0, expected 1 or more"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, runs, options, line):
    with pytest.raises(ValueError, match=line):
        write_report([Run(str(i), records()) for i in range(runs)], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
