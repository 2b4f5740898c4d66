"""A study's tables and figures -> one HTML file.

Reads what the five notebooks left in ``runs/<study>/`` and computes nothing that needs an image or a network, so a
deleted report is rebuilt in a moment. Every number on the page carries its unrounded value (``<data value="...">``) and
every table and figure names the run and commit that it came from. The page needs no network and no script.
"""

import base64
import itertools
import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pursuhint_lib.arms import parse_method
from pursuhint_lib.comparison import verdict
from pursuhint_lib.params import STAGES
from pursuhint_lib.storage import home, read_json, read_table, report_folder, save_table, written_whole
from pursuhint_lib.tracking import LAB_TABLE

TEMPLATE = "report.html.j2"
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

# stage, figure, title, how to read it (the caption and, with the title, the text for readers who cannot see it)
FIGURES = (
    (
        "02_profile_layers",
        "similarity",
        "How alike the teacher's layers are",
        "Both axes count the candidate layers by depth; 1 means alike, 0 means unrelated. "
        "A bright block is a run of layers that say much the same.",
    ),
    (
        "03_cluster_layers",
        "clusters",
        "The layers in clusters",
        "One color per cluster, numbered by depth; a star marks the hint point, the layer that stands for its cluster.",
    ),
    (
        "03_cluster_layers",
        "measures",
        "The same clustering under every measure",
        "A row per measure, a color per cluster, stars on hint points, lines between the network's stages. "
        "Rows that look alike are measures whose choice does not matter.",
    ),
    (
        "03_cluster_layers",
        "agreement",
        "How firm the clusters are",
        "What else could have been: other images, fewer images, another measure, another teacher, no training at all. "
        "1 means that the clusters stay the same, 0 that they agree as by chance; a dot is one comparison, a bar the "
        "mean.",
    ),
    (
        "03_cluster_layers",
        "strategies",
        "Hint points by strategy",
        "A row per strategy on one depth axis, a dot per hint point. Rows that look alike are near-equal choices.",
    ),
    (
        "04_distill_students",
        "curves",
        "Training curves",
        "How training went, epoch by epoch: a line per arm, or per method where there are many arms, is the mean of "
        "its students, the band spans them all. The last epoch counts, not the best one.",
    ),
    (
        "05_evaluate",
        "accuracy",
        "Test accuracy, seed by seed",
        "A dot per seed and a bar at the mean. Where the dots of two arms overlap, look at the paired differences.",
    ),
    (
        "05_evaluate",
        "differences",
        "Paired differences to KD without hints",
        "Each arm minus KD of the same seed, mean and interval. An interval across zero cannot tell the two apart.",
    ),
    (
        "05_evaluate",
        "student_similarity",
        "Students beside the teacher",
        "How alike each student's layers are to the teacher's: did hints make them more alike?",
    ),
)

READINGS = {
    "better": "the whole interval lies above zero: better",
    "worse": "the whole interval lies below zero: worse",
    "includes zero": "the interval includes zero: this study cannot tell them apart",
    "unknown (one seed)": "one seed gives no interval: this study cannot tell them apart",
}
CONCLUSIONS = {  # the same in the words of one sentence, in the order of saying
    "better": "is better than",
    "worse": "is worse than",
    "includes zero": "cannot be told apart from",
    "unknown (one seed)": "has too few seeds to be compared with",
    "same layers": "chose the same layers as",
}


@dataclass(frozen=True)
class Facts:
    """The files of a study that the page is made of.

    results, summary, contrasts, teacher, confidence: of notebook 05, see `comparison`. histories: of 01 and 04, by
    stage. records: stage -> its record.json, or {} where there is none (a notebook run by hand, or 05 while it is
    running). runs: MLflow run ids, of notebooks by stage and of trained networks by "<arm>-s<seed>", as far as
    recorded.
    """

    results: pd.DataFrame
    summary: pd.DataFrame
    teacher: Mapping[str, Any]
    baselines: pd.DataFrame
    images: Mapping[str, Any]
    layers: pd.DataFrame
    hint_points: Mapping[str, Mapping[str, Any]]
    pairs: pd.DataFrame
    contrasts: pd.DataFrame
    confidence: float
    stability: pd.DataFrame
    histories: Mapping[str, pd.DataFrame]
    records: Mapping[str, Mapping[str, Any]]
    runs: Mapping[str, str]


