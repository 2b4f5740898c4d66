"""The report says what the tables say, and stands alone."""

import fnmatch
import json
import math
import re
import tomllib
from html.parser import HTMLParser
from xml.etree.ElementTree import Element, TreeBuilder

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from pursuhint_lib.evaluation import contrast, summarize
from pursuhint_lib.formatting import DASH, MINUS
from pursuhint_lib.params import STAGES
from pursuhint_lib.report import FIGURES, TEMPLATE, write_report
from pursuhint_lib.storage import REPOSITORY, read_json, read_table, save_json, save_table
from pursuhint_lib.tracking import LAB_TABLE

LAYERS = [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(5)]
CHOICES = {
    "stage_ends": [4, 9, 14],
    "uniform": [2, 7, 12],
    "random_0": [0, 5, 11],
    "random_1": [3, 8, 13],
    "clustered_r2_cca": [1, 6, 13],
    "clustered_linear_cka": [2, 7, 12],  # the same layers as uniform
    "clustered_first_r2_cca": [0, 4, 9],
}
TEACHER = {
    "network": "resnet32",
    "parameters": 464154,
    "macs": 69_000_000,
    "val_accuracy": 0.681,
    "test_accuracy": 0.6725,
    "test_loss": 1.0,
}
POINTS = {
    "unaided": -4.0,
    "kd": 0.0,
    "stage_ends": 0.2,
    "uniform": 0.5,
    "clustered_r2_cca": 2.5,
    "clustered_linear_cka": 0.5,
    "random_0": -3.0,
}
HOSTILE = '<script>alert("1")</script> & co'


def make_study(home, *, seeds=5, methods=("at",), confidence=0.95, records=True, figures=True, classes=("0", "1", "2")):
    """A small made-up study below `home`; returns its folder of runs."""
    runs = home / "runs" / "toy"
    teach, profile, cluster, distill, evaluate = (runs / stage for stage in STAGES)
    random = np.random.default_rng(7)
    noise = random.normal(0, 0.004, seeds)  # shared by the arms of a seed: pairing takes it out

    rows = []
    arms = [("unaided", "unaided", "none", ""), ("kd", "kd", "none", "")]
    arms += [
        (f"{m}_{s}", m, s, f"{m}_uniform" if s == "clustered_linear_cka" else "") for m in methods for s in CHOICES
    ]
    for arm, method, strategy, same_as in arms:
        twin = [row for row in rows if row["arm"] == same_as]
        for seed in range(seeds):
            accuracy = 0.63 + POINTS.get(arm, POINTS.get(strategy, 0.0)) / 100 + noise[seed] + random.normal(0, 0.003)
            values = {
                "val_accuracy": accuracy + 0.005,
                "test_accuracy": accuracy,
                "test_loss": 1 + random.random(),
                "agreement": 0.7,
            }
            values = {key: twin[seed][key] for key in values} if twin else values
            rows.append({"arm": arm, "method": method, "strategy": strategy, "same_as": same_as, "seed": seed} | values)
    results = pd.DataFrame(rows)
    save_table(results, evaluate / "results.csv")
    save_table(summarize(results, TEACHER["test_accuracy"], confidence=confidence), evaluate / "summary.csv")
    save_table(contrast(results, confidence), evaluate / "contrasts.csv")
    save_json({"confidence": confidence, "reference": "kd"}, evaluate / "settings.json")
    save_json(TEACHER, evaluate / "teacher.json")

    baseline = {
        "model": "teacher",
        "network": "resnet32",
        "seed": 0,
        "parameters": 464154,
        "macs": 69_000_000,
        "val_accuracy": 0.68,
    }
    student = baseline | {"model": "unaided", "network": "resnet8_w4", "parameters": 5012, "macs": 800_000}
    save_table(pd.DataFrame([baseline, student]), teach / "baselines.csv")
    sets = {
        "train": {"images": 1200, "digest": "a"},
        "validation": {"images": 200, "digest": "b"},
        "test": {"images": 397, "digest": "c"},
    }
    save_json(
        {"shape": [1, 8, 8], "classes": list(classes), "mean": [0.3], "std": [0.4], "sets": sets, "data": "digits"},
        teach / "images.json",
    )
    save_table(_history(["teacher"], [0], 4), teach / "histories.csv")
    save_table(pd.DataFrame({"arm": ["teacher"], "seed": [0], "epoch": [1], "seconds": [0.1]}), teach / "timings.csv")

    depth = range(1, len(LAYERS) + 1)
    save_table(
        pd.DataFrame({"layer": LAYERS, "stage": [int(name[5]) for name in LAYERS], "depth": depth}),
        profile / "layers_teacher.csv",
    )
    eye = pd.DataFrame(np.eye(len(LAYERS)), LAYERS, LAYERS)
    save_table(eye, profile / "similarity_r2_cca.csv", index=True)
    chosen = {name: {"layers": [LAYERS[i] for i in points], "labels": None} for name, points in CHOICES.items()}
    save_json({"none": {"layers": [], "labels": None}} | chosen, cluster / "hint_points.json")
    often = [{"metric": "r2_cca", "layer": name, "frequency": 0.125 * i} for i, name in enumerate(LAYERS[:8])]
    save_table(pd.DataFrame(often), cluster / "stability.csv")
    pairs = [
        {"arm": f"{m}_{s}", "method": m, "hint": k + 1, "teacher_layer": LAYERS[i], "student_layer": f"blocks.{k}"}
        for m in methods
        for s, points in CHOICES.items()
        for k, i in enumerate(points)
    ]
    save_table(pd.DataFrame(pairs), distill / "pairs.csv")
    save_table(
        _history([arm for arm, _, _, same_as in arms if arm != "unaided" and not same_as], range(seeds), 3),
        distill / "histories.csv",
    )

    if figures:
        for number, (stage, name, _, _) in enumerate(FIGURES):
            folder = runs / stage / "figures"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + number, 20), "white").save(folder / f"{name}.png")
            (folder / f"{name}.pdf").write_bytes(b"%PDF")
        Image.new("RGB", (4, 4)).save(teach / "curves.png")
    if records:
        for number, stage in enumerate(STAGES):
            save_json(_record(stage, number), runs / stage / "record.json")
    return runs


