"""The figures of a study, each drawn from its tables.

    python -m pursuhint_lib.drawings STUDY    draw those of reports/STUDY/tables/ again, into reports/STUDY/figures/

The notebooks draw with these functions, so that a published figure can be drawn again from the published tables, with
nothing else at hand. Three cannot: they show images of the data set or maps of the teacher, see `PICTURES`, and are
found in the notebooks only.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pursuhint_lib import plots
from pursuhint_lib.choices import choose_number, embed_layers, from_pairs
from pursuhint_lib.command import run_command
from pursuhint_lib.errors import first_line
from pursuhint_lib.hints import METHODS, HintPoints, LayerClustering
from pursuhint_lib.landscape import landscape_facts, layer_effects, placement, position_curve, subset_table
from pursuhint_lib.params import STAGES, nearest
from pursuhint_lib.records import Record
from pursuhint_lib.status import short
from pursuhint_lib.storage import home, read_json, read_table, read_valid

if TYPE_CHECKING:  # notebook 03 draws tables only and need not wait for torch
    from matplotlib.figure import Figure

    from pursuhint_lib.arms import Arm

PICTURES = ("images", "missed", "inside")  # of pixels, which no table holds
MANY = 14  # arms; more lines or colors cannot be told apart
NUMBER_LABELS = {
    "silhouette": "mean silhouette",
    "within_distance": "mean distance to the center",
    "stability": "agreement with random halves",
}


# ---- 01 ----


def ladders(tables: Mapping[str, pd.DataFrame]) -> "Figure":
    """Role and network ("teacher: resnet32") -> its layer table: every candidate layer as a bar."""
    figure, axes = plots.panels(1, len(tables), (10, 2.8), widths=(3, 1))
    for ax, (title, table) in zip(axes.flat, tables.items(), strict=True):
        plots.layer_ladder(ax, table, title)
    return figure


def baseline_curves(histories: pd.DataFrame) -> "Figure":
    """How the networks of notebook 01 learned."""
    figure, axes = plots.panels(1, 2, (10, 3.2))
    plots.curves(axes.flat[0], histories, "loss", "training loss")
    plots.curves(axes.flat[1], histories, "val_accuracy", "validation accuracy (%)", percent=True)
    axes.flat[1].legend()
    return figure


# ---- 02 ----


def similarity(table: pd.DataFrame, metric: str, layers: pd.DataFrame) -> "Figure":
    """How alike the teacher's layers are by one measure."""
    figure, axes = plots.panels(1, 1, (5.4, 4.6))
    plots.similarity_map(axes.flat[0], table, f"{metric}: similarity of the teacher's layers", stages=layers["stage"])
    return figure


def similarity_by_images(first_last: pd.DataFrame, images: int) -> "Figure":
    """Similarity of the first and the last layer by the number of images that were looked at."""
    figure, axes = plots.panels(1, 1, (7, 3.2))
    about = {"xlabel": "number of images", "ylabel": "similarity of first and last layer"}
    plots.metric_lines(axes.flat[0], first_last, "images", "similarity", "metric", **about)
    axes.flat[0].axvline(images, color="black", ls="--", lw=0.8)
    return figure


# ---- 03 ----


def path(similarity: pd.DataFrame, metric: str, layers: pd.DataFrame, n_hints: int) -> "Figure":
    """The layers as points that lie near each other where they are alike."""
    clustering = LayerClustering(n_hints).fit(similarity)
    points = embed_layers(similarity).merge(layers[["layer", "depth"]], on="layer")
    figure, axes = plots.panels(1, 1, (6.4, 4.4))
    points = points.assign(cluster=clustering.labels_)
    plots.layer_path(axes.flat[0], points, clustering.hint_points_, f"Layers by {metric}")
    return figure