def write_report(study: str) -> Path:
    """Write ``reports/<study>/report.html`` and copy tables and figures beside it, into ``tables/`` and ``figures/``.

    Equal inputs give equal bytes. Call it again when stage records were added: they are shown when they are there.
    Raises FileNotFoundError naming the notebook to run first, ValueError for a damaged JSON file.
    """
    runs, reports = home() / "runs" / study, home() / "reports" / study
    facts = read_facts(runs)
    comparisons = list(facts.contrasts.itertuples())
    tables, pictures = _unique_names(_tables(runs)), _unique_names(_pictures(runs))
    template = _environment(facts).get_template(TEMPLATE)
    page = template.render(
        study=study,
        facts=facts,
        level=f"{100 * facts.confidence:g}\u202f%",
        headline=_headline(facts, comparisons),
        setting=_setting(facts),
        arms=_main_rows(facts),
        comparisons=_by_arm(comparisons),
        chosen=_chosen_layers(facts),
        figures=_figures(facts, runs, pictures),
        students=_students(facts),
        provenance=_provenance(facts),
        failed=_failed(facts),
        n_random=sum(name.startswith("random") for name in facts.hint_points),
    )
    report_folder(study)
    for kind, files in (("tables", tables), ("figures", pictures)):
        for name, source in files.items():
            with written_whole(reports / kind / name) as temporary:
                shutil.copyfile(source, temporary)
    save_table(_provenance_table(facts), reports / "tables" / "provenance.csv")
    path = reports / "report.html"
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return path


def _provenance_table(facts: Facts) -> pd.DataFrame:
    """What each number came from: columns network ("<arm>-s<seed>"; empty for a notebook), stage, run_id, commit,
    dirty.
    """
    rows = []
    for stage, record in facts.records.items():
        source = record.get("source", {})
        ids = record.get("runs", {})
        for network, run_id in ({"": ids.get("notebook", "")} | ids.get("models", {})).items():
            rows.append((network, stage, run_id, source.get("commit", ""), source.get("dirty", "")))
    return pd.DataFrame(rows, columns=["network", "stage", "run_id", "commit", "dirty"])


def read_facts(runs: Path) -> Facts:
    """Read what the page needs from a study's folder of runs. Raises as `write_report`."""
    teach, profile, cluster, distill, evaluate = (runs / stage for stage in STAGES)
    summary = _without_gaps(read_table(evaluate / "summary.csv"))
    results = _without_gaps(read_table(evaluate / "results.csv"))
    records = {stage: _optional_json(runs / stage / "record.json") for stage in STAGES}
    return Facts(
        results=results,
        summary=summary,
        contrasts=read_table(evaluate / "contrasts.csv"),
        confidence=read_json(evaluate / "settings.json")["confidence"],
        teacher=read_json(evaluate / "teacher.json"),
        baselines=read_table(teach / "baselines.csv"),
        images=read_json(teach / "images.json"),
        layers=read_table(profile / "layers_teacher.csv"),
        hint_points=read_json(cluster / "hint_points.json"),
        pairs=read_table(distill / "pairs.csv"),
        stability=_optional_table(cluster / "stability.csv", ["metric", "layer", "frequency"]),
        histories={folder.name: read_table(folder / "histories.csv") for folder in (teach, distill)},
        records=records,
        runs=_run_ids(records, runs),
    )


def _run_ids(records: Mapping[str, Mapping[str, Any]], runs: Path) -> dict[str, str]:
    """Run ids, from the records, or from what a notebook that was run in JupyterLab left beside its tables."""
    found = {}
    for stage, record in records.items():
        ids = record.get("runs", {})
        by_hand = _optional_table(runs / stage / LAB_TABLE, ["arm", "seed", "run_id"])
        found |= {f"{row.arm}-s{row.seed}": row.run_id for row in by_hand.itertuples()}
        found |= {stage: ids["notebook"]} if ids.get("notebook") else {}
        found |= ids.get("models", {})
    return found


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _optional_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    return read_table(path) if path.exists() else pd.DataFrame(columns=list(columns))


