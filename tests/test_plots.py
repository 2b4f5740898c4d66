"""Figures that a table decides: how many lines, which marks, what the words say."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from pursuhint_lib import plots


@pytest.fixture
def ax():
    figure, ax = plt.subplots(figsize=(10, 4))
    yield ax
    plt.close(figure)


def table(arms, epochs=3, seeds=2):
    return pd.DataFrame(
        [
            {"arm": f"arm_{arm:02d}", "seed": seed, "epoch": epoch, "loss": arm + seed / 4}
            for arm in range(arms)
            for seed in range(seeds)
            for epoch in range(1, epochs + 1)
        ]
    )


def test_as_many_lines_as_the_largest_study_has_methods_differ_in_color_or_dash(ax):
    plots.curves(ax, table(28), "loss", "loss")
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 28


def test_a_line_of_one_point_can_be_seen(ax):
    history = table(2)
    history.loc[(history["arm"] == "arm_01") & (history["epoch"] > 1), "loss"] = float("nan")
    plots.curves(ax, history, "loss", "loss")
    assert [line.get_marker() for line in ax.lines] == ["", "o"]


def test_the_title_says_what_a_line_is_the_mean_of_and_only_where_it_is_a_mean(ax):
    plots.curves(ax, table(2), "loss", "loss", of="hint points and seeds")
    assert ax.get_title(loc="left") + ax.get_title() == "mean of hint points and seeds; band: their range"
    assert ax.get_ylabel() == "loss" and len(ax.collections) == 2
    ax.clear()
    plots.curves(ax, table(2, seeds=1), "loss", "loss")
    assert ax.get_title(loc="left") + ax.get_title() == "" and not ax.collections
    grouped = table(2, seeds=1).assign(arm="both")
    plots.curves(ax, grouped, "loss", "loss")
    assert len(ax.collections) == 1  # one seed, and yet several students


def test_the_legend_below_names_every_line_once_covers_no_axes_and_fits_the_figure():
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    names = [f"wsld+crd@clustered_last_r2_cca_{i}" for i in range(24)]
    for ax in axes:
        for i, name in enumerate(names[: 24 if ax is axes[0] else 5]):
            ax.plot([0, i], label=name)
    plots.legend_below(figure)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    box = legend.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0
    assert not any(ax.get_tightbbox().overlaps(box) for ax in axes) and axes[0].get_window_extent().height > 100
    plt.close(figure)


@pytest.mark.parametrize("name", ["$\\frac$", "a$b$c", "cost_$5", "\\$x"])
def test_a_name_with_dollars_is_drawn_as_it_is(ax, name):
    plots.bars(ax, [name], [1.0], "share")
    figures = [ax.figure, plots.image_grid(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [name])]
    figures.append(plots.feature_maps({name: torch.zeros(4, 4)}))
    for figure in figures:
        figure.draw_without_rendering()  # does not fail
        texts = [text for text in figure.findobj(Text) if text.get_text().split("\n")[0] == name]
        assert texts and not any(text.get_parse_math() for text in texts)
        plt.close(figure)


def test_dots_have_a_legend_where_there_are_any(ax, recwarn):
    dots = table(2).assign(x=0.5)
    plots.scatter(ax, dots, "x", "loss", "arm", xlabel="x", ylabel="y")
    assert len(ax.collections) == 2 and ax.get_legend() is not None
    ax.clear()
    plots.scatter(ax, dots[:0], "x", "loss", "arm", xlabel="x", ylabel="y")
    assert ax.get_legend() is None and not recwarn.list


def compared(*rows):
    """Rows of contrasts of the arm "at_x": control, mean, low, high, p_holm, word; accuracies in percent."""
    table = pd.DataFrame(rows, columns=["control", "mean", "low", "high", "p_holm", "word"])
    table[["mean", "low", "high"]] /= 100
    return table.assign(arm="at_x", boot_low=table["low"] * 0.9, boot_high=table["high"] * 0.9)


def test_a_forest_marks_what_excludes_zero_and_what_holms_correction_leaves_of_it(ax):
    rows = compared(
        ("kd", 1, 0.5, 1.5, 0.01, "better"),
        ("last", -1, -1.5, -0.5, 0.2, "worse"),
        ("uniform", 0, -1, 1, 1, "includes zero"),
        ("reversed", 0, 0, 0, float("nan"), "same layers"),
    )
    plots.forest(ax, pd.concat([rows, rows.assign(arm="at_y")]), "at_x", 0.95)
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_color() for line in points] == [plots.COLORS[0], plots.REFERENCE, plots.QUIET]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, True, False]
    lengths = [sorted(line.get_xdata()) for line in ax.lines if line.get_marker() != "o" and len(line.get_xdata()) == 2]
    assert lengths[:2] == [pytest.approx([0.5, 1.5]), pytest.approx([0.45, 1.35])]  # t, bootstrap
    thick, thin = ax.lines[:2]
    assert thick.get_ydata()[0] < thin.get_ydata()[0] < 0.5  # it would hide behind the thick line
    assert [label.get_text() for label in ax.get_yticklabels()] == ["kd", "last", "uniform", "reversed"]
    (right,) = ax.child_axes
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "+1.00 (+0.50 to +1.50)",
        "\N{MINUS SIGN}1.00 (\N{MINUS SIGN}1.50 to \N{MINUS SIGN}0.50)",
        "0.00 (\N{MINUS SIGN}1.00 to +1.00)",
        "same layers",
    ]


@pytest.mark.parametrize("count", [1, 4, 14])
def test_no_label_of_a_forest_is_clipped(count):
    names = ["clustered_medoid_r2_cca_uncentered", *(f"control_{i}" for i in range(1, count))]
    rows = compared(*((name, -10.11, -12.22, -8.33, 0.01, "worse") for name in names))
    with plt.rc_context(plots.STYLE):
        figure, ax = plt.subplots(figsize=(7.5, 0.36 * count + 1.3))
        plots.forest(ax, rows, "at_x", 0.95)
        figure.draw_without_rendering()
    (right,) = ax.child_axes
    texts = [*ax.get_yticklabels(), *right.get_yticklabels(), ax.xaxis.label, ax._left_title]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) == 2 * count + 2
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1 for box in boxes)
    plt.close(figure)


def test_differences_have_the_marks_of_a_forest_and_do_without_columns_that_old_tables_lack(ax):
    rows = compared(("kd", 1, 0.5, 1.5, 0.2, "better"), ("last", -1, -1.5, -0.5, 0.01, "worse"))
    rows = rows.rename(columns={"mean": "difference", "low": "difference_low", "high": "difference_high"})
    plots.differences(ax, rows.assign(arm=rows["control"]), "kd", 0.95)
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "white" for line in points] == [True, False] and len(ax.lines) == 7
    ax.clear()
    old = rows.drop(columns=["boot_low", "boot_high", "p_holm"])
    plots.differences(ax, old.assign(arm=old["control"]), "kd", 0.95)
    assert len(ax.lines) == 5 and "Holm" not in ax.get_title(loc="left") + ax.get_title()


def test_measures_stand_side_by_side_in_the_order_of_the_arms_and_never_below_zero(ax):
    rows = [("kd", "ece", 0.02, -0.01, 0.05), ("at", "ece", 0.04, 0.03, 0.05), ("at", "ece_scaled", 0.01, 0.0, 0.02)]
    table = pd.DataFrame(rows, columns=["arm", "measure", "mean", "low", "high"])
    plots.measures(ax, table, ["at", "kd"], {"ece": "as trained", "ece_scaled": "scaled"}, "error (%)", percent=True)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["at", "kd"]
    trained, scaled = ax.lines
    assert list(trained.get_xdata()) == [4, 2] and scaled.get_xdata()[0] == 1 and scaled.get_ydata()[0] > 0
    intervals = [
        [segment[:, 0].tolist() for segment in lines.get_segments() if len(segment)] for lines in ax.collections
    ]
    assert intervals[0] == [[3, 5], [-1, 5]] and intervals[1][0] == [0, 2]
    assert ax.get_xlim()[0] == 0 and ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["as trained", "scaled"]