def _history(arms, seeds, epochs):
    rows = [
        {"arm": a, "seed": s, "epoch": e + 1, "loss": 1.0, "status": "trained"}
        for a in arms
        for s in seeds
        for e in range(epochs)
    ]
    return pd.DataFrame(rows)


def _record(stage, number):
    """As `pipeline` writes it, cut to what the report shows."""
    models = (
        {f"at_{s}-s{seed}": f"run-{s}-{seed}" for s in CHOICES for seed in range(5)}
        if stage == "04_distill_students"
        else {}
    )
    return {
        "stage": stage,
        "key": f"{number}f" * 32,
        "inputs": {"parameters": {"study": "toy", "epochs": 3, "seeds": [0, 1]}},
        "outputs": {},
        "runs": {"notebook": f"{number}e" * 16, "models": models},
        "source": {"commit": f"{number}c" * 20, "dirty": number == 3},
        "versions": {"python": "3.11.9", "torch": "2.15.0"},
        "hardware": {"cpu": "Imagined CPU", "cores": 2, "memory_gb": 15.6, "gpu": [], "system": "Linux x86_64"},
        "threads": None if number == 2 else 2,
        "started": "2031-01-02 03:04:05",
        "ended": f"2031-01-02 03:1{number}:05",
        "seconds": 12.5 + number,
    }


class Page(HTMLParser):
    """A page as a tree; a tag that is not closed, or closed twice, is an error."""

    def __init__(self, path):
        super().__init__()
        self.builder, self.open = TreeBuilder(), []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open
        self.root: Element = self.builder.close()

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, {name: value or "" for name, value in attributes})
        if tag in ("meta", "img", "wbr", "br", "link", "input"):
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)

    def all(self, tag, **attributes):
        return [e for e in self.root.iter(tag) if all(e.get(k.replace("_", "-")) == v for k, v in attributes.items())]

    def table(self, label):
        return next(e for e in self.all("div", role="region") if e.get("aria-label") == label)


def text(element):
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def numbers(element):
    """The unrounded values in an element, in the order of reading."""
    return [float(e.get("value")) for e in element.iter("data")]


