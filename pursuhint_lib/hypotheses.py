"""Five hypotheses that were written down before the studies were run, and what a study says of each.

Their wording and their margins do not depend on any result. A study answers those that it has the arms for; the others
are "not run", with what is missing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pursuhint_lib.comparison import NO_DIFFERENCE, Difference, main_strategy, paired_difference
from pursuhint_lib.params import LANDSCAPE

NEAR = 0.005  # accuracies that differ by less than half a point count as alike
FAR = 2  # layers; a hint point that moves by at most so many stays where it is
TRAINED_ADAPTERS = ("fitnet", "vid")  # methods that learn to undo a difference in scale
CLAIMS = {
    "H1": "Where the teacher’s logits are not matched, hints from any layers are better than none.",
    "H2": "Beside the teacher’s logits, hints add less than half a point.",
    "H3": "Hints from clustered layers are worth as much as hints at uniform depth, to half a point.",
    "H4": "Reversed pairs harm attention transfer, and more so than a method with trained adapters.",
    "H5": "Another similarity measure moves a hint point by at most two layers, and centering moves it less than "
    "fewer images or another place in the block do.",
}


@dataclass(frozen=True)
class Part:
    """One comparison that a hypothesis is judged by. what: in words. difference: of test accuracies, paired by seed,
    where it is one; shift: by how many layers, where it is that. answer: holds, does not hold, open or same layers.
    """

    what: str
    answer: str
    difference: Difference = NO_DIFFERENCE
    shift: float = math.nan


@dataclass(frozen=True)
class Hypothesis:
    """What a study says of one claim. answer: holds, does not hold, open, same layers or not run. why: of "not run",
    or of a part that was not.
    """

    name: str
    answer: str
    parts: tuple[Part, ...] = ()
    why: str = ""

    @property
    def claim(self) -> str:
        """The claim, as it was written down."""
        return CLAIMS[self.name]


def judge_hypotheses(
    results: pd.DataFrame,
    hint_points: Mapping[str, Mapping[str, Any]],
    partitions: pd.DataFrame,
    logits_matched: bool | None,
    confidence: float = 0.95,
) -> list[Hypothesis]:
    """What a study says of each claim.

    results: as for `comparison.summarize`. hint_points: as in ``hint_points.json``. partitions: as in
    ``partitions.csv``. logits_matched: whether the students of the methods that name no other logit loss learn from the
    teacher's logits (a `kd_weight` above zero); None if that is not recorded.

    H1 and H3 are judged by arms, H2 by methods: such a claim holds where all its parts do (so it needs no correction
    for their number), and does not hold where one part is shown to be against it: its interval at 1 - (1 - confidence)
    / parts (Bonferroni) lies wholly on the other side. Else it is open. A claim of likeness holds where the whole
    interval lies within `NEAR`. H5 is of one teacher and has no interval.
    """
    study = _Study(results, hint_points, confidence)
    return [
        _h1(study, logits_matched),
        _h2(study, logits_matched),
        _h3(study),
        _h4(study),
        _h5(partitions),
    ]


class _Study:
    def __init__(self, results: pd.DataFrame, hint_points: Mapping[str, Mapping[str, Any]], confidence: float):
        self.accuracy = results.pivot(index="seed", columns="arm", values="test_accuracy")
        arms = results.drop_duplicates("arm")
        self.students = dict(zip(arms["arm"], arms["same_as"].where(arms["same_as"] != "", arms["arm"]), strict=True))
        self.confidence = confidence
        self.main = main_strategy(hint_points)
        plain = {name for name, points in hint_points.items() if _is_plain(name, points)}
        self.choices: dict[str, dict[str, str]] = {}  # method -> strategy -> arm
        for row in arms.itertuples():
            if row.arm != "unaided" and row.strategy in plain and _logit_loss(row.method) == "kd":
                self.choices.setdefault(row.method, {})[row.strategy] = row.arm
        self.reversed = {
            row.method: row.arm
            for row in arms.itertuples()
            if hint_points.get(row.strategy, {}).get("pairing") == "reversed"
        }

    def difference(self, a: Sequence[str], b: Sequence[str], confidence: float | None = None) -> Difference:
        """Of the means of two sets of arms, paired by seed; arms that are the same students count once."""
        mean = {
            side: self.accuracy[sorted({self.students[arm] for arm in arms})].mean(axis="columns", skipna=False)
            for side, arms in (("a", a), ("b", b))
        }
        values = (mean["a"] - mean["b"]).dropna().to_numpy()
        return paired_difference(values, confidence or self.confidence) if len(values) else NO_DIFFERENCE

    def strict(self, parts: int) -> float:
        """The confidence at which one of so many parts must be against a claim."""
        return 1 - (1 - self.confidence) / parts


def _is_plain(name: str, points: Mapping[str, Any]) -> bool:
    """Whether these are layers whose hints somebody might take: of the trained teacher, in order, always the same."""
    as_usual = points.get("pairing", "in_order") == "in_order" and points.get("source", "trained") == "trained"
    return as_usual and not points.get("redrawn") and not name.startswith(LANDSCAPE)


def _logit_loss(method: str) -> str:
    from pursuhint_lib.arms import parse_method  # here: it brings torch, which nothing else here needs

    return parse_method(method).logit_loss


def _all_hold(parts: Sequence[Part]) -> str:
    answers = [part.answer for part in parts]
    if "does not hold" in answers:
        return "does not hold"
    if set(answers) == {"same layers"}:
        return "same layers"
    return "open" if "open" in answers else "holds"


def _h1(study: _Study, logits_matched: bool | None) -> Hypothesis:
    if logits_matched is None:
        return Hypothesis("H1", "not run", why="it is not recorded whether the teacher’s logits were matched")
    if logits_matched:
        return Hypothesis(
            "H1", "not run", why="in every arm of this study the teacher’s logits are matched (kd_weight)"
        )
    arms = dict.fromkeys(study.students[arm] for by in study.choices.values() for arm in by.values())
    if not arms or "kd" not in study.accuracy:
        return Hypothesis("H1", "not run", why="this study has no arm with hints, or none without")
    parts = []
    for arm in arms:
        difference = study.difference([arm], ["kd"])
        against = study.difference([arm], ["kd"], study.strict(len(arms))).high < 0
        parts.append(Part(f"{arm}, minus labels alone", _word(difference.low > 0, against), difference))
    return Hypothesis("H1", _all_hold(parts), tuple(parts))


def _h2(study: _Study, logits_matched: bool | None) -> Hypothesis:
    if logits_matched is None:
        return Hypothesis("H2", "not run", why="it is not recorded whether the teacher’s logits were matched")
    if not logits_matched:
        return Hypothesis("H2", "not run", why="no arm of this study matches the teacher’s logits (kd_weight is zero)")
    if not study.choices or "kd" not in study.accuracy:
        return Hypothesis("H2", "not run", why="this study has no arm with hints, or none without")
    parts = []
    for method, by_strategy in study.choices.items():
        arms = list(by_strategy.values())
        difference = study.difference(arms, ["kd"])
        against = study.difference(arms, ["kd"], study.strict(len(study.choices))).low > NEAR
        number = len({study.students[arm] for arm in arms})
        what = f"{method}, mean of {number} choices of layers, minus kd" if number > 1 else f"{arms[0]}, minus kd"
        parts.append(Part(what, _word(difference.high < NEAR, against), difference))
    return Hypothesis("H2", _all_hold(parts), tuple(parts))


def _h3(study: _Study) -> Hypothesis:
    parts = []
    methods = {method: by for method, by in study.choices.items() if study.main in by and "uniform" in by}
    for method, by in methods.items():
        ours, control = by[study.main], by["uniform"]
        what = f"{ours}, minus {control}"
        if study.students[ours] == study.students[control]:
            parts.append(Part(what, "same layers"))
            continue
        difference = study.difference([ours], [control])
        strict = study.difference([ours], [control], study.strict(len(methods)))
        against = strict.low > NEAR or strict.high < -NEAR
        parts.append(Part(what, _word(-NEAR < difference.low and difference.high < NEAR, against), difference))
    if not parts:
        return Hypothesis("H3", "not run", why="no method of this study has both choices")
    return Hypothesis("H3", _all_hold(parts), tuple(parts))


def _h4(study: _Study) -> Hypothesis:
    both = {method: (arm, study.choices.get(method, {}).get(study.main)) for method, arm in study.reversed.items()}
    both = {method: arms for method, arms in both.items() if arms[1]}
    adapted = [method for method in TRAINED_ADAPTERS if method in both]
    if "at" not in both:
        return Hypothesis("H4", "not run", why="attention transfer was not run with reversed pairs")
    harm = study.difference([both["at"][0]], [both["at"][1]])
    parts = [Part(f"{both['at'][0]}, minus {both['at'][1]}", _word(harm.high < 0, harm.low > 0), harm)]
    for method in adapted:
        (back, forth), (own_back, own_forth) = both["at"], both[method]
        accuracy = study.accuracy
        values = (accuracy[back] - accuracy[forth]) - (accuracy[own_back] - accuracy[own_forth])
        values = values.dropna().to_numpy()
        more = paired_difference(values, study.confidence) if len(values) else NO_DIFFERENCE
        parts.append(Part(f"the same, minus what it is for {method}", _word(more.high < 0, more.low > 0), more))
    if not adapted:
        why = f"no method with trained adapters ({', '.join(TRAINED_ADAPTERS)}) was run with reversed pairs"
        return Hypothesis("H4", "not run" if parts[0].answer != "does not hold" else "does not hold", tuple(parts), why)
    return Hypothesis("H4", _all_hold(parts), tuple(parts))


def _h5(partitions: pd.DataFrame) -> Hypothesis:
    elsewhere = "another place in the block is another study (before_activation)"
    measures = partitions[partitions["between"] == "measures"]
    if measures.empty:
        return Hypothesis("H5", "not run", why="only one measure was clustered by")
    worst = measures.loc[measures["largest_shift"].idxmax()]
    shift = float(worst["largest_shift"])
    parts = [
        Part(
            f"two measures that differ most, {worst['a']} and {worst['b']}",
            _word(shift <= FAR, shift > FAR),
            shift=shift,
        )
    ]
    names = {"r2_cca", "r2_cca_uncentered"}
    centering = measures[[{row.a, row.b} == names for row in measures.itertuples()]]
    fewer = partitions[partitions["between"] == "fewer images, with all"]
    if centering.empty or fewer.empty:
        return Hypothesis("H5", _all_hold(parts), tuple(parts), f"centering was not compared; {elsewhere}")
    by_centering, by_images = float(centering["largest_shift"].max()), float(fewer["largest_shift"].max())
    less = _word(by_centering < by_images, by_centering > by_images)
    parts += [
        Part("centering: r2_cca and r2_cca_uncentered", less, shift=by_centering),
        Part("fewer images than all, the largest shift", less, shift=by_images),
    ]
    return Hypothesis("H5", _all_hold(parts), tuple(parts), elsewhere)


def _word(holds: bool | np.bool_, against: bool | np.bool_) -> str:
    return "holds" if holds else "does not hold" if against else "open"


def hypothesis_table(hypotheses: Sequence[Hypothesis]) -> pd.DataFrame:
    """One row per part, and one for a hypothesis that was not run: hypothesis, answer (of the whole), what, part (its
    answer), n, mean, low, high, shift, why.
    """
    rows = []
    for hypothesis in hypotheses:
        for part in hypothesis.parts or (Part("", ""),):
            d = part.difference
            about = {"hypothesis": hypothesis.name, "answer": hypothesis.answer, "what": part.what, "part": part.answer}
            numbers = {"n": d.n or None, "mean": d.mean, "low": d.low, "high": d.high, "shift": part.shift}
            rows.append(about | numbers | {"why": hypothesis.why})
    return pd.DataFrame(rows)
