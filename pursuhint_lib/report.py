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
from pathlib import Path
from typing import Any

import pandas as pd

from pursuhint_lib import findings
from pursuhint_lib.facts import Facts, read_facts
from pursuhint_lib.formatting import environment
from pursuhint_lib.params import STAGES
from pursuhint_lib.storage import home, report_folder, save_table, written_whole

TEMPLATE = "report.html.j2"

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


def write_report(study: str) -> Path:
    """Write ``reports/<study>/report.html`` and copy tables and figures beside it, into ``tables/`` and ``figures/``.

    Equal inputs give equal bytes. Call it again when stage records were added: they are shown when they are there.
    Raises FileNotFoundError naming the notebook to run first, ValueError for a damaged JSON file.
    """
    runs, reports = home() / "runs" / study, home() / "reports" / study
    facts = read_facts(runs)
    comparisons = list(facts.contrasts.itertuples())
    tables, pictures = _unique_names(_tables(runs)), _unique_names(_pictures(runs))
    template = environment().get_template(TEMPLATE)
    page = template.render(
        study=study,
        facts=facts,
        level=f"{100 * facts.confidence:g}\u202f%",
        headline=findings.headline(facts, comparisons),
        setting=findings.setting(facts),
        arms=findings.main_rows(facts),
        comparisons=findings.by_arm(comparisons),
        chosen=findings.chosen_layers(facts),
        figures=_figures(facts, runs, pictures),
        students=findings.students(facts),
        source=lambda stage: _source(facts, stage),
        READINGS=findings.READINGS,
        provenance=_provenance(facts),
        failed=findings.failed(facts),
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
    """Tables worth keeping: not what differs between equal runs, nor the samples that stability.csv and partitions.csv
    sum up.
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
