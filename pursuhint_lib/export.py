"""A student of a study -> files that run without this package.

    python -m pursuhint_lib.export STUDY [--arm ARM] [--seed SEED]

What is written, into ``reports/<study>/student/``: the student as an exported program (torch.export), as ONNX where its
packages are installed, as a plain state dict, a model card and ``facts.json``. The program takes what a user has,
pixels from 0 to 1, and normalizes them itself. Before anything gets its final name, a fresh process that cannot import
this package runs the files on validation images, and its logits must be the student's.

Test images have no say in which student is chosen.
"""

import argparse
import copy
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib.arms import kept_file, parse_method
from pursuhint_lib.command import run_command
from pursuhint_lib.comparison import best_on_validation, mean_interval
from pursuhint_lib.data import Batches, balanced_subset, checked_statistics
from pursuhint_lib.errors import first_line
from pursuhint_lib.evaluation import accuracy, count_macs, count_parameters
from pursuhint_lib.formatting import templates
from pursuhint_lib.models import load_model
from pursuhint_lib.params import STAGES, Images, StudentTraining, from_variables, load_params, nearest, study_file
from pursuhint_lib.provenance import source_state
from pursuhint_lib.reading import logits_of
from pursuhint_lib.records import read_record
from pursuhint_lib.status import command_line, is_busy, short
from pursuhint_lib.storage import home, read_json, read_table, report_folder, save_json, sha256, written_whole
from pursuhint_lib.study import FIXED_BATCH_SIZE, study_images
from pursuhint_lib.tracking import LAB_TABLE
from pursuhint_lib.training import predict

TEMPLATE = "export.md.j2"
PROGRAM, ONNX, WEIGHTS, CARD, FACTS = "student.pt2", "student.onnx", "student.pth", "MODEL_CARD.md", "facts.json"
CHECK_IMAGES = 500  # most images that the exported files are tried on
BATCH_SIZES = (1, 7, FIXED_BATCH_SIZE)
# Largest difference of a logit, relative to the largest logit. float32 keeps 7 digits; layers, each of which may sum
# in another order, cost some. A wrong mean or a batch norm in training mode is off by far more.
TOLERANCE = 1e-4
# Columns of results.csv, as far as a study has them: name in the card, how the number is written.
MEASURES = {
    "val_accuracy": ("accuracy, validation images", "percent"),
    "test_accuracy": ("accuracy, test images", "percent"),
    "top5": ("right class among the first five, test", "percent"),
    "test_loss": ("cross entropy, test (nats)", "decimal"),
    "agreement": ("same answer as the teacher, test", "percent"),
    "ece": ("calibration error (ECE), test", "percent"),
    "ece_scaled": ("calibration error, logits divided by the temperature", "percent"),
    "temperature": ("temperature, fitted on validation images", "decimal"),
}

# Runs in a process of its own. argv: the folder of the files, threads, "onnxruntime" where that is installed. Reads
# path.json (what may be imported from) and pixels.pt in the current folder, writes each file's logits as NAME.pt there.
FRESH_PROCESS = """
import importlib.abc, json, os, sys

class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pursuhint_lib":
            raise ImportError("this process must do without pursuhint_lib")

sys.meta_path.insert(0, NotHere())
with open("path.json") as file:
    sys.path[:] = json.load(file)
import torch

folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
batches = torch.load("pixels.pt", weights_only=True)
program = torch.export.load(os.path.join(folder, "student.pt2")).module()
with torch.no_grad():
    torch.save([program(pixels) for pixels in batches], "student.pt2.pt")
if os.path.exists(os.path.join(folder, "student.onnx")) and "onnxruntime" in sys.argv:
    import onnxruntime
    session = onnxruntime.InferenceSession(os.path.join(folder, "student.onnx"), providers=["CPUExecutionProvider"])
    logits = [session.run(["logits"], {"images": pixels.numpy()})[0] for pixels in batches]
    torch.save([torch.from_numpy(values) for values in logits], "student.onnx.pt")
assert "pursuhint_lib" not in sys.modules
"""


class Choice(NamedTuple):
    """Which student is exported, the reason in one line, and whether validation chose it or its seed."""

    arm: str
    seed: int
    why: str
    by_validation: bool


class FromPixels(nn.Module):
    """A network with its normalization in front: pixels (B, C, H, W) float from 0 to 1 -> logits (B, K).

    mean, std: (C,) each, on the [0, 1] scale.
    """

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", std.float().view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return logits_of(self.network((pixels - self.mean) / self.std))