def clusters(similarity: pd.DataFrame, metric: str, layers: pd.DataFrame, n_hints: int) -> "Figure":
    """The similarity of the layers with its clusters and hint points."""
    clustering = LayerClustering(n_hints).fit(similarity)
    figure, axes = plots.panels(1, 1, (5.8, 4.8))
    plots.similarity_map(
        axes.flat[0],
        similarity,
        f"Clusters by {metric}, stars: hint points",
        stages=layers["stage"],
        labels=clustering.labels_,
        hint_points=clustering.hint_points_,
    )
    return figure


def cluster_strips(fits: Mapping[str, LayerClustering], layers: pd.DataFrame) -> "Figure":
    """A row of clusters and hint points for each of several clusterings."""
    figure, axes = plots.panels(1, 1, (8, 0.42 * len(fits) + 0.9))
    plots.cluster_strips(axes.flat[0], {name: (fit.labels_, fit.hint_points_) for name, fit in fits.items()}, layers)
    return figure


def cluster_numbers(scores: pd.DataFrame, n_hints: int) -> "Figure":
    """What speaks for each number of clusters; dotted: the number that a rule would choose by each measure."""
    figure, axes = plots.panels(1, len(NUMBER_LABELS), (11, 3))
    by_rule = [
        choose_number(rows) for _, rows in scores.groupby("metric", sort=False) if rows["silhouette"].notna().any()
    ]
    for ax, (column, label) in zip(axes.flat, NUMBER_LABELS.items(), strict=True):
        plots.metric_lines(ax, scores, "n_clusters", column, "metric", xlabel="number of clusters", ylabel=label)
        ax.axvline(n_hints, color="black", ls="--", lw=0.8)
        for color, number in zip(plots.COLORS, by_rule):
            ax.axvline(number, color=color, ls=":", lw=1.6)
    return figure


def stability(frequencies: pd.DataFrame, metrics: Sequence[str], layers: pd.DataFrame) -> "Figure":
    """How often each layer is a hint point on random halves of the images."""
    figure, axes = plots.panels(1, len(metrics), (5 * len(metrics), 2.8))
    for ax, metric in zip(axes.flat, metrics, strict=True):
        plots.frequencies(ax, frequencies[frequencies["metric"] == metric], layers, metric)
    return figure


def agreement(partitions: pd.DataFrame) -> "Figure":
    """How much the clusters have in common with those that could have been."""
    figure, axes = plots.panels(1, 1, (7.5, 2.6))
    plots.agreements(axes.flat[0], partitions)
    return figure


def strategies(hint_points: Mapping[str, HintPoints], layers: pd.DataFrame) -> "Figure":
    """The hint points of every choice but the subsets of a landscape."""
    few = {name: points for name, points in hint_points.items() if not name.startswith("subset_")}
    figure, axes = plots.panels(1, 1, (8, 0.42 * len(few) + 1.3))
    plots.strategies(axes.flat[0], few, layers)
    return figure


# ---- 04 ----


def one_student(history: pd.DataFrame, arms: "Sequence[Arm]") -> "Figure":
    """The history of one student: what is left of its terms, what moves it, how good it is."""
    from pursuhint_lib.arms import terms_left

    figure, axes = plots.panels(1, 3, (10.5, 2.9))
    left = {"logits_left": "logits", "hints_left": "hints"}
    about = {"ylabel": "% of the first epoch's", "title": "What is left of a term"}
    plots.terms(axes.flat[0], terms_left(history, arms), left, **about)
    names = sorted(name for name in history if name.startswith("gradient_share_"))
    shares = {name: name.removeprefix("gradient_share_") for name in names}
    plots.terms(axes.flat[1], history, shares, ylabel="% of the gradient", title="What moves the student")
    plots.curves(axes.flat[2], history, "val_accuracy", "validation accuracy (%)", percent=True)
    return figure


