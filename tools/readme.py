"""Write the results of README.md from reports/: `make readme` runs it, a test holds the two together."""

import json
import sys
from pathlib import Path

import pandas as pd
import yaml

from pursuhint_lib.comparison import contrast, main_strategy, summarize
from pursuhint_lib.hypotheses import CLAIMS, judge_hypotheses
from pursuhint_lib.params import load_params

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ("digits", "digits_controls", "digits_landscape", "cifar100_resnet32_resnet8")  # of record
BEGIN = "<!-- results: written by `make readme` from the tables in reports/ -->\n"
END = "<!-- /results -->"
HEAD = (
    "| study | teacher | unaided student | distilled, no hints | clustered hints, minus no hints | minus stage ends "
    "| minus uniform depth | could see | n |\n|---|---|---|---|---|---|---|---|---|\n"
)


def results_table(root: Path = ROOT) -> str:
    """A Markdown row per study of record: teacher, unaided and kd accuracy, what the main clustered arm of the first
    method differs by, and the largest of the differences that these comparisons would have found.
    """
    rows = []
    for study in STUDIES:
        folder = root / "reports" / study / "tables"
        results = pd.read_csv(folder / "results.csv").astype({"same_as": object}).fillna({"same_as": ""})
        choices = json.loads((folder / "hint_points.json").read_text(encoding="utf-8"))
        common = yaml.safe_load((root / "params" / f"{study}.yaml").read_text(encoding="utf-8"))["common"]
        teacher = pd.read_json(folder / "teacher.json", typ="series")
        summary = summarize(results, teacher["test_accuracy"]).set_index("arm")
        contrasts = contrast(results, main_strategy(choices))
        main = contrasts.loc[contrasts["family"] == "main", "arm"].iloc[0]
        against = contrasts[contrasts["arm"] == main].set_index("control").loc[["kd", "stage_ends", "uniform"]]
        cells = [
            f"[`{study}`](reports/{study}/)",
            f"{common['teacher']}: {teacher['test_accuracy']:.1%}",
            f"{common['student']}: {_mean(summary.loc['unaided'])}",
            _mean(summary.loc["kd"]),
            f"{main}: {_difference(against.loc['kd'])}",
            _difference(against.loc["stage_ends"]),
            _difference(against.loc["uniform"]),
            f"{100 * against['detectable'].max():.1f}",
            str(summary.loc["kd", "n"]),
        ]
        rows.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(rows)


def hypotheses_table(root: Path = ROOT) -> str:
    """A Markdown row per hypothesis, a column per study of record: what the study says of it."""
    answers = {}
    for study in STUDIES:
        folder = root / "reports" / study / "tables"
        results = pd.read_csv(folder / "results.csv").astype({"same_as": object}).fillna({"same_as": ""})
        choices = json.loads((folder / "hint_points.json").read_text(encoding="utf-8"))
        params = load_params(root / "params" / f"{study}.yaml")
        matched = params["04_distill_students"].kd_weight > 0
        partitions = pd.read_csv(folder / "partitions.csv")
        confidence = params["05_evaluate"].confidence
        judged = judge_hypotheses(results, choices, partitions, matched, confidence)
        answers[study] = {one.name: one.answer for one in judged}
    head = f"| claim | {' | '.join(f'`{study}`' for study in STUDIES)} |\n|---|{'---|' * len(STUDIES)}\n"
    rows = (
        f"| **{name}** {claim} | {' | '.join(answers[study][name] for study in STUDIES)} |\n"
        for name, claim in CLAIMS.items()
    )
    return head + "".join(rows)


def not_run(root: Path = ROOT) -> str:
    """A sentence that names the studies of params/ without a report of record."""
    there = sorted(path.stem for path in (root / "params").glob("*.yaml"))
    names = [f"`{study}`" for study in there if study not in STUDIES and study != "smoke"]  # smoke is a test
    return f"Ready to run, and not yet of record: {', '.join(names)}.\n"


def results(root: Path = ROOT) -> str:
    """All that stands between the two marks."""
    return f"{results_table(root)}\n{hypotheses_table(root)}\n{not_run(root)}"


def _mean(row: pd.Series) -> str:
    return f"{row['test_mean']:.1%} ({100 * row['test_low']:.1f} to {100 * row['test_high']:.1f})"


def _difference(row: pd.Series) -> str:
    if row["word"] == "same layers":
        return "same layers"
    interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
    return f"{100 * row['mean']:+.1f} ({interval}; {row['word']})"


def main() -> None:
    """Put the results between the two marks in README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    readme.write_text(before + BEGIN + results() + rest[rest.index(END) :], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