# ----------------------------------------------------------------------------------------------------------- choosing


def choose_student(study: str, arm: str = "", seed: int | str | None = None) -> Choice:
    """The student to export; validation chooses what is not given.

    arm: empty for the aided arm (any but "unaided") with the best mean accuracy on validation; of equals, the first by
    name. An arm that repeats another gives the other's student. seed: None for the arm's best on validation; of equals,
    the smallest. The arm is the one that the report calls the best by validation.

    Raises ValueError, one line: the study has not run or is running, there is no such arm or seed (naming the nearest),
    or its training failed.
    """
    results, students = _tables(study)
    by_validation = not arm
    if by_validation:
        summary = _read_arms(_runs(study) / "05_evaluate" / "summary.csv")
        arm = best_on_validation(summary)
        if not arm:
            raise ValueError(f"study {study} has no aided student (--arm unaided exports one without a teacher)")
        aided = (summary["arm"] != "unaided") & (summary["same_as"] == "")
        mean = summary.set_index("arm").loc[arm, "val_mean"]
        why = f"best mean on validation, {mean:.1%}, of {aided.sum()} aided arms"
    else:
        arms = list(dict.fromkeys([*results["arm"], *students["arm"]]))
        if arm not in arms:
            raise ValueError(f"study {study} has no arm {arm!r}{nearest(arm, arms)} (there are {', '.join(arms)})")
        if arm not in set(results["arm"]):
            raise ValueError(f"every student of arm {arm} failed in training; another arm can be exported")
        why = "arm as asked"
        same_as = results.loc[results["arm"] == arm, "same_as"].iloc[0]
        if same_as:
            arm, why = same_as, f"{arm} was asked for, which chose the same layers and is the same student"
    own = results[results["arm"] == arm].sort_values("seed")
    if seed is None:
        row = own.loc[own["val_accuracy"].idxmax()]
        why += f"; its best seed on validation, {row['val_accuracy']:.1%}"
        return Choice(arm, int(row["seed"]), why, True)
    seeds = [str(value) for value in own["seed"]]
    if str(seed) not in seeds:
        failed = students[(students["arm"] == arm) & (students["seed"].astype(str) == str(seed))]
        what = "failed in training" if len(failed) else "is not there"
        raise ValueError(f"seed {seed} of arm {arm} {what} (there are {', '.join(seeds)})")
    return Choice(arm, int(seed), f"{why}; seed as asked", False)


def _runs(study: str) -> Path:
    return home() / "runs" / study


