"""What a study left on disk, as the report needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pursuhint_lib.params import STAGES
from pursuhint_lib.records import Origin, read_record
from pursuhint_lib.storage import read_json, read_table, read_valid
from pursuhint_lib.tracking import LAB_RECORD, LAB_TABLE

# Columns that only studies of a newer comparison have; in an older table they read as empty.
COMPARED = ["boot_low", "boot_high", "effect", "p", "p_holm", "detectable"]
STUDENT_MEASURES = ["top5", "agreement", "agreement_wrong", "kl", "ece", "temperature", "ece_scaled", "loss_scaled"]


@dataclass(frozen=True)
class Facts:
    """The files of a study that the page is made of.

    results, summary, contrasts, teacher, confidence: of notebook 05, see `comparison`. measures, costs, speed,
    landscape, placement: of notebook 05 as well, empty in a study that has none. adapters: of 04. histories: of 01 and
    04, by stage. training_seconds, selection_seconds: what 04 (arm, seed, epoch, seconds) and 02 (what, seconds) took.
    records: stage -> its record.json, or what is known of a notebook run by hand, or {} (05 while it is running). runs:
    MLflow run ids, of notebooks by stage and of trained networks by "<arm>-s<seed>", as far as recorded. trained_at:
    the same networks -> commit and dirty (whether there were changes) at the time of their training.
    """

    results: pd.DataFrame
    summary: pd.DataFrame
    teacher: Mapping[str, Any]
    baselines: pd.DataFrame
    other_teachers: pd.DataFrame
    images: Mapping[str, Any]
    layers: pd.DataFrame
    hint_points: Mapping[str, Mapping[str, Any]]
    pairs: pd.DataFrame
    contrasts: pd.DataFrame
    confidence: float
    measures: pd.DataFrame
    costs: pd.DataFrame
    adapters: pd.DataFrame
    speed: pd.DataFrame
    landscape: Mapping[str, Mapping[str, Any]]
    placement: pd.DataFrame
    stability: pd.DataFrame
    partitions: pd.DataFrame
    histories: Mapping[str, pd.DataFrame]
    training_seconds: pd.DataFrame
    selection_seconds: pd.DataFrame
    records: Mapping[str, Mapping[str, Any]]
    runs: Mapping[str, str]
    trained_at: Mapping[str, Mapping[str, Any]]

    def parameters(self, stage: str) -> Mapping[str, Any]:
        """Parameters that a stage ran with, or {} where that is not recorded."""
        return self.records.get(stage, {}).get("inputs", {}).get("parameters", {})


def read_facts(runs: Path) -> Facts:
    """Read what the page needs from a study's folder of runs. Raises as `write_report`."""
    teach, profile, cluster, distill, evaluate = (runs / stage for stage in STAGES)
    summary = _without_gaps(read_table(evaluate / "summary.csv"))
    results = _without_gaps(read_table(evaluate / "results.csv"))
    contrasts = _with_columns(read_table(evaluate / "contrasts.csv"), [*COMPARED, "comparisons"])
    records = {
        stage: read_record(runs / stage) or read_valid(runs / stage / LAB_RECORD, Origin) or {} for stage in STAGES
    }
    return Facts(
        results=_with_columns(results, STUDENT_MEASURES),
        summary=_with_columns(summary, COMPARED),
        contrasts=contrasts if "family" in contrasts else contrasts.assign(family=""),
        confidence=read_json(evaluate / "settings.json")["confidence"],
        teacher=read_json(evaluate / "teacher.json"),
        baselines=read_table(teach / "baselines.csv"),
        other_teachers=_optional_table(teach / "other_teachers.csv", ["model"]),
        images=read_json(teach / "images.json"),
        layers=read_table(profile / "layers_teacher.csv"),
        hint_points=read_json(cluster / "hint_points.json"),
        pairs=read_table(distill / "pairs.csv"),
        measures=_optional_table(evaluate / "measures.csv", ["arm", "measure", "n", "mean", "low", "high"]),
        costs=_optional_table(evaluate / "costs.csv", ["role", "network", "parameters", "macs"]),
        adapters=_optional_table(distill / "adapters.csv", ["arm", "adapter_parameters", "state_bytes"]),
        speed=_optional_table(evaluate / "speed.csv", ["role"]),
        landscape=_optional_json(evaluate / "landscape.json"),
        placement=_optional_table(evaluate / "placement.csv", ["method", "strategy", "arm"]),
        stability=_optional_table(cluster / "stability.csv", ["metric", "layer", "frequency"]),
        partitions=_optional_table(
            cluster / "partitions.csv", ["a", "b", "adjusted_rand", "shared", "largest_shift", "between"]
        ),
        histories={folder.name: read_table(folder / "histories.csv") for folder in (teach, distill)},
        training_seconds=_optional_table(distill / "timings.csv", ["arm", "seed", "epoch", "seconds"]),
        selection_seconds=_optional_table(profile / "timings.csv", ["what", "seconds"]),
        records=records,
        runs=_run_ids(records, runs),
        trained_at=_trained_at(records),
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


def _trained_at(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for record in records.values():
        found |= record.get("runs", {}).get("trained_at", {})
    return found


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _optional_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    return read_table(path) if path.exists() else pd.DataFrame(columns=list(columns))


def _without_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Empty texts read back as empty texts, not as NaN."""
    texts = table[["method", "strategy", "same_as"]].astype(object)
    return table.assign(**texts.where(texts.notna(), ""))


def _with_columns(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    return table.reindex(columns=[*table.columns, *(name for name in columns if name not in table)])