def report(home):
    return Page(write_report("toy"))


def test_the_main_table_holds_the_numbers_of_the_summary_in_full(home):
    runs = make_study(home, methods=("at", "fitnet"))
    summary = read_table(runs / "05_evaluate" / "summary.csv")
    page = report(home)
    rows = page.table("Accuracy of all arms").findall(".//tr[@data-arm]")
    assert {row.get("data-arm") for row in rows} == set(summary["arm"])
    wanted = [
        "n",
        "val_mean",
        "test_mean",
        "test_low",
        "test_high",
        "difference",
        "difference_low",
        "difference_high",
        "gap_closed",
    ]
    for row in rows:
        expected = summary.set_index("arm").loc[row.get("data-arm")]
        leave_out = {"kd": ["difference", "difference_low", "difference_high"], "unaided": ["gap_closed"]}.get(
            row.get("data-arm"), []
        )
        assert numbers(row) == [float(expected[name]) for name in wanted if name not in leave_out]


def test_percent_points_and_signs_are_written_as_such(home):
    runs = make_study(home)
    table = read_table(runs / "05_evaluate" / "summary.csv")
    exact = {
        "val_mean": 0.6421,
        "test_mean": 0.63149,
        "test_low": 0.62,
        "test_high": 0.6429,
        "difference": -0.00316,
        "difference_low": -0.0081,
        "difference_high": 0.00004,
        "gap_closed": -0.0449,
    }
    table.loc[table["arm"] == "at_random_1", list(exact)] = list(exact.values())
    save_table(table, runs / "05_evaluate" / "summary.csv")
    cells = report(home).table("Accuracy of all arms").findall(".//tr[@data-arm='at_random_1']/td")
    assert [text(cell) for cell in cells] == [
        *("at", "5", "64.2 %", f"63.1 %62.0 {DASH} 64.3"),
        *(f"{MINUS}0.32{MINUS}0.81 to 0.00", "includes zero", f"{MINUS}4.5 %"),
    ]


def test_the_teacher_comes_first_and_the_unaided_student_last_the_rest_by_test_accuracy(home):
    runs = make_study(home)
    summary = read_table(runs / "05_evaluate" / "summary.csv").set_index("arm")
    body = report(home).table("Accuracy of all arms").findall(".//tbody/tr")
    assert text(body[0]).startswith("Teacher") and numbers(body[0])[1:] == [
        TEACHER["val_accuracy"],
        TEACHER["test_accuracy"],
    ]
    assert body[-1].get("data-arm") == "unaided"
    between = [summary.loc[row.get("data-arm"), "test_mean"] for row in body[1:-1]]
    assert between == sorted(between, reverse=True)


def test_every_number_on_the_page_is_its_value_rounded(home):
    make_study(home, methods=("at", "fitnet"))
    shown = report(home).all("data")
    assert len(shown) > 300
    for element in shown:
        value, words = float(element.get("value")), text(element)
        digits = words.replace(MINUS, "-").replace("%", "").replace("+", "").replace(",", "").strip()
        half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9
        assert min(abs(float(digits) - value), abs(float(digits) - 100 * value)) <= half, (value, words)
        assert not words.startswith(("-", f"{MINUS}0.00", "+0.00"))


def test_the_page_needs_no_network_and_no_script(home):
    make_study(home)
    page = report(home)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    addresses = [
        v
        for e in page.root.iter()
        for k, v in e.attrib.items()
        if k in ("src", "href", "srcset", "action", "poster", "data")
    ]
    assert addresses and all(a.startswith(("data:image/png;base64,", "#", "tables/", "figures/")) for a in addresses)
    assert "://" not in page.source and "@import" not in page.source and "url(" not in page.source


def test_every_address_of_a_file_leads_to_one_beside_the_page(home):
    make_study(home)
    (home / "runs" / "toy" / "01_train_teacher" / "figures").mkdir()
    (home / "runs" / "toy" / "01_train_teacher" / "figures" / "curves.pdf").write_bytes(b"%PDF of another stage")
    page = report(home)
    folder = home / "reports" / "toy"
    links = [e.get("href") for e in page.all("a")]
    assert "figures/04_distill_students_curves.pdf" in links
    for link in links:
        target = (
            page.root.find(f".//*[@id='{link[1:]}']") is not None if link.startswith("#") else (folder / link).is_file()
        )
        assert target, link


