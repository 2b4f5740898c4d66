"""Tables -> pictures. matplotlib is imported here only; nothing is computed here that a table should hold.

Most functions draw on axes that they are given; `save_figure` writes PNG and PDF. Similarity is always
drawn on the scale [0, 1], clusters and stages always in the same colors. Names of classes and layers, which may be
anything, are drawn with ``parse_math=False``: "$" in them starts no formula.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pursuhint_lib.comparison import in_points, verdict
from pursuhint_lib.storage import written_whole

if TYPE_CHECKING:  # notebook 03 draws tables only and need not wait for torch
    from torch import Tensor

    from pursuhint_lib.hints import HintPoints

# Okabe and Ito's palette, its yellow (too faint for a line) replaced: told apart by readers with any color vision.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A5195", "#000000"]
QUIET = "#8a8f98"
TEACHER, UNAIDED, REFERENCE = "#000000", "#8a8f98", "#D55E00"

STYLE = {
    "figure.dpi": 90,
    "savefig.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "pursuhint",
}


def use_style() -> None:
    """Apply the project's look to all later figures of this process."""
    matplotlib.rcParams.update(STYLE)


def panels(
    rows: int, columns: int, size: tuple[float, float], *, widths: Sequence[float] | None = None, share_y: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches and its axes (rows, columns). widths: of the columns, relative to each other."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, width_ratios=widths, sharey=share_y)


def close(figure: Figure) -> None:
    """Let go of a figure that was saved."""
    plt.close(figure)


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write ``<folder>/<name>.png`` and ``.pdf``, whole, without dates in them (equal figures give equal bytes)."""
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        path = Path(folder) / f"{name}{suffix}"
        with written_whole(path) as temporary:
            figure.savefig(temporary, metadata=metadata)


def image_grid(images: "Tensor", titles: Sequence[str], columns: int = 8) -> Figure:
    """A grid of images (N, C, H, W) uint8 with a title over each; one channel is drawn in gray."""
    rows = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.3 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images.permute(0, 2, 3, 1).cpu().numpy(), titles, strict=False):
        ax.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        ax.set_title(title, fontsize=8, loc="center", parse_math=False)
    return figure


def feature_maps(maps: "Mapping[str, Tensor]") -> Figure:
    """One map (H, W) per layer, side by side, each on its own gray scale."""
    figure, axes = plt.subplots(1, len(maps), figsize=(1.6 * len(maps), 1.9), squeeze=False)
    for ax, (name, values) in zip(axes.flat, maps.items(), strict=True):
        ax.imshow(values.cpu().numpy(), cmap="magma")
        title = f"{name}\n{values.shape[0]}×{values.shape[1]}"
        ax.set_title(title, fontsize=8, loc="center", parse_math=False)
        ax.axis("off")
    return figure


def layer_ladder(ax: Axes, table: pd.DataFrame, title: str) -> None:
    """Height of the feature maps against depth, a bar per layer, colored by stage, channels written on the stage
    ends.
    """
    ax.bar(table["depth"], table["height"], color=[stage_color(s) for s in table["stage"]], width=0.85)
    for row in table[table["stage_end"]].itertuples():
        ax.annotate(f"{row.channels} ch", (row.depth, row.height), ha="right", va="bottom", fontsize=8)
    ax.set(title=title, xlabel="depth (candidate layer)", ylabel="height of the map (pixels)")
    ax.set_xlim(0.3, max(table["depth"]) + 0.7)


def stage_color(number: int) -> str:
    """Color of stage or cluster `number`, counted from 1."""
    return COLORS[(int(number) - 1) % len(COLORS)]


def learning_rates(ax: Axes, rates: Sequence[float]) -> None:
    """Learning rate per step."""
    ax.plot(np.linspace(0, 100, len(rates)), rates, color=COLORS[0])
    ax.set(xlabel="training done (%)", ylabel="learning rate", ylim=(0, None), title="Learning rate")


def curves(
    ax: Axes, history: pd.DataFrame, column: str, label: str, *, percent: bool = False, of: str = "seeds"
) -> None:
    """`column` against epoch, a line per arm (the mean) with the range as a band where an epoch has several values;
    `of` says what they are. An arm has the same color and dashes for every column, those included that it does not
    have. A line of one point is a dot.
    """
    scale, banded = 100 if percent else 1, False
    for i, (arm, rows) in enumerate(history.groupby("arm", sort=False)):
        rows = rows.dropna(subset=[column])
        if rows.empty:
            continue
        by_epoch = rows.groupby("epoch")[column]
        color, dash = COLORS[i % 7], ["-", "--", ":", "-."][i // 7 % 4]
        mean = by_epoch.mean() * scale
        ax.plot(mean.index, mean, color=color, ls=dash, label=arm, lw=1.5, marker="o" if len(mean) == 1 else "", ms=5)
        if (by_epoch.size() > 1).any():
            banded = True
            ax.fill_between(mean.index, by_epoch.min() * scale, by_epoch.max() * scale, color=color, alpha=0.1, lw=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel=label, title=f"mean of {of}; band: their range" if banded else "")


def legend_below(figure: Figure) -> None:
    """One legend for all axes, below them, in as few rows as the width allows."""
    lines = {}
    for ax in figure.axes:
        for line, name in zip(*ax.get_legend_handles_labels()):
            lines.setdefault(name, line)
    size = 7.5
    column = (0.6 * max(map(len, lines)) + 4.5) * size / 72  # inches, with the line's sample
    rows = -(-len(lines) // max(1, int(figure.get_figwidth() / column)))
    figure.legend(lines.values(), lines, fontsize=size, ncols=-(-len(lines) // rows), loc="outside lower center")


def terms(ax: Axes, history: pd.DataFrame, labels: Mapping[str, str], *, ylabel: str, title: str) -> None:
    """Columns of one student's history against epoch, in %: a line per column that is there, with its label."""
    there = [column for column in labels if column in history]
    for i, column in enumerate(there):
        rows = history.dropna(subset=[column])
        ax.plot(rows["epoch"], 100 * rows[column], color=COLORS[i % 7], marker=".", label=labels[column], lw=1.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    ax.legend()


def bars(ax: Axes, labels: Sequence[str], values: Sequence[float], label: str, color: str = COLORS[0]) -> None:
    """Horizontal bars with their values, first on top."""
    drawn = ax.barh(range(len(labels)), values, color=color)
    ax.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    ax.set_yticks(range(len(labels)), labels, parse_math=False)
    ax.invert_yaxis()
    ax.set(xlabel=label)
    ax.margins(x=0.12)


def similarity_map(
    ax: Axes,
    similarity: pd.DataFrame,
    title: str,
    *,
    stages: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    hint_points: Sequence[str] = (),
    colorbar: bool = True,
) -> None:
    """Heat map of a similarity table on [0, 1]; lines between stages, clusters as a colored bar on the left, stars on
    hint points.

    stages, labels: one number per row (stages from 1, clusters from 0). Axes count layers from 1 by depth.
    """
    rows, columns = similarity.shape
    shown = ax.imshow(similarity.to_numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest", aspect="equal")
    if colorbar:
        ax.figure.colorbar(shown, ax=ax, shrink=0.8, label="similarity")
    for i in range(1, len(stages) if stages is not None else 0):
        if stages[i] != stages[i - 1]:
            ax.axhline(i - 0.5, color="white", lw=1.2)
            ax.axvline(i - 0.5, color="white", lw=1.2)
    width = max(1.0, columns / 22)
    for i, cluster in enumerate(labels if labels is not None else ()):
        box = (-0.5 - 1.25 * width, i - 0.5)
        ax.add_patch(Rectangle(box, width, 1, color=stage_color(cluster + 1), lw=0, clip_on=False))
    for name in hint_points:
        place = list(similarity.index).index(name)
        ax.plot(place, place, marker="*", ms=13, color="white", mec="black", mew=0.8, clip_on=False)
    step = max(1, -(-rows // 9))
    ax.set_xticks(range(0, columns, max(1, -(-columns // 9))), range(1, columns + 1, max(1, -(-columns // 9))))
    ax.set_yticks(range(0, rows, step), range(1, rows + 1, step))
    if labels is not None:  # the bar of clusters stands where the ticks would be
        ax.tick_params(axis="y", length=0, pad=22)
    ax.set(title=title, xlabel="layer, by depth", ylabel="layer, by depth")
    ax.spines[:].set_visible(False)


def similarity_grid(
    tables: Mapping[str, pd.DataFrame], stages: Sequence[int] | None = None, columns: int = 4
) -> Figure:
    """Heat maps side by side on one color scale, title -> similarity table; `stages` as in `similarity_map`."""
    rows, columns = -(-len(tables) // columns), min(columns, len(tables))
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns + 0.8, 3.4 * rows), squeeze=False)
    for ax in axes.flat[len(tables) :]:
        ax.axis("off")
    for ax, (title, table) in zip(axes.flat, tables.items()):
        similarity_map(ax, table, title, stages=stages, colorbar=False)
    figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.8 if rows == 1 else 0.5, label="similarity")
    return figure


def cluster_strips(
    ax: Axes, partitions: Mapping[str, tuple[Sequence[int], Sequence[str]]], table: pd.DataFrame
) -> None:
    """Clusters along depth: a row per partition, a cell per layer in the color of its cluster, stars on hint points;
    lines between stages.

    partitions: name -> (cluster of each layer, from 0; hint points). table: the teacher's layer table.
    """
    depth = dict(zip(table["layer"], table["depth"]))
    for row, (labels, hint_points) in enumerate(partitions.values()):
        for i, cluster in enumerate(labels):
            ax.add_patch(Rectangle((i + 0.5, row - 0.38), 1, 0.76, color=stage_color(cluster + 1), lw=0))
        places = [depth[layer] for layer in hint_points]
        ax.plot(places, [row] * len(places), "*", ms=12, color="white", mec="black", mew=0.7)
    for end in table.loc[table["stage_end"], "depth"][:-1]:
        ax.axvline(end + 0.5, color="black", lw=1)
    ax.set_yticks(range(len(partitions)), partitions)
    ax.set(xlim=(0.5, len(table) + 0.5), ylim=(len(partitions) - 0.5, -0.5), xlabel="depth (candidate layer)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[:].set_visible(False)


def agreements(ax: Axes, table: pd.DataFrame) -> None:
    """How much partitions agree: a dot per pair of partitions, a bar at the mean of each kind. table: columns between,
    adjusted_rand.
    """
    for row, (_, rows) in enumerate(table.groupby("between", sort=False)):
        ax.scatter(rows["adjusted_rand"], np.full(len(rows), row), s=22, color="#333333", alpha=0.45, lw=0)
        ax.plot([rows["adjusted_rand"].mean()] * 2, [row - 0.3, row + 0.3], color=COLORS[0], lw=2.5)
    kinds = table["between"].unique()
    ax.axvline(0, color=QUIET, lw=0.8, ls="--")
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set(xlim=(min(-0.1, table["adjusted_rand"].min() - 0.05), 1.05), ylim=(len(kinds) - 0.5, -0.5))
    ax.set(xlabel="adjusted Rand index (1: the same clusters, 0: as by chance)")


def cross_map(ax: Axes, similarity: pd.DataFrame, title: str, *, colorbar: bool = False) -> None:
    """Heat map of teacher layers (rows) by student layers (columns) on [0, 1]; the most alike teacher layer of each
    column is marked.
    """
    shown = ax.imshow(similarity.to_numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest", aspect="auto")
    best = similarity.to_numpy().argmax(axis=0)
    ax.plot(range(len(best)), best, "o", color="white", mec="black", ms=6, ls="none")
    if colorbar:
        ax.figure.colorbar(shown, ax=ax, shrink=0.8, label="linear CKA")
    step = max(1, -(-len(similarity) // 9))
    ax.set_xticks(range(similarity.shape[1]), range(1, similarity.shape[1] + 1))
    ax.set_yticks(range(0, len(similarity), step), range(1, len(similarity) + 1, step))
    ax.set(title=title, xlabel="student layer, by depth", ylabel="teacher layer, by depth")
    ax.spines[:].set_visible(False)


def scatter(ax: Axes, table: pd.DataFrame, x: str, y: str, group: str, *, xlabel: str, ylabel: str) -> None:
    """A dot per row, colored by `group`."""
    for i, (name, rows) in enumerate(table.groupby(group, sort=False)):
        ax.scatter(
            rows[x],
            rows[y],
            s=28,
            color=COLORS[i % len(COLORS)],
            marker="os^D"[i // len(COLORS) % 4],
            label=name,
            alpha=0.8,
            lw=0,
        )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if len(table):
        ax.legend(fontsize=7.5, bbox_to_anchor=(1.01, 1), loc="upper left")


def layer_path(ax: Axes, points: pd.DataFrame, hint_points: Sequence[str], title: str) -> None:
    """Layers as points in two dimensions, joined in order of depth, colored by cluster; hint points are stars.

    points: columns layer, depth, x, y, cluster (from 0).
    """
    ax.plot(points["x"], points["y"], color=QUIET, lw=0.8, zorder=1)
    for cluster, rows in points.groupby("cluster"):
        ax.scatter(rows["x"], rows["y"], s=45, color=stage_color(cluster + 1), zorder=2, label=f"cluster {cluster + 1}")
    chosen = points[points["layer"].isin(hint_points)]
    ax.scatter(
        chosen["x"], chosen["y"], s=190, marker="*", color="white", edgecolor="black", zorder=3, label="hint point"
    )
    for row in points.itertuples():
        ax.annotate(row.depth, (row.x, row.y), xytext=(5, 4), textcoords="offset points", fontsize=7.5)
    ax.set(title=title, xlabel="first dimension", ylabel="second dimension", aspect="equal")
    ax.legend(fontsize=8)


def strategies(ax: Axes, chosen: "Mapping[str, HintPoints]", table: pd.DataFrame) -> None:
    """All strategies on one depth axis: a row each, a dot per hint point, blue where clusters chose; hollow dots are
    drawn from anew at every step; stages as shaded ground.

    chosen: strategy -> hint points; table: the teacher's layer table.
    """
    depth = dict(zip(table["layer"], table["depth"], strict=True))
    for stage, rows in table.groupby("stage"):
        ax.axvspan(rows["depth"].min() - 0.5, rows["depth"].max() + 0.5, color=stage_color(stage), alpha=0.1, lw=0)
        ax.annotate(f"stage {stage}", (rows["depth"].mean(), -0.75), ha="center", fontsize=8, color=stage_color(stage))
    sources = {"untrained": "random weights", "shuffled": "another image"}
    labels = []
    for row, (name, points) in enumerate(chosen.items()):
        color = COLORS[0] if points.labels is not None else "#333333"
        inside = "white" if points.redrawn else color
        ax.plot([0.5, len(table) + 0.5], [row, row], color="#dddddd", lw=0.8, zorder=1)
        places = [depth[layer] for layer in points.layers]
        ax.scatter(places, [row] * len(places), s=70, color=inside, edgecolor=color, zorder=2)
        notes = [sources[points.source]] if points.source in sources else []
        notes += ["pairs reversed"] if points.pairing == "reversed" else []
        notes += [f"{points.redrawn} at a time"] if points.redrawn else []
        notes += [f"{len(places)} times"] if len(places) > len(set(places)) else []
        labels.append(f"{name} ({', '.join(notes)})" if notes else name)
    ax.set_yticks(range(len(chosen)), labels)
    ax.set_ylim(len(chosen) - 0.5, -1.1)
    ax.set_xlim(0.5, len(table) + 0.5)
    ax.set(xlabel="depth (candidate layer)", title="Hint points, by strategy")


def metric_lines(ax: Axes, table: pd.DataFrame, x: str, y: str, group: str, *, xlabel: str, ylabel: str) -> None:
    """`y` against `x`, a line per value of `group`; when an x has several values, their mean with the range as a
    band.
    """
    for i, (name, rows) in enumerate(table.groupby(group, sort=False)):
        grouped = rows.groupby(x)[y]
        mean = grouped.mean()
        ax.plot(mean.index, mean, marker="o", ms=4, color=COLORS[i % len(COLORS)], label=name)
        if (grouped.size() > 1).any():
            ax.fill_between(mean.index, grouped.min(), grouped.max(), color=COLORS[i % len(COLORS)], alpha=0.12, lw=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8)


def frequencies(ax: Axes, stability: pd.DataFrame, table: pd.DataFrame, title: str) -> None:
    """How often each layer is a hint point over resamples (%), bars colored by stage. stability: columns layer,
    frequency.
    """
    rows = table.merge(stability, on="layer", how="left").fillna({"frequency": 0.0})
    ax.bar(rows["depth"], 100 * rows["frequency"], color=[stage_color(s) for s in rows["stage"]], width=0.85)
    ax.set(xlabel="depth (candidate layer)", ylabel="chosen (% of resamples)", ylim=(0, 105), title=title)
    ax.set_xlim(0.3, max(rows["depth"]) + 0.7)


def accuracy_dots(ax: Axes, results: pd.DataFrame, column: str, label: str, teacher: float | None = None) -> None:
    """A dot per seed and a bar at the mean, arms sorted by mean, best on top; the teacher as a line. Fractions ->
    percent.
    """
    order = results.groupby("arm")[column].mean().sort_values(ascending=False).index
    for row, arm in enumerate(order):
        values = 100 * results.loc[results["arm"] == arm, column]
        color = (
            UNAIDED
            if arm == "unaided"
            else REFERENCE
            if arm == "kd"
            else COLORS[0]
            if "clustered" in arm
            else "#333333"
        )
        ax.scatter(values, np.full(len(values), row), s=22, color=color, alpha=0.55, lw=0)
        ax.plot([values.mean()] * 2, [row - 0.32, row + 0.32], color=color, lw=2.5)
    if teacher is not None:
        ax.axvline(100 * teacher, color=TEACHER, lw=1, ls="--")
        ax.annotate("teacher ", (100 * teacher, len(order) - 0.6), ha="right", fontsize=8)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set(xlabel=f"{label} (%)", title=f"{label}: a dot per seed, a bar at the mean")
    ax.grid(axis="x", color="#eeeeee")
    ax.set_axisbelow(True)


def measures(
    ax: Axes, table: pd.DataFrame, arms: Sequence[str], names: Mapping[str, str], label: str, *, percent: bool = False
) -> None:
    """Means of some measures side by side: a row per arm, first on top, a color per measure, intervals as lines.

    table: columns arm, measure, mean, low, high. names: measure -> what the legend calls it.
    """
    scale = 100 if percent else 1
    for i, (measure, name) in enumerate(names.items()):
        rows = table[table["measure"] == measure].set_index("arm").reindex(arms)
        places = np.arange(len(rows)) + 0.3 * (i - (len(names) - 1) / 2)
        color, shape = COLORS[i % len(COLORS)], "os^D"[i % 4]
        ax.hlines(places, scale * rows["low"], scale * rows["high"], color=color, lw=1.2, alpha=0.6)
        ax.plot(scale * rows["mean"], places, shape, color=color, ms=4.5, label=name)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.set(xlabel=label)
    ax.set_xlim(left=max(0, ax.get_xlim()[0]))  # none of the measures can be negative, an interval's end can
    ax.grid(axis="x", color="#eeeeee")
    ax.set_axisbelow(True)
    ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))


def differences(ax: Axes, summary: pd.DataFrame, reference: str, confidence: float) -> None:
    """Forest plot: paired difference of each arm to `reference` with its intervals, in points; zero as a line.

    summary: of `comparison.summarize`. Colors and marks are those of `forest`.
    """
    own = {"difference": "mean", "difference_low": "low", "difference_high": "high"}
    rows = summary.dropna(subset=["difference"]).sort_values("difference", ascending=False, ignore_index=True)
    for i, row in rows.rename(columns=own).iterrows():
        _difference(ax, i, row, confidence)
    ax.set_yticks(range(len(rows)), rows["arm"])
    ax.set_xlabel(f"test accuracy minus {reference}, paired by seed (points)")
    _finish_forest(ax, rows, f"Difference to {reference} with {100 * confidence:g} % interval")


def forest(ax: Axes, contrasts: pd.DataFrame, arm: str, confidence: float) -> None:
    """Forest plot of one clustered arm against each of its controls, in points, with the numbers at the right.

    contrasts: of `comparison.contrast`. A thick line is the t interval, the thin one below it the bootstrap interval.
    By the t interval, gray includes zero, blue lies above it and orange below; a point is hollow where the interval
    excludes zero and p_holm is above 1 - confidence. Where both are the same students there are words and no point.
    """
    rows = contrasts[contrasts["arm"] == arm].reset_index(drop=True)
    texts = []
    for i, row in rows.iterrows():
        if row["word"] == "same layers":
            texts.append("same layers")
            continue
        _difference(ax, i, row, confidence)
        between = f" ({in_points(row['low'])} to {in_points(row['high'])})" if np.isfinite(row["low"]) else ""
        texts.append(in_points(row["mean"]) + between)
    ax.set_yticks(range(len(rows)), rows["control"])
    ax.set_xlabel("test accuracy minus the control's, paired by seed (points)")
    _finish_forest(ax, rows, f"{arm} against each control, {100 * confidence:g} % interval")
    numbers = ax.secondary_yaxis("right")
    numbers.set_yticks(range(len(rows)), texts, fontsize=8.5)
    numbers.tick_params(length=0)
    numbers.spines[:].set_visible(False)


def _difference(ax: Axes, place: int, row: pd.Series, confidence: float) -> None:
    """One row of a forest plot. row: mean, low, high and, as far as it has them, boot_low, boot_high, p_holm."""
    word = verdict(row["low"], row["high"])
    color = {"better": COLORS[0], "worse": REFERENCE}.get(word, QUIET)
    if np.isfinite(row["low"]):
        ax.plot([100 * row["low"], 100 * row["high"]], [place] * 2, color=color, lw=2.5, solid_capstyle="butt")
    if np.isfinite(row.get("boot_low", np.nan)):
        ax.plot([100 * row["boot_low"], 100 * row["boot_high"]], [place + 0.22] * 2, color=color, lw=1)
    hollow = word in ("better", "worse") and row.get("p_holm", 0) > 1 - confidence
    ax.plot(100 * row["mean"], place, "o", color=color, mfc="white" if hollow else color, mew=1.5, ms=6)


def _finish_forest(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    ax.axvline(0, color="black", lw=0.8, zorder=1)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    lines = "thick line: t interval; thin line: bootstrap; " if "boot_low" in rows else ""
    hollow = "\nhollow: excludes zero, but not after Holm's correction" if "p_holm" in rows else ""
    ax.set_title(f"{title}\n{lines}gray: includes zero{hollow}", fontsize=8.5)
    ax.grid(axis="x", color="#eeeeee")
    ax.set_axisbelow(True)


def probabilities(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """One panel per temperature: the teacher's largest probabilities for one image. table: temperature, label,
    probability.
    """
    for ax, (temperature, rows) in zip(axes, table.groupby("temperature"), strict=True):
        bars(ax, list(rows["label"]), list(rows["probability"]), "probability")
        ax.set(title=f"T = {temperature:g}", xlim=(0, 1.15))


def landscape(ax: Axes, table: pd.DataFrame, placement: pd.DataFrame, references: Mapping[str, float]) -> None:
    """All subsets of one hint method by their mean accuracy, worst first, in %: a dot with its interval each, named
    choices marked with their percentile, references as lines; the band is where the dots would lie by seed noise alone.
    Incomplete subsets are not drawn.

    table, placement: of `landscape.subset_table` and `landscape.placement`; references: name -> accuracy (kd, unaided).
    """
    rows = table.dropna(subset=["percentile"]).iloc[::-1].reset_index(drop=True)
    rank = rows.index + 1
    ax.fill_between(rank, 100 * rows["noise_low"], 100 * rows["noise_high"], color=COLORS[1], alpha=0.3, lw=0)
    ax.vlines(rank, 100 * rows["low"], 100 * rows["high"], color="#dddddd", lw=1.2, zorder=1)
    ax.scatter(rank, 100 * rows["mean"], s=14, color="#333333", lw=0, zorder=3)
    for name, value in references.items():
        ax.axhline(100 * value, color=REFERENCE if name == "kd" else UNAIDED, lw=1.2, ls="--", zorder=1)
        ax.annotate(f" {name}", (1, 100 * value), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ends = [rows["low"].min(), rows["high"].max(), rows["noise_low"].min(), rows["noise_high"].max()]
    ends += [rows["mean"].min(), rows["mean"].max(), *references.values()]
    bottom, top = 100 * np.nanmin(ends), 100 * np.nanmax(ends)
    step = 0.07 * (top - bottom)
    # Outermost names highest, each in a row of its own and written towards the middle: no two meet.
    named = rows[rows["layers"].isin(placement.dropna(subset=["percentile"])["layers"])]
    inwards = sorted(named.index, key=lambda i: min(i, len(rows) - 1 - i), reverse=True)
    for level, i in enumerate(inwards):
        row = rows.loc[i]
        color = COLORS[0] if "clustered" in row["strategies"] else COLORS[3]
        height = top + (level + 0.8) * step
        ax.plot([i + 1, i + 1], [100 * row["mean"], height], color=color, lw=0.9, zorder=2)
        ax.plot(i + 1, 100 * row["mean"], "D", color=color, ms=7, mec="white", zorder=4)
        names = row["strategies"].replace(", ", " = ")
        text = f" {names}, {row['layers']}: percentile {100 * row['percentile']:.0f} "
        side = "left" if i < len(rows) / 2 else "right"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        ax.annotate(text, (i + 1, height), ha=side, va="center", fontsize=8, color=color, bbox=box, zorder=5)
    ax.set(xlim=(0, len(rows) + 1), ylim=(bottom - step, top + (len(named) + 1) * step))
    ax.set(xlabel="subsets of layers, sorted by mean", ylabel="accuracy (%)")
    shown = "; lines: interval of each mean; shaded: all that seed noise alone would spread"
    ax.set_title(f"All {len(rows)} choices{shown if rows['noise_low'].notna().any() else ''}")


def position_curve(ax: Axes, positions: pd.DataFrame, layers: pd.DataFrame, references: Mapping[str, float]) -> None:
    """Accuracy of one hint alone against its depth, in %, with intervals; stages as shaded ground, references as lines.

    positions: rows of one hint method of `landscape.position_curve`; layers: the teacher's layer table.
    """
    stages_behind(ax, layers)
    positions = positions.sort_values("depth")
    ax.fill_between(positions["depth"], 100 * positions["low"], 100 * positions["high"], color=QUIET, alpha=0.3, lw=0)
    ax.plot(positions["depth"], 100 * positions["mean"], marker="o", color="#333333")
    for name, value in references.items():
        ax.axhline(100 * value, color=REFERENCE if name == "kd" else UNAIDED, lw=1.2, ls="--")
        ax.annotate(f" {name}", (1, 100 * value), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.set(xlabel="depth of the only hint (candidate layer)", ylabel="accuracy (%)")
    ax.set_title("One hint alone; shaded around the line: interval of the mean")


def layer_effects(axes: Sequence[Axes], effects: pd.DataFrame, layers: pd.DataFrame) -> None:
    """What it changes to have a layer among the hint points, in points, with intervals: a panel per hint ("any", then
    each of the M from the shallowest).

    effects: rows of one hint method of `landscape.layer_effects`; layers: the teacher's layer table.
    """
    for ax, (hint, rows) in zip(axes, effects.groupby("hint", sort=False), strict=True):
        stages_behind(ax, layers)
        ax.vlines(rows["depth"], 100 * rows["low"], 100 * rows["high"], color=QUIET, lw=2)
        ax.plot(rows["depth"], 100 * rows["mean"], "o", color="#333333")
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xlabel="depth", title="as any hint" if hint == "any" else f"as hint {hint} of the subset")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("with the layer minus without (points)")


def stages_behind(ax: Axes, layers: pd.DataFrame) -> None:
    """Stages as shaded ground along depth, named on top inside; layers: the teacher's layer table."""
    for stage, rows in layers.groupby("stage"):
        ax.axvspan(rows["depth"].min() - 0.5, rows["depth"].max() + 0.5, color=stage_color(stage), alpha=0.1, lw=0)
        place = (rows["depth"].mean(), 0.99)
        named = {"ha": "center", "va": "top", "fontsize": 8, "color": stage_color(stage)}
        ax.annotate(f"stage {stage}", place, xycoords=("data", "axes fraction"), **named)
    ax.set_xlim(0.5, len(layers) + 0.5)
    ax.margins(y=0.15)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
