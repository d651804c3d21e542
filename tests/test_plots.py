"""Curves as a figure: what is drawn, what is refused, and that nothing global changes."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

from lago_fast import plots
from lago_fast.errors import UnsupportedArgument

CURVES = {
    "push": {
        "ppo": [([10, 20, 30], [0.0, 0.2, 0.4]), ([10, 20], [0.2, 0.4])],
        "lago": [([10, 30], [0.5, 1.0])],
    },
    "reach": {"ppo": [([10, 30], [0.2, 0.4]), ([20, 30], [0.0, 0.2])], "lago": [([10, 30], [0.1, 0.3])]},
}


@pytest.fixture
def figures(monkeypatch):
    """Every figure that was saved."""
    saved = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def lines(axis):
    """Return label -> (steps, success) of a panel."""
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axis.get_lines()}


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_a_figure_of_each_format(tmp_path, suffix, start):
    path = plots.draw_curves(CURVES, tmp_path / "new" / f"curves{suffix}")
    assert path.read_bytes().startswith(start)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_seeds_are_averaged_where_all_of_them_have_steps(tmp_path, figures):
    plots.draw_curves(CURVES, tmp_path / "c.png")
    push = lines(figures[0].axes[0])
    np.testing.assert_allclose(push["ppo"], [[10, 20], [0.1, 0.3]])  # the second seed ends at 20
    np.testing.assert_allclose(push["lago"], [[10, 30], [0.5, 1.0]])
    (band,) = figures[0].axes[0].collections  # one seed of lago: no band
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.0, 0.4)


def test_the_last_panel_is_the_mean_over_tasks_seed_by_seed(tmp_path, figures):
    plots.draw_curves(CURVES, tmp_path / "c.png")
    mean = figures[0].axes[2]
    assert mean.get_title() == "mean"
    np.testing.assert_allclose(lines(mean)["lago"], [[10, 30], [0.3, 0.65]])
    # seed 0: push and reach at 10, 20, 30; seed 1 has only step 20 in both tasks
    np.testing.assert_allclose(lines(mean)["ppo"], [[20], [np.mean([(0.2 + 0.3) / 2, (0.4 + 0.0) / 2])]])


def test_the_mean_leaves_out_an_arm_that_did_not_run_on_every_task(tmp_path, figures):
    plots.draw_curves({**CURVES, "door-open": {"lago": CURVES["push"]["lago"]}}, tmp_path / "c.png")
    assert set(lines(figures[0].axes[3])) == {"lago"}


def test_the_prior_alone_is_a_dashed_line(tmp_path, figures):
    plots.draw_curves(CURVES, tmp_path / "c.png", prior={"push": 0.6, "reach": 0.2})
    for axis, level in zip(figures[0].axes, (0.6, 0.2, 0.4), strict=True):
        np.testing.assert_allclose(lines(axis)["prior alone"][1], level)
    plots.draw_curves(CURVES, tmp_path / "d.png", prior={"push": 0.6})
    assert ["prior alone" in lines(axis) for axis in figures[1].axes] == [True, False, False]


def test_one_task_has_one_panel_and_success_is_a_share(tmp_path, figures):
    plots.draw_curves({"push": CURVES["push"]}, tmp_path / "c.png", x_label="steps", title="a title")
    (axis,) = figures[0].axes
    low, high = axis.get_ylim()
    assert low <= 0 < 1 <= high < 1.1
    assert axis.get_xlabel() == "steps"
    assert figures[0].get_suptitle() == "a title"
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {"ppo", "lago"}


def test_the_legend_of_one_panel_is_whole(tmp_path, figures):
    arms = {arm: [([10, 20], [0.1, 0.2])] for arm in ("ppo", "lago", "bc_ppo", "lago_random_init")}
    plots.draw_curves({"push": arms}, tmp_path / "c.png", prior={"push": 0.5})
    legend = figures[0].legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figures[0].bbox.width


def test_points_without_a_value_are_left_out(tmp_path, figures):
    curves = {"push": {"ppo": [([1, 2, 3], [np.nan, 0.5, 0.7]), ([], [])]}}
    plots.draw_curves(curves, tmp_path / "c.png")
    np.testing.assert_allclose(lines(figures[0].axes[0])["ppo"], [[2, 3], [0.5, 0.7]])


def test_seeds_that_share_no_steps_are_still_drawn(tmp_path, figures):
    plots.draw_curves({"push": {"ppo": [([1, 2], [0.1, 0.3]), ([5, 6], [0.5, 0.6])]}}, tmp_path / "c.png")
    np.testing.assert_allclose(lines(figures[0].axes[0])["ppo"], [[2], [0.4]])


def test_many_tasks_and_arms_unknown_to_the_palette(tmp_path, figures):
    arms = {f"arm{i}": [([1, 2], [0.0, i / 10])] for i in range(3)}
    plots.draw_curves({f"task{i}": arms for i in range(6)}, tmp_path / "c.png")
    shown = [axis for axis in figures[0].axes if axis.get_visible()]
    assert len(shown) == 7
    assert len({line.get_color() for line in shown[0].get_lines()}) == 3


@pytest.mark.parametrize("curves", [{}, {"push": {}}, {"push": {"ppo": [([], [])]}}])
def test_nothing_to_draw_is_refused(tmp_path, curves):
    with pytest.raises(UnsupportedArgument, match="train longer"):
        plots.draw_curves(curves, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(UnsupportedArgument, match=r"path: 'c\.jpeg2'"):
        plots.draw_curves(CURVES, tmp_path / "c.jpeg2")
    with pytest.raises(UnsupportedArgument, match="push, ppo: 2 steps and 1 successes"):
        plots.draw_curves({"push": {"ppo": [([1, 2], [0.1])]}}, tmp_path / "c.png")


def test_a_failure_leaves_the_old_figure(tmp_path, monkeypatch):
    path = plots.draw_curves(CURVES, tmp_path / "c.png")
    old = path.read_bytes()

    def fail(where, **_):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(plots.Figure, "savefig", lambda _, where, **options: fail(where, **options))
    with pytest.raises(OSError, match="disk full"):
        plots.draw_curves(CURVES, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_no_global_state_of_matplotlib_changes(tmp_path):
    before = dict(mpl.rcParams)
    plots.draw_curves(CURVES, tmp_path / "c.png")
    assert dict(mpl.rcParams) == before
    code = "import sys, lago_fast.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