def _tables(study: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results.csv of 05 and students.csv of 04, of a study that has run to its end."""
    there = sorted(path.name for path in (home() / "runs").glob("*") if path.is_dir())
    if study not in there:
        known = ", ".join(there) or "nothing"
        raise ValueError(f"no study {study!r} has been run{nearest(study, there)} (runs/ holds {known})")
    if is_busy(study):
        raise ValueError(f"study {study} is running; '{command_line('status', study)}' shows how far it is")
    tables = [_runs(study) / name for name in ("05_evaluate/results.csv", "04_distill_students/students.csv")]
    if not all(path.exists() for path in tables):
        raise ValueError(f"study {study} has no results yet; '{command_line('reproduce', study)}' goes on with it")
    results, students = map(_read_arms, tables)
    return results, students


def _read_arms(path: Path) -> pd.DataFrame:
    """A table whose empty texts in same_as read back as empty texts, also where it has no other."""
    return read_table(path).astype({"same_as": object}).fillna({"same_as": ""})


# ---------------------------------------------------------------------------------------------------------- exporting


def export_student(study: str, arm: str = "", seed: int | str | None = None) -> Path:
    """Write a student's files into ``reports/<study>/student/``; returns that folder. Says in a few lines what was
    chosen, what was left out, and how far the files' logits are from the student's.

    arm, seed: see `choose_student`. Equal students give equal files, under the same versions of torch and ONNX.

    Raises ValueError or FileNotFoundError, one line: as `choose_student`, the images of the study are not there, or the
    exported files do not give the student's logits. Then no file is written, and those of an earlier export stay.
    """
    choice = choose_student(study, arm, seed)
    print(f"exporting {choice.arm} seed {choice.seed} of {study}: {choice.why}")
    stage = "01_train_teacher" if choice.arm == "unaided" else "04_distill_students"
    params = _parameters(study, stage)
    network = _network(study, stage, choice)
    recorded = read_json(_runs(study) / "01_train_teacher" / "images.json")
    final = home() / "reports" / study / "student"
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".student.", suffix=".partial") as staging:
        made = Path(staging)
        write_programs(network, made, mean=recorded["mean"], std=recorded["std"], shape=recorded["shape"])
        check = check_export(made, network, params)
        facts = _facts(study, stage, choice, network, recorded, check)
        facts["files"] = {path.name: sha256(path) for path in sorted(made.iterdir())}
        card = _card(study, stage, choice, params, network, facts)
        (made / CARD).write_text(card, encoding="utf-8")
        facts["files"][CARD] = sha256(made / CARD)
        _publish(made, facts, final)
    _tell(final, facts)
    return final


def _parameters(study: str, stage: str) -> Images | StudentTraining:
    """The parameters that a stage has run with: its record's, or the parameter file's where it was run by hand."""
    record = read_record(_runs(study) / stage)
    if record is None:
        return load_params(study_file(study))[stage]
    return from_variables(STAGES[stage], record["inputs"]["parameters"])


def _network(study: str, stage: str, choice: Choice) -> nn.Module:
    file = kept_file(_runs(study) / stage, choice.arm, choice.seed)
    network, kept = load_model(file)
    results, _ = _tables(study)
    row = results[(results["arm"] == choice.arm) & (results["seed"] == choice.seed)].iloc[0]
    if not math.isclose(kept["val_accuracy"], row["val_accuracy"]):
        again = command_line("reproduce", study)
        raise ValueError(f"{short(file)} is not the student that 05_evaluate has looked at; '{again}' looks again")
    return network


def missing_packages() -> list[str]:
    """What is not installed of the packages that write and run ONNX."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def write_programs(
    network: nn.Module,
    folder: Path | str,
    *,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    shape: Sequence[int],
) -> None:
    """Write any network as student.pth, student.pt2 and, where its packages are installed, student.onnx.

    network: normalized images (B, C, H, W) -> logits (B, K), on any device, in any mode and memory format; it is left
    as it was, and exported in evaluation mode for the CPU. mean, std: C values each, on the [0, 1] scale: what images
    are normalized with. shape: (C, H, W). Raises ValueError, one line, for other numbers of values, and what
    torch.export raises for a network that it cannot follow.
    """
    folder, (mean, std) = Path(folder), checked_statistics(mean, std, shape[0])
    network = copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format)
    model = FromPixels(network, mean, std).eval()
    # Through a buffer: written to a path, an archive carries the name of the temporary file.
    buffer = io.BytesIO()
    torch.save(dict(network.state_dict()), buffer)
    (folder / WEIGHTS).write_bytes(buffer.getvalue())
    example = torch.zeros(2, *shape)  # of one image, the size of the batch would be taken for a constant
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for node in program.graph.nodes:  # in which file of whose machine each operation stands
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(name, None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    (folder / PROGRAM).write_bytes(buffer.getvalue())
    if not {"onnx", "onnxscript"} & set(missing_packages()):
        names = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(program, (), folder / ONNX, dynamo=True, external_data=False, verbose=False, **names)


def check_export(folder: Path, network: nn.Module, params: Images) -> dict[str, Any]:
    """Run the exported files of `folder` in a fresh process and compare their logits with those of `network`.

    The network sees validation images of the study as everywhere (`data.Batches`); the files see the same images as
    pixels from 0 to 1. No noise is added: it is the study's, not the network's. Float32, on the CPU, in batches of 1,
    7 and 250. student.onnx is tried where onnxruntime is installed.

    Returns images (how many), batch_sizes, tolerance, largest_logit, largest_difference (file name -> absolute),
    accuracy (of the network on these images). Raises ValueError, one line, when a file cannot be run or differs.
    """
    clean = params.model_copy(update={"noise": 0.0, "evaluation_repeats": 1})
    images = study_images(clean)
    tried = balanced_subset(images.validation, CHECK_IMAGES, params.split_seed)
    tried = tried.in_memory() if params.streaming else tried
    expected, labels = predict(network, Batches(tried, FIXED_BATCH_SIZE, mean=images.mean, std=images.std))
    pixels = tried.images.float() / 255
    few, many = BATCH_SIZES[:-1], BATCH_SIZES[-1]
    parts = [slice(0, size) for size in few] + [slice(first, first + many) for first in range(0, len(tried), many)]
    found = _run_fresh(folder, [pixels[part].clone() for part in parts])
    largest = float(expected.abs().max())
    differences = {}
    for name, batches in found.items():
        each = [(logits - expected[part]).abs().max() for logits, part in zip(batches, parts, strict=True)]
        differences[name] = difference = float(torch.stack(each).max())
        if not difference <= TOLERANCE * largest:  # also when it is NaN
            raise ValueError(
                f"{name} does not give the student's logits: they differ by up to {difference:.3g} on {len(tried)} "
                f"validation images, allowed is {TOLERANCE:g} of the largest logit, {largest:.3g}; nothing was written"
            )
    return {
        "images": len(tried),
        "batch_sizes": sorted({min(size, len(tried)) for size in BATCH_SIZES}),
        "tolerance": TOLERANCE,
        "largest_logit": largest,
        "largest_difference": differences,
        "accuracy": accuracy(expected, labels),
    }


def _run_fresh(folder: Path, batches: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What the files of `folder` give for each batch, in a process that has nothing of this package."""
    own = Path(__file__).resolve().parent.parent
    importable = [path for path in sys.path if path and Path(path).resolve() != own]
    with tempfile.TemporaryDirectory(prefix="pursuhint-export-") as elsewhere:
        torch.save(list(batches), Path(elsewhere, "pixels.pt"))
        Path(elsewhere, "path.json").write_text(json.dumps(importable), encoding="utf-8")
        command = [sys.executable, "-I", "-c", FRESH_PROCESS, str(folder.resolve()), str(torch.get_num_threads())]
        if "onnxruntime" not in missing_packages():
            command.append("onnxruntime")
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"the exported student does not run in a fresh process: {last}; nothing was written")
        found = [path for path in sorted(Path(elsewhere).glob("student.*.pt"))]
        return {path.stem: torch.load(path, weights_only=True) for path in found}


def _publish(made: Path, facts: Mapping[str, Any], final: Path) -> None:
    """Give the files their final names. facts.json goes first and comes last: without it a folder is not whole."""
    report_folder(final.parent.name, final.name)
    (final / FACTS).unlink(missing_ok=True)
    if not (made / ONNX).exists():  # that of an earlier export would be of another student
        (final / ONNX).unlink(missing_ok=True)
    for path in sorted(made.iterdir()):
        with written_whole(final / path.name) as temporary:
            shutil.copyfile(path, temporary)
    save_json(facts, final / FACTS)


def _tell(final: Path, facts: Mapping[str, Any]) -> None:
    check, missing = facts["check"], missing_packages()
    for name, difference in check["largest_difference"].items():
        print(
            f"{name}: logits as the student's on {check['images']} validation images, in a fresh process without "
            f"pursuhint_lib (largest difference {difference:.2g}; largest logit {check['largest_logit']:.3g})"
        )
    if missing:
        what = "was written, but not tried" if ONNX in facts["files"] else "is left out"
        install = f"{short(Path(sys.executable))} -m pip install {' '.join(missing)}"
        print(f"{ONNX} {what}: not installed here: {', '.join(missing)} ({install})")
    print(f"written: {short(final)}/ ({', '.join([*facts['files'], FACTS])})")


# ----------------------------------------------------------------------------------------------------- facts and card


def _facts(
    study: str, stage: str, choice: Choice, network: nn.Module, recorded: Mapping[str, Any], check: Mapping[str, Any]
) -> dict[str, Any]:
    """What a program that uses the student has to know, and where the student came from."""
    return {
        "study": study,
        "arm": choice.arm,
        "seed": choice.seed,
        "chosen": choice.why,
        "network": network.spec,
        "input": {
            "name": "images",
            "dtype": "float32",
            "shape": ["batch", *recorded["shape"]],
            "range": [0, 1],
            "normalization": "inside the program; not in the state dict",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(recorded["classes"])]},
        "classes": recorded["classes"],
        "mean": recorded["mean"],
        "std": recorded["std"],
        "parameters": count_parameters(network),
        "macs": count_macs(network, tuple(recorded["shape"])),
        "check": dict(check),
        "trained": _origin(study, stage, f"{choice.arm}-s{choice.seed}"),
        "evaluated": _origin(study, "05_evaluate"),
        "exported": {"source": source_state(), "torch": torch.__version__},
    }


def _origin(study: str, stage: str, student: str = "") -> dict[str, Any]:
    """Commit and MLflow run of a stage, or of a student of it, as far as recorded."""
    record = read_record(_runs(study) / stage) or {}
    ids = record.get("runs", {})
    run = ids.get("models", {}).get(student) if student else ids.get("notebook")
    by_hand = _runs(study) / stage / LAB_TABLE
    if student and not run and by_hand.exists():
        named = {f"{row.arm}-s{row.seed}": row.run_id for row in read_table(by_hand).itertuples()}
        run = named.get(student)
    source = ids.get("trained_at", {}).get(student) if student else record.get("source")
    source = source or {"commit": "not recorded", "dirty": None}
    return {"stage": stage, "run": run or "not recorded", "source": source}


def _card(
    study: str,
    stage: str,
    choice: Choice,
    params: Images | StudentTraining,
    network: nn.Module,
    facts: Mapping[str, Any],
) -> str:
    """The model card (Mitchell et al. 2019, arXiv 1810.03993); its numbers are those of the study's tables."""
    runs, (results, _) = _runs(study), _tables(study)
    confidence = read_json(runs / "05_evaluate" / "settings.json")["confidence"]
    teacher = read_json(runs / "05_evaluate" / "teacher.json")
    summary = read_table(runs / "05_evaluate" / "summary.csv")
    own = results[results["arm"] == choice.arm]
    row = own[own["seed"] == choice.seed].iloc[0]
    method = row["method"]
    pairs = read_table(runs / "04_distill_students" / "pairs.csv")
    environment = templates(html=False)
    environment.filters |= {"percent": lambda x: f"{x:.1%}", "whole": lambda x: f"{x:,.0f}", "points": _points}
    return environment.get_template(TEMPLATE).render(
        study=study,
        choice=choice,
        params=params,
        facts=facts,
        spec=network.spec,
        teacher=teacher,
        row=row.to_dict(),
        level=f"{confidence:.0%}",
        n=len(own),
        table=_measures(own, row, teacher, confidence),
        beside_kd=summary[summary["arm"] == choice.arm].iloc[0],
        objective=None if stage == "01_train_teacher" else parse_method(method),
        pairs=[pair for pair in pairs.itertuples() if pair.arm == choice.arm],
        recorded=read_json(runs / "01_train_teacher" / "images.json"),
        resized=_resized(params),
        onnx=ONNX in facts["files"],
    )


def _measures(own: pd.DataFrame, row: pd.Series, teacher: Mapping[str, Any], confidence: float) -> list[dict[str, str]]:
    """Rows of the card's table: what, this student, mean and interval over the arm's seeds, teacher."""
    table = []
    for column, (what, kind) in MEASURES.items():
        if column in own and own[column].notna().any():
            mean, low, high = mean_interval(own[column].to_numpy(), confidence)
            # None of these can be negative, and shares end at one: an interval of few seeds that does not is no help.
            impossible = math.isnan(low) or low < 0 or (kind == "percent" and high > 1)
            spread = "" if impossible else f" ({_written(low, kind)} to {_written(high, kind)})"
            theirs = teacher.get(column)
            table.append(
                {
                    "what": what,
                    "student": _written(row[column], kind),
                    "seeds": _written(mean, kind) + spread,
                    "teacher": "" if theirs is None else _written(theirs, kind),
                }
            )
    return table


def _written(value: float, kind: str) -> str:
    return f"{value:.1%}" if kind == "percent" else f"{value:.3f}"


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def _resized(params: Images) -> str:
    """How an image of another size becomes one of the network's."""
    size = params.image_size
    if params.data != "image_folder":
        return ""
    shorter = round(size * 256 / 224) if params.streaming else size
    return f"The shorter side was resized to {shorter} pixels, and the central {size} x {size} pixels were taken."


# ------------------------------------------------------------------------------------------------------------ command


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status, 0 or 1."""
    parser = argparse.ArgumentParser(
        prog="python -m pursuhint_lib.export", description="Write a student as files that run without this package."
    )
    parser.add_argument("study", help="a study that has been run, for example digits")
    parser.add_argument("--arm", default="", help="else the best aided arm on validation")
    parser.add_argument("--seed", default="", help="else the arm's best seed on validation")
    options = parser.parse_args(arguments)
    try:
        export_student(options.study, options.arm, options.seed or None)
    except Exception as error:
        if os.environ.get("PURSUHINT_DEBUG"):
            traceback.print_exc()
        expected = isinstance(error, (ValueError, FileNotFoundError))
        text = first_line(str(error))
        shown = text if expected else f"{type(error).__name__}: {text} (PURSUHINT_DEBUG=1 shows where)"
        print(shown, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