def _without_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Empty texts read back as empty texts, not as NaN."""
    texts = table[["method", "strategy", "same_as"]].astype(object)
    return table.assign(**texts.where(texts.notna(), ""))


# --- What the tables say


def _headline(facts: Facts, comparisons: Sequence[Any]) -> dict[str, Any]:
    """The rows to show first: unaided, KD, the best arm by validation, and per method the main clustered arm."""
    rows = {row.arm: row for row in facts.summary.itertuples()}
    # By name first: of arms that validation cannot tell apart, the summary's order would take the one that tested best.
    aided = facts.summary[(facts.summary["arm"] != "unaided") & (facts.summary["same_as"] == "")].sort_values("arm")
    best = aided["arm"][aided["val_mean"].idxmax()] if aided["val_mean"].notna().any() else None
    main = _main_strategy(facts.hint_points)
    answers = []
    for row in facts.summary[facts.summary["strategy"] == main].sort_values("arm").itertuples():
        own = [c for c in comparisons if c.arm == row.arm]
        sayings = [(text, [c.control for c in own if c.word == word]) for word, text in CONCLUSIONS.items()]
        answers.append({"row": row, "comparisons": own, "sayings": [(text, names) for text, names in sayings if names]})
    return {
        "unaided": rows.get("unaided"),
        "kd": rows.get("kd"),
        "best": rows.get(best),
        "gap": facts.teacher["test_accuracy"] - rows["unaided"].test_mean if "unaided" in rows else math.nan,
        "all_failed": bool(main) and facts.pairs["arm"].str.endswith(main).any(),  # asked where there is no answer
        "answers": answers,
    }


def _main_strategy(hint_points: Mapping[str, Any]) -> str:
    """The method as published: cluster centers by the study's first metric."""
    variants = ("clustered_first_", "clustered_last_", "clustered_medoid_")
    return next((name for name in hint_points if name.startswith("clustered_") and not name.startswith(variants)), "")


def _main_rows(facts: Facts) -> list[Any]:
    """Arms by mean test accuracy, the unaided student last."""
    table = facts.summary.sort_values("test_mean", ascending=False, kind="stable")
    return sorted(table.itertuples(), key=lambda row: row.arm == "unaided")


def _by_arm(comparisons: Sequence[Any]) -> dict[str, Any]:
    """Comparisons as a table: controls as columns, arm -> control -> comparison."""
    controls = list(dict.fromkeys(c.control for c in comparisons))
    cells = {arm: {c.control: c for c in own} for arm, own in itertools.groupby(comparisons, key=lambda c: c.arm)}
    return {"controls": controls, "rows": cells, "count": sum(c.word != "same layers" for c in comparisons)}


