"""What a study left on disk, as the report needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pursuhint_lib.params import STAGES
from pursuhint_lib.storage import read_json, read_table
from pursuhint_lib.tracking import LAB_TABLE


@dataclass(frozen=True)
class Facts:
    """The files of a study that the page is made of.

    results, summary, contrasts, teacher, confidence: of notebook 05, see `evaluation`. histories: of 01 and 04, by
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
