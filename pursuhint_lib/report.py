"""A study's tables and figures -> one HTML file.

Reads what the five notebooks left in ``runs/<study>/`` and computes nothing that needs an image or a network, so a
deleted report is rebuilt in a moment. Every number on the page carries its unrounded value (``<data value="...">``) and
every table and figure names the run and commit that it came from. The page needs no network and no script.
"""

import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pursuhint_lib import findings
from pursuhint_lib.comparison import POWER
from pursuhint_lib.drawings import PICTURES
from pursuhint_lib.facts import COMPARED, Facts, read_facts
from pursuhint_lib.figures import shown_figures
from pursuhint_lib.formatting import environment
from pursuhint_lib.hypotheses import NEAR, hypothesis_table, judge_hypotheses
from pursuhint_lib.literature import TABLE as LITERATURE
from pursuhint_lib.literature import beside_literature
from pursuhint_lib.params import STAGES
from pursuhint_lib.storage import home, report_folder, save_table, written_whole

TEMPLATE = "report.html.j2"
MODEL_CARD = "student/MODEL_CARD.md"  # beside the page, where a student was exported


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
    matched = findings.logits_matched(facts)
    hypotheses = judge_hypotheses(facts.results, facts.hint_points, facts.partitions, matched, facts.confidence)
    arms, runs_behind = findings.main_rows(facts), findings.runs_behind(facts)
    page = template.render(
        study=study,
        facts=facts,
        level=f"{100 * facts.confidence:g}\u202f%",
        verdict=findings.verdict_on_choice(facts),
        headline=findings.headline(facts, comparisons),
        setting=findings.setting(facts),
        arms=[row for row in arms if not findings.is_of_landscape(row.strategy)],
        of_landscape=[row for row in arms if findings.is_of_landscape(row.strategy)],
        compared_more=facts.summary[COMPARED].notna().any(axis=None),
        comparisons=findings.by_arm(comparisons),
        chosen=findings.chosen_layers(facts),
        stability=findings.stability(facts),
        landscape=findings.landscape(facts),
        measured=findings.measured(facts),
        costs=findings.costs(facts),
        hypotheses=hypotheses,
        without_hints="KD without hints" if matched is not False else "labels alone, without hints",
        reference="KD" if matched is not False else "labels alone",
        beside=beside_literature(facts),
        limits=findings.limits(facts),
        figures=shown_figures(facts, runs, pictures),
        students=findings.students(facts),
        numbers={arm: number for number, arm in enumerate(runs_behind)},
        runs_behind=runs_behind,
        commits_behind=findings.commits_behind(facts),
        teacher=_teacher_source(facts),
        runs_of_control=lambda arm, control: findings.runs_of_control(facts, runs_behind, arm, control),
        source=lambda stage: _source(facts, stage),
        provenance=_provenance(facts),
        failed=findings.failed(facts),
        n_random=sum(name.startswith("random") for name in facts.hint_points),
        model_card=MODEL_CARD if (reports / MODEL_CARD).exists() else "",
        NEAR=NEAR,
        READINGS=findings.READINGS,
        MEASURES=findings.MEASURES,
        POWER=POWER,
    )
    report_folder(study)
    for kind, files in (("tables", tables), ("figures", pictures)):
        for name, source in files.items():
            with written_whole(reports / kind / name) as temporary:
                shutil.copyfile(source, temporary)
    with written_whole(reports / "tables" / LITERATURE) as temporary:
        shutil.copyfile(Path(__file__).parent / LITERATURE, temporary)
    save_table(_provenance_table(facts), reports / "tables" / "provenance.csv")
    save_table(hypothesis_table(hypotheses), reports / "tables" / "hypotheses.csv")
    save_table(_seconds_table(facts), reports / "tables" / "seconds.csv")
    path = reports / "report.html"
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return path


def _provenance_table(facts: Facts) -> pd.DataFrame:
    """What each number came from: columns network ("<arm>-s<seed>"; empty for a notebook), stage, run_id, commit,
    dirty; of a network those of its training, which may be older than the notebook's last run.
    """
    rows = []
    for stage, record in facts.records.items():
        ids = record.get("runs", {})
        for network, run_id in ({"": ids.get("notebook", "")} | ids.get("models", {})).items():
            source = facts.trained_at.get(network, {}) if network else record.get("source", {})
            rows.append((network, stage, run_id, source.get("commit", ""), source.get("dirty", "")))
    return pd.DataFrame(rows, columns=["network", "stage", "run_id", "commit", "dirty"])


def _teacher_source(facts: Facts) -> dict[str, str]:
    """Run and commit of the teacher's training, "" where not recorded."""
    name = next((name for name in facts.runs if name.startswith("teacher-s")), "")
    return {"run": facts.runs.get(name, ""), "commit": findings.commit_of(facts, name)}


def _seconds_table(facts: Facts) -> pd.DataFrame:
    """What training and selection took, as on the page: columns what (an arm, a step of 02, a notebook), seconds."""
    costs = findings.costs(facts)
    rows = [(f"{row.arm}, per student", row.seconds) for row in costs["arms"]]
    rows += [("all distilled students", costs["seconds"])] if costs["students"] else []
    rows += [(row.what, row.seconds) for row in costs["selection"]] + costs["notebooks"]
    return pd.DataFrame(rows, columns=["what", "seconds"])


# --- Figures and files


def _tables(runs: Path) -> list[Path]:
    """Tables worth keeping: not what tells of one run alone (but speed.csv, which the page shows), nor the samples that
    stability.csv and partitions.csv sum up.
    """
    left_out = {"record.json", "progress.json", "timings.csv", "resamples.csv", "sizes.csv"}
    found = (path for stage in STAGES for path in sorted((runs / stage).glob("*")) if path.suffix in (".csv", ".json"))
    return [path for path in found if path.name not in left_out and not path.name.startswith(".")]


def _pictures(runs: Path) -> list[Path]:
    """Figures that the tables can give again; pictures of pixels stay in the notebooks."""
    found = (path for stage in STAGES for path in sorted((runs / stage / "figures").glob("*")))
    found = (path for path in found if path.suffix in (".png", ".pdf") and not path.name.startswith("."))
    return [path for path in found if path.stem not in PICTURES]


def _unique_names(paths: Sequence[Path]) -> dict[str, Path]:
    """File names for one folder: the file's own, led by its stage where two stages have a file of that name."""
    names = [path.name for path in paths]
    stages = [next(parent.name for parent in path.parents if parent.name in STAGES) for path in paths]
    return {
        name if names.count(name) == 1 else f"{stage}_{name}": path
        for name, stage, path in zip(names, stages, paths, strict=True)
    }


def _provenance(facts: Facts) -> dict[str, Any]:
    """Versions, hardware, threads and the arithmetic of trainings, each with the stages that it holds for; every
    parameter, by stage.
    """
    about: dict[str, dict[str, list[str]]] = {"versions": {}, "hardware": {}, "threads": {}}
    for (stage, record), (what, values) in itertools.product(facts.records.items(), about.items()):
        if record.get(what) is not None:  # notebook 03 is told no number of threads
            values.setdefault(_in_words(record[what]), []).append(stage)
    about["arithmetic"] = {}
    for stage, record in facts.records.items():
        trained = record.get("runs", {}).get("trained_at", {}).values()
        for words in dict.fromkeys(_in_words(of["arithmetic"]) for of in trained if "arithmetic" in of):
            about["arithmetic"].setdefault(words, []).append(stage)
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