def test_names_from_outside_are_shown_as_text(home):
    runs = make_study(home, classes=[HOSTILE, "1"])
    for name in ("results.csv", "summary.csv"):
        table = read_table(runs / "05_evaluate" / name)
        table = table.replace({"arm": {"at_random_1": HOSTILE}, "strategy": {"random_1": f"random_{HOSTILE}"}})
        save_table(table, runs / "05_evaluate" / name)
    points = json.loads((runs / "03_cluster_layers" / "hint_points.json").read_text())
    save_json(points | {HOSTILE: {"layers": [HOSTILE]}}, runs / "03_cluster_layers" / "hint_points.json")
    page = report(home)
    assert not page.all("script")
    assert [text(row).count(HOSTILE) for row in page.all("tr", data_arm=HOSTILE)] == [1] + [1] * 5
    assert text(page.all("tr", data_strategy=HOSTILE)[0]).count(HOSTILE) == 2  # strategy and layer
    assert HOSTILE in text(page.table("Setting"))


def test_a_figure_that_is_missing_leaves_nothing_behind(home):
    runs = make_study(home)
    (runs / "03_cluster_layers" / "figures" / "clusters.png").unlink()
    (runs / "02_profile_layers" / "figures" / "similarity.pdf").unlink()
    page = report(home)
    found = [figure.get("id") for figure in page.all("figure")]
    assert found == [name for _, name, _, _ in FIGURES if name != "clusters"]
    assert len(page.all("img")) == len(found) and "figures/similarity.pdf" not in page.source
    assert all(image.get("src") and image.get("alt") and int(image.get("width")) >= 40 for image in page.all("img"))


def test_without_figures_there_is_no_section_of_figures(home):
    make_study(home, figures=False)
    page = report(home)
    assert not page.all("figure") and not page.all("section", aria_labelledby="figures")


def test_an_arm_with_the_layers_of_another_says_so_everywhere(home):
    make_study(home)
    page = report(home)
    main = page.table("Accuracy of all arms").find(".//tr[@data-arm='at_clustered_linear_cka']")
    assert "chose the same layers as at_uniform; not trained again" in text(main)
    cell = page.table("Clustered hints against the controls").find(
        ".//tr[@data-arm='at_clustered_linear_cka']/td[@data-control='uniform']"
    )
    assert text(cell) == "same layers" and not numbers(cell)
    assert "same layers as uniform" in text(page.all("tr", data_strategy="clustered_linear_cka")[0])
    runs = [text(row) for row in page.all("tr", data_arm="at_clustered_linear_cka") if row.get("data-seed")]
    assert len(runs) == 5 and all(f"run-uniform-{seed}" in row for seed, row in enumerate(runs))


def results_of(runs):
    return read_table(runs / "05_evaluate" / "results.csv").astype({"same_as": object}).fillna({"same_as": ""})


def with_differences(home, runs, difference):
    """Test accuracy of the main clustered arm = KD's plus `difference` (per seed), the rest as it was."""
    results = results_of(runs)
    kd = results.loc[results["arm"] == "kd", "test_accuracy"].to_numpy()
    results.loc[results["arm"] == "at_clustered_r2_cca", "test_accuracy"] = kd + difference
    save_table(results, runs / "05_evaluate" / "results.csv")
    save_table(summarize(results, TEACHER["test_accuracy"]), runs / "05_evaluate" / "summary.csv")
    save_table(contrast(results), runs / "05_evaluate" / "contrasts.csv")
    return report(home)


