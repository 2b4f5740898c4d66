"""Figures that a table decides: how many lines, which marks, what the words say."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

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


def test_dots_have_a_legend_where_there_are_any(ax, recwarn):
    dots = table(2).assign(x=0.5)
    plots.scatter(ax, dots, "x", "loss", "arm", xlabel="x", ylabel="y")
    assert len(ax.collections) == 2 and ax.get_legend() is not None
    ax.clear()
    plots.scatter(ax, dots[:0], "x", "loss", "arm", xlabel="x", ylabel="y")
    assert ax.get_legend() is None and not recwarn.list