def _setting(facts: Facts) -> dict[str, Any]:
    """Who learns what from whom, from the tables of 01 to 04."""
    students = facts.baselines[facts.baselines["model"] != "teacher"]
    unaided, aided = facts.histories.values()
    teachers = unaided["arm"].str.startswith("teacher")  # the other teachers of 01 as well
    repeats = facts.images.get("evaluation_repeats", 1)  # validation and test count each image so many times
    sizes = {name: about["images"] for name, about in facts.images["sets"].items()}
    distilled = facts.results.loc[facts.results["arm"] != "unaided", "method"]
    return {
        "data": facts.images.get("data", "not recorded"),
        "shape": facts.images["shape"],
        "classes": facts.images["classes"],
        "sets": {name: size if name == "train" else size // repeats for name, size in sizes.items()},
        "repeats": repeats,
        "student": None if students.empty else students.iloc[0],
        "teacher_epochs": unaided.loc[teachers & (unaided["epoch"] > 0), "epoch"].nunique(),  # 0: trained elsewhere
        "student_epochs": sorted({rows["epoch"].nunique() for rows in (unaided[~teachers], aided)} - {0}),
        "seeds": sorted(facts.results["seed"].unique().tolist()),
        "n_hints": sorted({_n_hints(points) for points in facts.hint_points.values()} - {0}),
        "methods": [m for m in dict.fromkeys(facts.results.loc[facts.results["strategy"] != "none", "method"])],
        "logit_losses": list(dict.fromkeys(parse_method(method).logit_loss for method in distilled)),
    }


def _n_hints(points: Mapping[str, Any]) -> int:
    """How many layers give a hint at one step."""
    return points.get("redrawn", 0) or len(points["layers"])


def _chosen_layers(facts: Facts) -> list[dict[str, Any]]:
    """Per strategy its hint points with depth, the student layer they teach, how often resamples chose them too, and
    what is unusual about its hints. A strategy that draws anew at every step has no layers to show.
    """
    depth = dict(zip(facts.layers["layer"], facts.layers["depth"], strict=True))
    strategy_of = dict(zip(facts.summary["arm"], facts.summary["strategy"], strict=True))
    pairs = facts.pairs.assign(strategy=facts.pairs["arm"].map(strategy_of))
    frequency = {(f"clustered_{row.metric}", row.layer): row.frequency for row in facts.stability.itertuples()}
    rows, earlier = [], {}
    for strategy, points in facts.hint_points.items():
        redrawn, source = points.get("redrawn", 0), points.get("source", "trained")
        pairing = points.get("pairing", "in_order")
        own = _pairs_of(pairs[pairs["strategy"] == strategy], points["layers"])
        if pairing == "reversed":
            own = own[::-1]  # back to the order of the teacher's layers
        taught = [] if redrawn else list(own["student_layer"])
        hints = [
            {
                "layer": layer,
                "depth": depth.get(layer, math.nan),
                "student": student,
                "frequency": frequency.get((strategy, layer), math.nan),
            }
            for layer, student in itertools.zip_longest([] if redrawn else points["layers"], taught)
            if layer is not None
        ]
        notes = [f"{redrawn} of {len(points['layers'])} layers, drawn anew at every step"] if redrawn else []
        notes += {"untrained": ["of a network with random weights"], "shuffled": ["of another image"]}.get(source, [])
        notes += ["deepest to the shallowest student layer"] if pairing == "reversed" else []
        if points["layers"]:
            same_as = earlier.setdefault((*points["layers"], pairing, source, redrawn), strategy)
            row = {"strategy": strategy, "hints": hints, "same_as": "" if same_as == strategy else same_as}
            rows.append(row | {"note": "; ".join(notes)})
    return rows


def _pairs_of(pairs: pd.DataFrame, layers: Sequence[str]) -> pd.DataFrame:
    """The pairs of the first hint that these layers give: one of an arm's several hints may have layers of its own."""
    for _, own in pairs.groupby(["arm", "method"], sort=False):
        if sorted(own["teacher_layer"]) == sorted(layers):
            return own.sort_values("hint", kind="stable")
    return pairs[:0]


def _students(facts: Facts) -> list[dict[str, Any]]:
    """Every student of notebook 05 with the run that trained it (for an arm that was not trained again, its twin's)."""
    rows = facts.results.to_dict("records")
    return [row | {"run": facts.runs.get(f"{row['same_as'] or row['arm']}-s{row['seed']}", "")} for row in rows]


def _failed(facts: Facts) -> list[tuple[str, int, int, str]]:
    """Arm and seed of students whose training broke off, in which epoch, and why."""
    history = facts.histories["04_distill_students"]
    if "status" not in history:
        return []
    failed = history[history["status"] == "failed"].drop_duplicates(["arm", "seed"])
    return list(failed.reindex(columns=["arm", "seed", "epoch", "reason"]).itertuples(index=False, name=None))


# --- Figures and files


def _figures(facts: Facts, runs: Path, pictures: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The figures that are there, as data URLs with their size in pixels, in the order of FIGURES.

    pictures: name in the report's folder -> file.
    """
    named = {path: name for name, path in pictures.items()}
    about = f"{len(facts.layers)} candidate layers of {facts.teacher['network']}"
    found = []
    for stage, name, title, reading in FIGURES:
        path = runs / stage / "figures" / f"{name}.png"
        if path.exists():
            content = path.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # of the PNG header
            found.append(
                {
                    "stage": stage,
                    "name": name,
                    "title": title,
                    "reading": reading,
                    "alt": f"{title}: study of {about}. {reading}",
                    "url": "data:image/png;base64," + base64.b64encode(content).decode(),
                    "width": width,
                    "height": height,
                    "pdf": named.get(path.with_suffix(".pdf"), ""),
                }
            )
    return found


def _tables(runs: Path) -> list[Path]:
    """Tables worth keeping: not what tells of one run alone (but speed.csv, which the page shows), nor the samples that
    stability.csv and partitions.csv sum up.
    """
    left_out = {"record.json", "progress.json", "timings.csv", "resamples.csv", "sizes.csv"}
    found = (path for stage in STAGES for path in sorted((runs / stage).glob("*")) if path.suffix in (".csv", ".json"))
    return [path for path in found if path.name not in left_out and not path.name.startswith(".")]


def _pictures(runs: Path) -> list[Path]:
    found = (path for stage in STAGES for path in sorted((runs / stage / "figures").glob("*")))
    return [path for path in found if path.suffix in (".png", ".pdf") and not path.name.startswith(".")]


def _unique_names(paths: Sequence[Path]) -> dict[str, Path]:
    """File names for one folder: the file's own, led by its stage where two stages have a file of that name."""
    names = [path.name for path in paths]
    stages = [next(parent.name for parent in path.parents if parent.name in STAGES) for path in paths]
    return {
        name if names.count(name) == 1 else f"{stage}_{name}": path
        for name, stage, path in zip(names, stages, paths, strict=True)
    }


def _provenance(facts: Facts) -> dict[str, Any]:
    """Versions, hardware and threads, each with the stages that it holds for; every parameter, by stage."""
    about: dict[str, dict[str, list[str]]] = {"versions": {}, "hardware": {}, "threads": {}}
    for (stage, record), (what, values) in itertools.product(facts.records.items(), about.items()):
        if record.get(what) is not None:  # notebook 03 is told no number of threads
            values.setdefault(_in_words(record[what]), []).append(stage)
    parameters = {
        stage: record["inputs"]["parameters"] for stage, record in facts.records.items() if "inputs" in record
    }
    return {
        "about": {what: values or {"not recorded": list(facts.records)} for what, values in about.items()},
        "parameters": {
            stage: {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
            for stage, values in parameters.items()
        },
    }


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(part)}" for name, part in value.items() if part not in ("", None, []))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- How numbers look


def _environment(facts: Facts) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda x: _number(x, f"{_percent(x)}\u202f%"),
        "percent_range": lambda ends: _range(ends, _percent, f"\u2009{DASH}\u2009"),
        "points": lambda x: _number(x, _points(x)),
        "points_range": lambda ends: _range(ends, _points, " to "),
        "whole": lambda x: _number(x, f"{x:,.0f}"),
        "decimal": lambda x: _number(x, f"{x:.3f}"),
        "breakable": lambda name: Markup("<wbr>").join(_pieces(str(name))),
        "seconds": lambda x: _number(x, f"{x:,.1f}"),
        "verdict": verdict,
    }
    environment.globals |= {"READINGS": READINGS, "source": lambda stage: _source(facts, stage)}
    return environment


def _number(value: float, text: str) -> Markup:
    """A number with its unrounded value; a dash where there is none."""
    if not np.isfinite(value):
        return Markup('<span class="none" title="not known">{}</span>').format(DASH)
    return Markup('<data value="{}">{}</data>').format(repr(value.item() if hasattr(value, "item") else value), text)


def _range(ends: tuple[float, float], write: Any, between: str) -> Markup:
    low, high = ends
    if not (np.isfinite(low) and np.isfinite(high)):
        return Markup('<span class="none" title="one seed gives no interval">no interval</span>')
    return _number(low, write(low)) + between + _number(high, write(high))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}".replace("-", MINUS)


def _points(fraction: float) -> str:
    """Points with two decimals and a sign; what rounds to zero has no sign."""
    text = f"{100 * fraction:+.2f}".replace("-", MINUS)
    return text[1:] if float(text[1:]) == 0 else text


def _pieces(name: str) -> list[Markup]:
    """A name in parts between which a line may break."""
    parts = name.replace("_", "_\0").replace(".", ".\0").split("\0")
    return [escape(part) for part in parts]


def _source(facts: Facts, stage: str) -> dict[str, Any]:
    """What the record of a stage says of where its files came from; "" for what is not recorded."""
    record = facts.records.get(stage, {})
    source = record.get("source", {})
    commit = source.get("commit", "unknown")
    return {
        "run": facts.runs.get(stage, ""),
        "commit": "" if commit == "unknown" else commit[:7],
        "state": {True: "with uncommitted changes", False: "clean"}.get(source.get("dirty"), "changes unknown"),
        "ended": record.get("ended", ""),
        "seconds": record.get("seconds", math.nan),
        "key": record.get("key", "")[:12],
    }