@pytest.mark.parametrize(
    ("shift", "word", "sentence", "answer"),
    [
        (0.02, "better", "the whole interval lies above zero: better", "is better than KD without hints"),
        (-0.02, "worse", "the whole interval lies below zero: worse", "is worse than KD without hints"),
        (
            0.0,
            "includes zero",
            "the interval includes zero: this study cannot tell them apart",
            "cannot be told apart from KD without hints",
        ),
    ],
)
def test_an_interval_is_read_in_the_same_words_everywhere(home, shift, word, sentence, answer):
    page = with_differences(home, make_study(home), shift + np.array([-1, 1, 0, 2, -2]) / 1000)
    row = page.table("Accuracy of all arms").find(".//tr[@data-arm='at_clustered_r2_cca']")
    assert text(row.find(".//span[@class]")) == word
    assert answer in text(page.all("div", **{"class": "answer"})[0])
    told = next(text(item) for item in page.all("li") if text(item).startswith("Against KD"))
    assert told.endswith(f"n = 5 paired seeds): {sentence}.")


def test_one_seed_gives_no_interval_and_no_verdict(home):
    make_study(home, seeds=1)
    page = report(home)
    assert "one seed gives no interval: this study cannot tell them apart" in text(page.root)
    row = page.table("Accuracy of all arms").find(".//tr[@data-arm='at_clustered_r2_cca']")
    assert (
        "no interval" in text(row)
        and "unknown (one seed)" in text(row)
        and not re.search(r"\bnan\b", text(page.root), re.IGNORECASE)
    )


