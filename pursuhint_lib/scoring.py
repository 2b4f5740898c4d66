"""The students of a study on the test images."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib.arms import load_student
from pursuhint_lib.data import BatchSource
from pursuhint_lib.evaluation import fit_temperature, score
from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.profiling import LayerProfile, cross_similarity, profile_layers
from pursuhint_lib.progress import Progress
from pursuhint_lib.storage import read_table, run_folder
from pursuhint_lib.training import predict

STUDENT_COLUMNS = ["arm", "method", "strategy", "same_as", "seed", "val_accuracy", "status"]


def study_students(study: str) -> pd.DataFrame:
    """Every student of notebooks 01 (arm "unaided") and 04, one row per arm and seed: `STUDENT_COLUMNS`.

    same_as names the arm whose students an arm shares ("" where it has its own); status is "trained" or "failed".
    Raises FileNotFoundError naming the notebook to run first.
    """
    distilled = read_table(run_folder(study, "04_distill_students") / "students.csv")
    distilled = distilled.astype({"same_as": object}).fillna({"same_as": ""})
    baselines = read_table(run_folder(study, "01_train_teacher") / "baselines.csv").rename(columns={"model": "arm"})
    unaided = baselines[baselines["arm"] == "unaided"].assign(method="none", strategy="none", same_as="")
    return pd.concat([unaided.assign(status="trained"), distilled])[STUDENT_COLUMNS].reset_index(drop=True)


def score_network(
    network: nn.Module,
    validation: BatchSource,
    test: BatchSource,
    dtype: torch.dtype = torch.float32,
    teacher_logits: Tensor | None = None,
) -> tuple[dict[str, float], Tensor]:
    """What `evaluation.score` measures, with the temperature (fitted on validation), and the test logits (N, K).

    teacher_logits: (N, K), of the same test images; None for the teacher itself.
    """
    temperature = fit_temperature(*predict(network, validation, dtype))
    logits, labels = predict(network, test, dtype)
    measures = score(logits, labels, logits if teacher_logits is None else teacher_logits, temperature)
    names = {"accuracy": "test_accuracy", "loss": "test_loss"}  # of tables that hold validation as well
    measures = {names.get(name, name): value for name, value in measures.items()}
    return measures | {"temperature": temperature}, logits


def score_students(
    study: str,
    students: pd.DataFrame,
    validation: BatchSource,
    test: BatchSource,
    teacher_logits: Tensor,
    dtype: torch.dtype = torch.float32,
) -> pd.DataFrame:
    """The trained ones of `students` (see `study_students`) with what `score_network` measures of each.

    Every network is looked at once: an arm that shares its students with another shares their numbers.
    """
    measured = {
        (arm, seed): score_network(network, validation, test, dtype, teacher_logits)[0]
        for arm, seed, network in _networks(study, students, test.device, "seeds on the test images")
    }
    rows = students[students["status"] == "trained"].drop(columns="status").to_dict("records")
    return pd.DataFrame([row | measured[row["same_as"] or row["arm"], row["seed"]] for row in rows])


def student_similarities(
    study: str, students: pd.DataFrame, layers: Sequence[str], teacher: LayerProfile, probe: BatchSource
) -> dict[tuple[str, int], pd.DataFrame]:
    """(arm, seed) -> how alike each of a student's `layers` (columns) is to each layer of the teacher's profile (rows).

    Linear CKA of pooled features on the probe images, see `profiling.cross_similarity`. Of trained students only.
    """
    alike = {
        (arm, seed): cross_similarity(teacher, profile_layers(FrozenTeacher(network, list(layers)), probe))
        for arm, seed, network in _networks(study, students, probe.device, "seeds on the probe images")
    }
    trained = students[students["status"] == "trained"]
    return {(row.arm, row.seed): alike[row.same_as or row.arm, row.seed] for row in trained.itertuples()}


def similarity_rows(similarities: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Arm -> similarity of teacher layers (rows) and student layers (columns), as one table: columns arm,
    teacher_layer, student_layer, similarity.
    """
    rows = [
        (arm, teacher_layer, student_layer, value)
        for arm, table in similarities.items()
        for teacher_layer, own in table.iterrows()
        for student_layer, value in own.items()
    ]
    return pd.DataFrame(rows, columns=["arm", "teacher_layer", "student_layer", "similarity"])


def _networks(
    study: str, students: pd.DataFrame, device: torch.device, what: str
) -> Iterator[tuple[str, int, nn.Module]]:
    """Arm, seed and network of all trained students, each network once; tells of each seed that is done."""
    own = students[(students["status"] == "trained") & (students["same_as"] == "")]
    progress = Progress(run_folder(study, "05_evaluate"), max(1, own["seed"].nunique()), what)
    for seed, rows in own.groupby("seed", sort=False):
        for arm in rows["arm"]:
            yield arm, seed, load_student(study, arm, seed).to(device)
        progress.advance(f"seed {seed}: {len(rows)} students")