def student_curves(histories: pd.DataFrame, arms: "Sequence[Arm]") -> "Figure":
    """How all students learned: a line for an arm, or for a method where there are more than MANY arms."""
    from pursuhint_lib.arms import terms_left

    shown = terms_left(histories, arms)
    if len(arms) > MANY:
        shown["arm"] = shown["arm"].map({arm.name: arm.method for arm in arms})
    columns = {
        "cls": "labels: cross entropy",
        "logits_left": "logits: % left",
        "hints_left": "hints: % left",
        "val_accuracy": "validation accuracy (%)",
    }
    columns = {column: label for column, label in columns.items() if column in shown}
    rows = 2 if len(columns) == 4 else 1
    figure, axes = plots.panels(rows, len(columns) // rows, (10.5, 3.2 * rows))
    of = "hint points and seeds" if len(arms) > MANY else "seeds"
    for ax, (column, label) in zip(axes.flat, columns.items(), strict=True):
        plots.curves(ax, shown, column, label, percent=column != "cls", of=of)
    plots.legend_below(figure)
    return figure


def validation(students: pd.DataFrame, baselines: pd.DataFrame) -> "Figure":
    """Validation accuracy of every student that did not fail, but those of a landscape's subsets, and its mean."""
    trained = students[(students["status"] == "trained") & ~students["strategy"].str.startswith("subset_")]
    others = baselines.rename(columns={"model": "arm"})
    beside = pd.concat([trained, others[others["arm"] == "unaided"]])
    teacher = others.loc[others["arm"] == "teacher", "val_accuracy"].iloc[0]
    figure, axes = plots.panels(1, 1, (7, 0.32 * beside["arm"].nunique() + 1))
    plots.accuracy_dots(axes.flat[0], beside, "val_accuracy", "validation accuracy", teacher)
    return figure


# ---- 05 ----


def accuracy(results: pd.DataFrame, teacher_accuracy: float) -> "Figure":
    """Test accuracy of every student, but those of a landscape's subsets, and its mean."""
    dots = results[~results["strategy"].str.startswith("subset_")]
    figure, axes = plots.panels(1, 1, (7.5, 0.3 * dots["arm"].nunique() + 1))
    plots.accuracy_dots(axes.flat[0], dots, "test_accuracy", "test accuracy", teacher_accuracy)
    return figure


def differences(summary: pd.DataFrame, confidence: float) -> "Figure":
    """Every arm minus kd."""
    shown = summary[~summary["strategy"].str.startswith("subset_")]
    figure, axes = plots.panels(1, 1, (7.5, 0.3 * len(shown) + 1))
    plots.differences(axes.flat[0], shown, "kd", confidence)
    return figure


def forest(contrasts: pd.DataFrame, confidence: float) -> "Figure":
    """The main clustered arm of at most four methods minus every control."""
    ours = contrasts[contrasts["family"] == "main"]
    named = list(dict.fromkeys(ours["arm"]))[:4]
    height = 0.35 * sum((ours["arm"] == arm).sum() for arm in named) + 0.9 * len(named)
    figure, axes = plots.panels(max(1, len(named)), 1, (8.5, max(1.5, height)))
    for ax, arm in zip(axes.flat, named):
        plots.forest(ax, contrasts, arm, confidence)
    return figure


def measures(table: pd.DataFrame, summary: pd.DataFrame) -> "Figure":
    """How far students agree with the teacher, and how well they know how sure they may be."""
    order = list(summary.loc[~summary["strategy"].str.startswith("subset_"), "arm"])
    figure, axes = plots.panels(1, 2, (10.5, 0.26 * len(order) + 1.2), share_y=True)
    agree = {"agreement": "all images", "agreement_wrong": "where the teacher is wrong"}
    plots.measures(axes.flat[0], table, order, agree, "same answer as the teacher (%)", percent=True)
    calibration = {"ece": "as trained", "ece_scaled": "with a temperature"}
    plots.measures(axes.flat[1], table, order, calibration, "calibration error (%)", percent=True)
    return figure


def landscape(results: pd.DataFrame, confidence: float) -> "Figure | None":
    """All subsets of the layers, ranked; None in a study that has none."""
    facts = landscape_facts(results, confidence=confidence)
    if not facts:
        return None
    subsets, places = (make(results, confidence=confidence) for make in (subset_table, placement))
    figure, axes = plots.panels(len(facts), 1, (7.5, 4.6 * len(facts)))
    for ax, method in zip(axes.flat, facts, strict=True):
        ours, rows = (table[table["method"] == method] for table in (places, subsets))
        plots.landscape(ax, rows, ours, facts[method]["references"])
    return figure


def effects_of_layers(results: pd.DataFrame, layers: pd.DataFrame, confidence: float) -> "Figure | None":
    """What each layer adds to the subsets that hold it; None in a study that has none."""
    facts = landscape_facts(results, confidence=confidence)
    if not facts:
        return None
    effects = layer_effects(results, confidence=confidence)
    columns = effects["hint"].nunique()
    figure, axes = plots.panels(len(facts), columns, (2.7 * columns, 3 * len(facts)), share_y=True)
    for row, method in zip(axes, facts, strict=True):
        plots.layer_effects(row, effects[effects["method"] == method], layers)
    return figure


def positions(results: pd.DataFrame, layers: pd.DataFrame, confidence: float) -> "Figure | None":
    """What one hint alone does at each depth; None in a study that has none."""
    table = position_curve(results, layers, confidence=confidence)
    references = results.groupby("arm")["test_accuracy"].mean().reindex(["kd", "unaided"])
    methods = list(dict.fromkeys(table["method"]))
    if not methods:
        return None
    figure, axes = plots.panels(len(methods), 1, (7.5, 3.4 * len(methods)))
    for ax, method in zip(axes.flat, methods, strict=True):
        plots.position_curve(ax, table[table["method"] == method], layers, references)
    return figure


def student_similarity(inside: pd.DataFrame, teacher_layers: Sequence[str], student_layers: Sequence[str]) -> "Figure":
    """Which layers of some students of one seed are like which of the teacher's. inside: columns arm, teacher_layer,
    student_layer, similarity.
    """
    arms = list(dict.fromkeys(inside["arm"]))
    figure, axes = plots.panels(1, len(arms), (2.5 * len(arms), 4))
    for ax, arm in zip(axes.flat, arms, strict=True):
        rows = inside[inside["arm"] == arm]
        table = rows.pivot(index="teacher_layer", columns="student_layer", values="similarity")
        plots.cross_map(ax, table.loc[list(teacher_layers), list(student_layers)], arm, colorbar=arm == arms[-1])
    return figure


def alike(table: pd.DataFrame) -> "Figure":
    """Accuracy of students by how like the teacher they are where they took hints."""
    group = "arm" if table["arm"].nunique() <= MANY else "method"
    figure, axes = plots.panels(1, 1, (7.5, max(3.2, 0.17 * table[group].nunique() + 0.5)))
    about = {"xlabel": "mean linear CKA at the hint pairs", "ylabel": "test accuracy"}
    plots.scatter(axes.flat[0], table, "alike", "test_accuracy", group, **about)
    return figure


# ---- All of a published study ----


class Published:
    """The tables of a study below ``reports/``, read when they are asked for.

    Raises FileNotFoundError, one line, for a study that is not there or lacks a table.
    """

    def __init__(self, reports: Path):
        self.tables = Path(reports) / "tables"
        records = Path(reports) / "records.json"
        self.records = read_valid(records, dict[str, Record])
        if self.records is None:
            raise FileNotFoundError(f"{short(records)} is not there or damaged: run the study, or name a published one")

    def parameters(self, stage: str) -> Mapping[str, Any]:
        """What a notebook ran with."""
        return self.records[stage]["inputs"]["parameters"]

    def table(self, stage: str, name: str, index: bool = False) -> pd.DataFrame:
        """A table of a notebook. Where two notebooks have one of that name, it is led by the notebook's."""
        own = self.tables / f"{stage}_{name}.csv"
        return read_table(own if own.exists() else self.tables / f"{name}.csv", index=index)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """The teacher's layer table."""
        return self.table("02_profile_layers", "layers_teacher")

    @cached_property
    def measured(self) -> dict[str, pd.DataFrame]:
        """Measure -> similarity of the teacher's layers; the first is the main one of notebook 02."""
        metrics = self.table("02_profile_layers", "agreement", index=True).index
        return {metric: self.table("02_profile_layers", f"similarity_{metric}", index=True) for metric in metrics}

    @cached_property
    def hint_points(self) -> dict[str, HintPoints]:
        """Every choice of hint points."""
        return {name: HintPoints(**about) for name, about in read_json(self.tables / "hint_points.json").items()}

    @cached_property
    def arms(self) -> "list[Arm]":
        """The arms of the study."""
        from pursuhint_lib.arms import study_arms

        params = self.parameters("04_distill_students")
        student = self.table("02_profile_layers", "layers_student")
        return study_arms(self.hint_points, params["methods"], self.layers, student, params["hint_weights"])

    @cached_property
    def histories(self) -> pd.DataFrame:
        """Of all distilled students."""
        return self.table("04_distill_students", "histories")

    def students(self, name: str) -> pd.DataFrame:
        """A table with a row per student; an arm that is no other's twin has an empty same_as."""
        stage = "04_distill_students" if name == "students" else "05_evaluate"
        table = self.table(stage, name)
        return table.assign(same_as=table["same_as"].astype(object).fillna("")) if "same_as" in table else table


def published_figures(published: Published) -> "dict[tuple[str, str], Callable[[], Figure | None]]":
    """(notebook, figure) -> what draws it."""
    p, layers, measured = published, published.layers, published.measured
    first, second, third, fourth, fifth = STAGES
    main = next(iter(measured))
    clustered = p.parameters(third)["cluster_metrics"]
    n_hints, confidence = p.parameters(third)["n_hints"], p.parameters(fifth)["confidence"]
    own = {metric: measured[metric] for metric in clustered}
    results = p.students("results")

    def both_ladders() -> "Figure":
        params, student = p.parameters(first), p.table(second, "layers_student")
        return ladders({f"teacher: {params['teacher']}": layers, f"student: {params['student']}": student})

    def compared(title: str, other: str, table: pd.DataFrame) -> "Figure":
        return plots.similarity_grid({f"{main}, {title}": measured[main], f"{main}, {other}": table}, layers["stage"])

    def teachers() -> "Figure":
        rows = p.table(second, "teachers")
        rows = rows[rows["metric"] == main]
        if rows.empty:
            return plots.similarity_grid({f"{main}, the teacher": measured[main]}, stages=layers["stage"])
        last = rows[rows["teacher"] == rows["teacher"].iloc[-1]]
        return compared("the teacher", "another", from_pairs(last, list(layers["layer"])))

    def first_last() -> "Figure":
        table = p.table(second, "first_last")
        return similarity_by_images(table, int(table["images"].max()))

    def clusterings(way: str) -> "Figure":
        if way == "measures":
            fits = {metric: LayerClustering(n_hints).fit(table) for metric, table in measured.items()}
        else:
            fits = {name: LayerClustering(n_hints, name).fit(own[clustered[0]]) for name in METHODS}
        return cluster_strips(fits, layers)

    def example() -> "Figure":
        arm = example_arm(p.arms)
        rows = p.histories[(p.histories["arm"] == arm.name) & (p.histories["seed"] == p.parameters(fourth)["seeds"][0])]
        return one_student(rows.dropna(axis="columns", how="all"), p.arms)

    def inside() -> "Figure":
        student_layers = list(p.table(second, "layers_student")["layer"])
        return student_similarity(p.table(fifth, "student_similarity"), list(layers["layer"]), student_layers)

    return {
        (first, "ladders"): both_ladders,
        (first, "curves"): lambda: baseline_curves(p.table(first, "histories")),
        (second, "similarity"): lambda: similarity(measured[main], main, layers),
        (second, "metrics"): lambda: plots.similarity_grid(measured, stages=layers["stage"]),
        (second, "sizes"): first_last,
        (second, "untrained"): lambda: compared(
            "trained", "random weights", p.table(second, "similarity_untrained", index=True)
        ),
        (second, "teachers"): teachers,
        (third, "path"): lambda: path(own[clustered[0]], clustered[0], layers, n_hints),
        (third, "clusters"): lambda: clusters(own[clustered[0]], clustered[0], layers, n_hints),
        (third, "measures"): lambda: clusterings("measures"),
        (third, "ways"): lambda: clusterings("ways"),
        (third, "how_many"): lambda: cluster_numbers(p.table(third, "scores"), n_hints),
        (third, "stability"): lambda: stability(p.table(third, "stability"), clustered, layers),
        (third, "agreement"): lambda: agreement(p.table(third, "partitions")),
        (third, "strategies"): lambda: strategies(p.hint_points, layers),
        (fourth, "one_student"): example,
        (fourth, "curves"): lambda: student_curves(p.histories, p.arms),
        (fourth, "validation"): lambda: validation(p.students("students"), p.table(first, "baselines")),
        (fifth, "accuracy"): lambda: accuracy(results, read_json(p.tables / "teacher.json")["test_accuracy"]),
        (fifth, "differences"): lambda: differences(p.students("summary"), confidence),
        (fifth, "forest"): lambda: forest(p.table(fifth, "contrasts"), confidence),
        (fifth, "measures"): lambda: measures(p.table(fifth, "measures"), p.students("summary")),
        (fifth, "landscape"): lambda: landscape(results, confidence),
        (fifth, "layer_effects"): lambda: effects_of_layers(results, layers, confidence),
        (fifth, "positions"): lambda: positions(results, layers, confidence),
        (fifth, "student_similarity"): inside,
        (fifth, "alike"): lambda: alike(p.table(fifth, "alike")),
    }


def example_arm(arms: "Sequence[Arm]") -> "Arm":
    """The arm that notebook 04 trains first and alone: the last that is trained and always takes the same layers."""
    return [arm for arm in arms if not arm.same_as and not any(hint.redrawn for hint in arm.hints)][-1]


def redraw(reports: Path, figures: Path) -> list[Path]:
    """Draw the figures of a published study from its tables into `figures`, but PICTURES. Returns the PNG files.

    reports: ``reports/<study>``. Equal tables give equal bytes, with the same matplotlib. Raises what `Published` does.
    """
    drawn = published_figures(Published(reports))
    names = [name for _, name in drawn]
    plots.use_style()
    written = []
    for (stage, name), draw in drawn.items():
        figure = draw()
        if figure is not None:
            file = name if names.count(name) == 1 else f"{stage}_{name}"
            plots.save_figure(figure, figures, file)
            plots.close(figure)
            written.append(Path(figures) / f"{file}.png")
    return written


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pursuhint_lib.drawings", description="Draw a published study's figures again from its tables."
    )
    parser.add_argument("study", help="a folder of reports/, for example digits")
    study = parser.parse_args(arguments).study
    there = sorted(path.parent.name for path in (home() / "reports").glob("*/records.json"))
    reports = home() / "reports" / study
    try:
        if study not in there:  # a name, where a path might lead elsewhere
            raise ValueError(f"no study {study!r}: reports/ holds {', '.join(there) or 'none'}{nearest(study, there)}")
        written = redraw(reports, reports / "figures")
    except (OSError, ValueError, KeyError) as error:
        print(first_line(error), file=sys.stderr)
        return 1
    print(f"{len(written)} figures drawn again in {short(reports / 'figures')}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