def test_differences_to_the_controls_equal_a_paired_t_test(home):
    runs = make_study(home)
    results = read_table(runs / "05_evaluate" / "results.csv").astype({"same_as": object}).fillna({"same_as": ""})
    found = {(c.arm, c.control): c for c in contrast(results, 0.9).itertuples()}
    wide = {arm: rows.sort_values("seed")["test_accuracy"].to_numpy() for arm, rows in results.groupby("arm")}
    controls = {
        "kd": wide["kd"],
        "stage_ends": wide["at_stage_ends"],
        "uniform": wide["at_uniform"],
        "random": (wide["at_random_0"] + wide["at_random_1"]) / 2,
    }
    assert len(found) == 3 * len(controls)
    for control, values in controls.items():
        test = stats.ttest_rel(wide["at_clustered_r2_cca"], values)
        interval = test.confidence_interval(0.9)
        c = found["at_clustered_r2_cca", control]
        assert (c.n, c.mean) == (5, pytest.approx((wide["at_clustered_r2_cca"] - values).mean()))
        assert (c.low, c.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_differences_are_paired_over_the_seeds_that_both_arms_have(home):
    runs = make_study(home)
    results = read_table(runs / "05_evaluate" / "results.csv").astype({"same_as": object}).fillna({"same_as": ""})
    fewer = results[(results["arm"] != "at_stage_ends") | (results["seed"] > 1)]
    found = {(c.arm, c.control): c for c in contrast(fewer, 0.95).itertuples()}
    assert found["at_clustered_r2_cca", "stage_ends"].n == 3
    assert found["at_clustered_r2_cca", "uniform"].n == 5


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_page_names_the_level_of_the_intervals_that_it_shows(home, confidence):
    make_study(home, confidence=confidence)
    assert set(re.findall(r"(\d+) % interval", text(report(home).root))) == {f"{100 * confidence:.0f}"}


def test_the_best_arm_is_the_one_that_validation_chose(home):
    runs = make_study(home)
    summary = read_table(runs / "05_evaluate" / "summary.csv")
    summary.loc[summary["arm"] == "at_random_0", "val_mean"] = 0.9  # the worst on test
    save_table(summary, runs / "05_evaluate" / "summary.csv")
    tile = next(e for e in report(home).root.iter("div") if text(e).startswith("Best arm on validation"))
    assert "at_random_0" in text(tile)
    assert numbers(tile)[0] == float(summary.set_index("arm").loc["at_random_0", "test_mean"])


def test_the_chosen_layers_stand_with_depth_partner_and_stability(home):
    make_study(home)
    rows = report(home).table("Hint points by strategy").findall(".//tbody/tr")
    assert [row.get("data-strategy") for row in rows] == list(CHOICES)
    cells = [text(cell) for cell in next(r for r in rows if r.get("data-strategy") == "clustered_r2_cca").iter("td")]
    assert (
        cells[0].startswith("stage1.1")
        and "depth 2 →" in cells[0]
        and cells[0].count("blocks.0") == 1
        and "12.5 % of resamples" in cells[0]
    )
    assert "depth 14 →" in cells[2] and "blocks.2" in cells[2] and "resamples" not in cells[2]


def test_control_strategies_stand_with_what_is_unusual_about_their_hints(home):
    make_study(home)
    file = home / "runs" / "toy" / "03_cluster_layers" / "hint_points.json"
    pairs_file = home / "runs" / "toy" / "04_distill_students" / "pairs.csv"
    chosen, pairs = read_json(file), read_table(pairs_file)
    method = chosen["clustered_r2_cca"]
    pool = {"layers": list(LAYERS), "redrawn": 3}
    chosen |= {"reversed": method | {"pairing": "reversed"}, "untrained": method | {"source": "untrained"}}
    chosen |= {"redrawn": pool, "single_2": {"layers": [LAYERS[1]]}, "uniform": chosen["uniform"]}
    save_json(chosen, file)
    turned = pairs[pairs["arm"] == "at_clustered_r2_cca"].assign(arm="at_stage_ends")
    turned["teacher_layer"] = turned["teacher_layer"].to_numpy()[::-1]
    save_table(pd.concat([pairs[pairs["arm"] != "at_stage_ends"], turned]), pairs_file)
    # The toy study has no arm of its own for "reversed": lend it that of stage ends.
    chosen["stage_ends"] = chosen.pop("reversed")
    save_json(chosen, file)
    rows = {row.get("data-strategy"): row for row in report(home).table("Hint points by strategy").iter("tr")}
    reversed_cells = [text(cell) for cell in rows["stage_ends"].iter("td")]
    assert reversed_cells[0].startswith(method["layers"][0]) and "blocks.2" in reversed_cells[0]
    assert reversed_cells[2].startswith(method["layers"][2]) and "blocks.0" in reversed_cells[2]
    assert "deepest to the shallowest" in text(rows["stage_ends"]) and "same layers" not in text(rows["stage_ends"])
    assert "of a network with random weights" in text(rows["untrained"]) and "same" not in text(rows["untrained"])
    assert f"3 of {len(LAYERS)} layers, drawn anew at every step" in text(rows["redrawn"])
    assert len([cell for cell in rows["redrawn"].iter("td") if text(cell)]) == 0
    assert text(next(rows["single_2"].iter("td"))).startswith(LAYERS[1])


def test_provenance_names_run_commit_and_state_of_every_stage(home):
    make_study(home)
    page = report(home)
    rows = {row.get("data-stage"): text(row) for row in page.all("tr") if row.get("data-stage")}
    assert list(rows) == list(STAGES)
    for number, row in enumerate(rows.values()):
        assert (
            f"{number}e" * 16 in row
            and (f"{number}c" * 20)[:7] in row
            and f"03:1{number}:05" in row
            and f"{12.5 + number}" in row
        )
        assert ("with uncommitted changes" in row) == (number == 3)
    about = text(page.table("Versions and hardware"))
    assert "torch 2.15.0" in about and "Imagined CPU, cores 2" in about and "[]" not in about and "None" not in about
    for caption in page.all("figcaption"):
        assert re.search(r"From \d\d_\w+, run \w{8}, commit \w{7}", text(caption))


def test_a_study_without_records_says_not_recorded_and_takes_run_ids_from_its_own_table(home):
    runs = make_study(home, records=False)
    page = report(home)
    assert text(page.table("Provenance by stage")).count("not recorded") == 5 * 4
    ids = pd.DataFrame([{"arm": "kd", "seed": 3, "run_id": "abc", "status": "FINISHED"}])
    save_table(ids, runs / "04_distill_students" / LAB_TABLE)
    page = report(home)
    assert "abc" in text(next(r for r in page.all("tr", data_arm="kd") if r.get("data-seed") == "3"))


def test_the_record_of_the_last_stage_is_shown_once_it_is_there(home):
    runs = make_study(home)
    record = runs / "05_evaluate" / "record.json"
    content = record.read_bytes()
    record.unlink()
    assert "not recorded" in text(report(home).all("tr", data_stage="05_evaluate")[0])
    record.write_bytes(content)
    assert "not recorded" not in text(report(home).all("tr", data_stage="05_evaluate")[0])


def test_written_twice_it_is_the_same_to_the_byte(home):
    make_study(home)
    before = write_report("toy").read_bytes()
    assert write_report("toy").read_bytes() == before
    assert not list((home / "reports").rglob(".*"))  # nothing half-written is left


def test_tables_and_figures_lie_beside_the_page(home):
    runs = make_study(home)
    write_report("toy")
    tables = {path.name for path in (home / "reports" / "toy" / "tables").iterdir()}
    assert {
        "summary.csv",
        "results.csv",
        "teacher.json",
        "pairs.csv",
        "hint_points.json",
        "similarity_r2_cca.csv",
        "images.json",
    } <= tables
    assert {"01_train_teacher_histories.csv", "04_distill_students_histories.csv"} <= tables
    assert not {"histories.csv", "timings.csv", "record.json"} & tables
    assert (home / "reports" / "toy" / "tables" / "summary.csv").read_bytes() == (
        runs / "05_evaluate" / "summary.csv"
    ).read_bytes()
    figures = {path.name for path in (home / "reports" / "toy" / "figures").iterdir()}
    assert figures == {f"{name}.{suffix}" for _, name, _, _ in FIGURES for suffix in ("png", "pdf")}


def test_ways_to_match_logits_are_named_where_there_are_others_than_kd(home):
    make_study(home, methods=("at",))
    assert "Logits matched by" not in text(report(home).root)
    make_study(home, methods=("at", "wsld+at", "dkd"))
    assert "Logits matched bykd, wsld, dkd" in text(report(home).table("Setting")).replace("\n", "")


def test_training_that_broke_off_is_told(home):
    runs = make_study(home)
    history = read_table(runs / "04_distill_students" / "histories.csv")
    assert "broke off" not in text(report(home).root)
    history.loc[(history["arm"] == "at_uniform") & (history["seed"] == 2), ["status", "reason"]] = ["failed", "why not"]
    history = history[(history["status"] == "trained") | (history["epoch"] == 3)]
    save_table(history, runs / "04_distill_students" / "histories.csv")
    notice = report(home).all("p", **{"class": "notice"})[0]
    assert "at_uniform seed 2 (in epoch 3: why not)" in text(notice)


@pytest.mark.parametrize("failed", [False, True])
def test_a_study_without_clustered_arms_has_a_page_too_and_tells_whether_they_failed(home, failed):
    runs = make_study(home)
    if not failed:
        pairs = read_table(runs / "04_distill_students" / "pairs.csv")
        save_table(pairs[~pairs["arm"].str.contains("clustered")], runs / "04_distill_students" / "pairs.csv")
    for name in ("results.csv", "summary.csv"):
        table = read_table(runs / "05_evaluate" / name)
        save_table(table[~table["strategy"].str.startswith("clustered")], runs / "05_evaluate" / name)
    save_table(contrast(results_of(runs)), runs / "05_evaluate" / "contrasts.csv")
    page = report(home)
    says = text(page.root)
    assert "says nothing about the method" in says
    assert ("clustered layers failed, so it" in says, "No arm of this study takes its" in says) == (failed, not failed)
    assert "Clustered hints against the controls" not in page.source


def test_a_study_that_was_not_run_names_the_notebook_to_run_and_leaves_no_folder(home):
    with pytest.raises(FileNotFoundError, match="run notebook 05_evaluate of this study first"):
        write_report("toy")
    assert not list(home.iterdir())


def test_no_number_means_a_dash_not_nan(home):
    runs = make_study(home)
    table = read_table(runs / "05_evaluate" / "summary.csv")
    save_table(table.assign(gap_closed=math.nan, val_mean=math.nan), runs / "05_evaluate" / "summary.csv")
    page = report(home)
    assert not re.search(r"\bnan\b", text(page.root), re.IGNORECASE) and "Best arm" not in text(
        page.table("Accuracy of all arms")
    )


def test_the_template_is_packed_with_the_library():
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["pursuhint_lib"]
    assert any(fnmatch.fnmatch(TEMPLATE, pattern) for pattern in patterns)
    assert (REPOSITORY / "pursuhint_lib" / TEMPLATE).is_file()
