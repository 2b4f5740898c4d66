"""The report says what the tables say, and stands alone."""

import fnmatch
import json
import math
import re
import shutil
import tomllib
from html.parser import HTMLParser
from xml.etree.ElementTree import Element, TreeBuilder

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from pursuhint_lib.comparison import contrast, summarize
from pursuhint_lib.facts import COMPARED
from pursuhint_lib.figures import FIGURES
from pursuhint_lib.findings import MEASURES
from pursuhint_lib.formatting import DASH, MINUS
from pursuhint_lib.literature import SOURCES, TABLE
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import MODELS
from pursuhint_lib.params import STAGES
from pursuhint_lib.report import MODEL_CARD, TEMPLATE, write_report
from pursuhint_lib.storage import REPOSITORY, read_json, read_table, save_json, save_table
from pursuhint_lib.tracking import LAB_RECORD, LAB_TABLE

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
MAIN = "clustered_r2_cca"
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
    """A small made-up study below `home`, with the tables that every study has; returns its folder of runs."""
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
    save_table(contrast(results, MAIN, confidence), evaluate / "contrasts.csv")
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
        for number, figure in enumerate(FIGURES):
            folder = runs / figure.stage / "figures"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + number, 20), "white").save(folder / f"{figure.name}.png")
            (folder / f"{figure.name}.pdf").write_bytes(b"%PDF")
        Image.new("RGB", (4, 4)).save(teach / "curves.png")
    if records:
        for number, stage in enumerate(STAGES):
            save_json(_record(stage, number), runs / stage / "record.json")
    return runs


FAMILY = 8  # comparisons that the made-up p values are corrected over


def add_certainty(runs):
    """Bootstrap, effect size, p values and detectable differences, made up, in summary and contrasts."""
    random = np.random.default_rng(3)
    for name, ends in (("summary", "difference_"), ("contrasts", "")):
        path = runs / "05_evaluate" / f"{name}.csv"
        table = read_table(path)
        known = table["difference" if ends else "mean"].notna()
        columns = {
            "boot_low": table[f"{ends}low"] * 0.9,
            "boot_high": table[f"{ends}high"] * 0.9,
            "effect": random.normal(0, 2, len(table)),
            "p": random.uniform(0.0001, 0.04, len(table)),
            "p_holm": random.uniform(0.06, 0.9, len(table)),
            "detectable": random.uniform(0.005, 0.02, len(table)),
        }
        table = table.assign(**{key: pd.Series(values).where(known) for key, values in columns.items()})
        if name == "contrasts":
            main = table["arm"].str.endswith("clustered_r2_cca")
            table["family"] = np.where(main, "main", "other")
            table["comparisons"] = FAMILY
            table.loc[table["word"] == "same layers", ["effect", "p", "p_holm", "detectable"]] = math.nan
        save_table(table, path)


def add_tables(runs):
    """What a study of today has beyond `make_study`: certainty, measures, costs, stability, seconds."""
    profile, cluster, distill, evaluate = (runs / stage for stage in list(STAGES)[1:])
    random = np.random.default_rng(5)
    add_certainty(runs)
    results = read_table(evaluate / "results.csv")
    save_table(results.assign(temperature=random.uniform(0.9, 1.6, len(results))), evaluate / "results.csv")
    means = random.uniform(0.1, 0.9, (results["arm"].nunique(), len(MEASURES)))
    measures = [
        {"arm": arm, "measure": name, "n": 5, "mean": mean, "low": mean - 0.0123, "high": mean + 0.0123}
        for arm, row in zip(dict.fromkeys(results["arm"]), means, strict=True)
        for name, mean in zip(MEASURES, row, strict=True)
    ]
    save_table(pd.DataFrame(measures), evaluate / "measures.csv")
    more = {"top5": 0.971, "ece": 0.0765, "temperature": 1.3, "ece_scaled": 0.0213, "loss_scaled": 0.91}
    save_json(TEACHER | more, evaluate / "teacher.json")
    sizes = [("teacher", "resnet32", 464154, 69_000_000), ("student", "resnet8_w4", 5012, 800_000)]
    save_table(pd.DataFrame(sizes, columns=["role", "network", "parameters", "macs"]), evaluate / "costs.csv")
    speed = [
        ("teacher", 1, 12.3456, 12.0, 13.0, 81.0, 7_654_321, "cpu", 2, "float32"),
        ("student", 64, 3.25, 3.0, 3.5, 19692.3, 1_234_567, "cpu", 2, "float32"),
    ]
    columns = ["role", "batch", "latency_ms", "latency_low", "latency_high", "images_per_second", "peak_memory_bytes"]
    save_table(pd.DataFrame(speed, columns=[*columns, "device", "threads", "precision"]), evaluate / "speed.csv")
    arms = [arm for arm in dict.fromkeys(results["arm"]) if arm != "unaided"]
    adapters = {
        "arm": arms,
        "adapter_parameters": range(len(arms)),
        "state_bytes": [1000 * i for i in range(len(arms))],
    }
    save_table(pd.DataFrame(adapters), runs / "04_distill_students" / "adapters.csv")
    save_table(
        pd.DataFrame([("profile", 1.25), ("cluster", 0.5)], columns=["what", "seconds"]), profile / "timings.csv"
    )
    trained = results.loc[results["same_as"].isna() & (results["arm"] != "unaided"), ["arm", "seed"]]
    epochs = [trained.assign(epoch=epoch, seconds=10.0 * epoch + trained["seed"]) for epoch in (1, 2)]
    save_table(pd.concat(epochs), distill / "timings.csv")
    partitions = [("0", "1", "random halves", 1.0, 3, 0), ("0", "2", "random halves", 0.5, 1, 2)]
    partitions += [("r2_cca", "linear_cka", "measures", 0.75, 2, 1)]
    save_table(
        pd.DataFrame(partitions, columns=["a", "b", "between", "adjusted_rand", "shared", "largest_shift"]),
        cluster / "partitions.csv",
    )


def add_landscape(runs, subsets=20):
    """Arms of subsets and single layers, and what landscape.json says of them."""
    evaluate = runs / "05_evaluate"
    results = read_table(evaluate / "results.csv")
    one = results[results["arm"] == "at_uniform"]
    names = [f"subset_{i}_{i + 1}_{i + 2}" for i in range(1, subsets + 1)] + ["single_1", "single_2"]
    more = [one.assign(arm=f"at_{name}", strategy=name, test_accuracy=0.6 + i / 1000) for i, name in enumerate(names)]
    results = pd.concat([results, *more]).astype({"same_as": object}).fillna({"same_as": ""})
    save_table(results, evaluate / "results.csv")
    save_table(summarize(results, TEACHER["test_accuracy"]), evaluate / "summary.csv")
    placements = [
        {"method": "at", "strategy": "uniform", "arm": "at_uniform", "mean": 0.635, "percentile": 0.8125}
        | {"percentile_low": 0.25, "percentile_high": 0.975, "gain": 0.01, "gain_low": 0.0, "gain_high": 0.02},
        {"method": "at", "strategy": "reversed", "arm": "at_reversed", "mean": 0.65, "percentile": 0.9},
    ]
    save_table(pd.DataFrame(placements), evaluate / "placement.csv")
    answer = f"The subsets differ by less than <b>their</b> noise: {HOSTILE}"
    short = f"The subsets are alike: {HOSTILE}"
    save_json({"at": {"subsets": subsets, "answer": answer, "short": short}}, evaluate / "landscape.json")


def _history(arms, seeds, epochs):
    rows = [
        {"arm": a, "seed": s, "epoch": e + 1, "loss": 1.0, "status": "trained"}
        for a in arms
        for s in seeds
        for e in range(epochs)
    ]
    return pd.DataFrame(rows)


MADE_FROM = {"notebook": "", "library": {}, "lock": "", "reads": {}}


def _record(stage, number):
    """As `pipeline` writes it, cut to what the report shows."""
    models = (
        {f"at_{s}-s{seed}": f"run-{s}-{seed}" for s in CHOICES for seed in range(5)}
        if stage == "04_distill_students"
        else {}
    )
    # Students of seed 0 were trained before the notebook ran for the last time, with changes that were not committed.
    trained_at = {name: {"commit": "abcdef0" * 5, "dirty": True} for name in models if name.endswith("-s0")}
    trained_at |= {name: {"commit": f"{number}c" * 20, "dirty": False} for name in models if name not in trained_at}
    arithmetic = {"precision": "float32", "memory_format": "contiguous_format", "cpu_capability": "AVX2"}
    trained_at = {name: about | {"arithmetic": arithmetic} for name, about in trained_at.items()}
    return {
        "stage": stage,
        "key": f"{number}f" * 32,
        "inputs": {"parameters": {"study": "toy", "epochs": 3, "seeds": [0, 1]}} | MADE_FROM,
        "outputs": {},
        "runs": {"notebook": f"{number}e" * 16, "models": models, "trained_at": trained_at},
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

    def section(self, name):
        """The section of that heading, or None."""
        return next(iter(self.all("section", aria_labelledby=name)), None)

    def table(self, label):
        return next(e for e in self.all("div", role="region") if e.get("aria-label") == label)


def text(element):
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def numbers(element):
    """The unrounded values in an element, in the order of reading."""
    return [float(e.get("value")) for e in element.iter("data")]


def cells(row):
    """The same of a row's cells, without its heading."""
    return [value for cell in row.findall("td") for value in numbers(cell)]


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
    runs = make_study(home, methods=("at", "fitnet"))
    add_tables(runs)
    shown = report(home).all("data")
    assert len(shown) > 700
    for element in shown:
        value, words = float(element.get("value")), text(element)
        if words.startswith("<"):  # "< 0.001"
            assert value < float(words.removeprefix("<"))
            continue
        digits = words.replace(MINUS, "-").replace("%", "").replace("+", "").replace(",", "").strip()
        half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9
        assert min(abs(float(digits) - value), abs(float(digits) - 100 * value)) <= half, (value, words)
        assert not words.startswith(("-", f"{MINUS}0.00", "+0.00"))


def test_the_page_needs_no_network_and_no_script(home):
    add_landscape(make_study(home))
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
    add_tables(home / "runs" / "toy")
    (home / "runs" / "toy" / "01_train_teacher" / "figures").mkdir()
    (home / "runs" / "toy" / "01_train_teacher" / "figures" / "curves.pdf").write_bytes(b"%PDF of another stage")
    page = report(home)
    folder = home / "reports" / "toy"
    links = [e.get("href") for e in page.all("a") if e.get("class") != "source"]
    assert "figures/04_distill_students_curves.pdf" in links
    for link in links:
        target = (
            page.root.find(f".//*[@id='{link[1:]}']") is not None if link.startswith("#") else (folder / link).is_file()
        )
        assert target, link


def test_names_from_outside_are_shown_as_text(home):
    runs = make_study(home, classes=[HOSTILE, "1"])
    add_tables(runs)
    for name in ("results.csv", "summary.csv", "measures.csv", "adapters.csv", "contrasts.csv"):
        folder = runs / ("04_distill_students" if name == "adapters.csv" else "05_evaluate")
        table = read_table(folder / name)
        renamed = "at_clustered_first_r2_cca" if name == "contrasts.csv" else "at_random_1"
        table = table.replace({"arm": {renamed: HOSTILE}, "strategy": {"random_1": f"random_{HOSTILE}"}})
        save_table(table, folder / name)
    save_table(pd.DataFrame([(HOSTILE, 1.0)], columns=["what", "seconds"]), runs / "02_profile_layers" / "timings.csv")
    partitions = read_table(runs / "03_cluster_layers" / "partitions.csv")
    save_table(partitions.assign(between=HOSTILE), runs / "03_cluster_layers" / "partitions.csv")
    save_json({HOSTILE: {"answer": HOSTILE, "short": HOSTILE}}, runs / "05_evaluate" / "landscape.json")
    columns = ["method", "strategy", "arm", "mean", "percentile", "percentile_low", "gain"]
    save_table(
        pd.DataFrame([("at", HOSTILE, HOSTILE)], columns=columns[:3]).reindex(columns=columns),
        runs / "05_evaluate" / "placement.csv",
    )
    points = json.loads((runs / "03_cluster_layers" / "hint_points.json").read_text())
    save_json(points | {HOSTILE: {"layers": [HOSTILE]}}, runs / "03_cluster_layers" / "hint_points.json")
    page = report(home)
    assert not page.all("script")
    assert [text(row).count(HOSTILE) for row in page.all("tr", data_arm=HOSTILE)] == [1] * 15
    assert text(page.all("tr", data_strategy=HOSTILE)[0]).count(HOSTILE) == 2  # strategy and layer
    assert HOSTILE in text(page.table("Setting"))
    for label in ("Cost of the selection", "Stability of the clusters", "Named choices among all subsets"):
        assert HOSTILE in text(page.table(label)), label
    assert text(page.section("landscape")).count(HOSTILE) == 2 and HOSTILE in text(page.section("answer"))


def figure_id(figure):
    return f"figure_{figure.stage[:2]}_{figure.name}"


@pytest.mark.parametrize("figure", FIGURES, ids=figure_id)
def test_every_figure_stands_in_the_section_that_it_belongs_to(home, figure):
    make_study(home)
    page = report(home)
    section = page.section(figure.section if figure.section != "comparisons" else "results")
    assert section.find(f".//figure[@id='{figure_id(figure)}']") is not None


def test_a_figure_that_is_missing_leaves_nothing_behind(home):
    runs = make_study(home)
    (runs / "03_cluster_layers" / "figures" / "clusters.png").unlink()
    (runs / "02_profile_layers" / "figures" / "similarity.pdf").unlink()
    page = report(home)
    found = [figure.get("id") for figure in page.all("figure")]
    assert found == [figure_id(figure) for figure in FIGURES if figure.name != "clusters"]
    assert len(set(found)) == len(page.all("img")) and "figures/similarity.pdf" not in page.source
    assert all(image.get("src") and image.get("alt") and int(image.get("width")) >= 40 for image in page.all("img"))


def test_without_figures_and_newer_tables_their_sections_are_left_out(home):
    runs = make_study(home, figures=False)
    for name in ("summary.csv", "contrasts.csv"):
        table = read_table(runs / "05_evaluate" / name)
        save_table(table.drop(columns=[*COMPARED, "comparisons"], errors="ignore"), runs / "05_evaluate" / name)
    page = report(home)
    assert not page.all("figure")
    headings = [section.get("aria-labelledby") for section in page.all("section")]
    assert headings == [
        *(
            "answer",
            "setting",
            "results",
            "hypotheses",
            "layers",
            "stability",
            "cost",
            "literature",
            "limits",
            "provenance",
        )
    ]
    assert "Holm" not in text(page.root) and "Certainty of every arm against KD" not in page.source


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
    save_table(contrast(results, MAIN), runs / "05_evaluate" / "contrasts.csv")
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
    assert answer in text(page.all("p", **{"class": "method"})[0])
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
    found = {(c.arm, c.control): c for c in contrast(results, MAIN, 0.9).itertuples()}
    wide = {arm: rows.sort_values("seed")["test_accuracy"].to_numpy() for arm, rows in results.groupby("arm")}
    controls = {
        "kd": wide["kd"],
        "stage_ends": wide["at_stage_ends"],
        "uniform": wide["at_uniform"],
        "random": (wide["at_random_0"] + wide["at_random_1"]) / 2,
    }
    assert len(found) == 3 * len(controls) + 1  # the main choice also against the first layers of its clusters
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
    found = {(c.arm, c.control): c for c in contrast(fewer, MAIN, 0.95).itertuples()}
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
    assert about.count("precision float32, memory_format contiguous_format, cpu_capability AVX2") == 1
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
    names = {figure.name if figure.name != "measures" else f"{figure.stage}_measures" for figure in FIGURES}
    assert figures == {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}


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
    save_table(contrast(results_of(runs), MAIN), runs / "05_evaluate" / "contrasts.csv")
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


def with_contrasts(home, runs, words, p_holm=math.nan, mean=0.01):
    """The main arm's contrasts, kd left out, as told: one word each, in the order of the controls."""
    path = runs / "05_evaluate" / "contrasts.csv"
    table = read_table(path)
    table = table[~table["control"].str.startswith("clustered_first")]
    rows = (table["arm"] == "at_clustered_r2_cca") & (table["control"] != "kd")
    table.loc[rows, "word"] = words
    table.loc[rows, "mean"] = [mean if word != "worse" else -mean for word in words]
    table.loc[rows, "p_holm"] = p_holm
    save_table(table, path)
    return report(home)


@pytest.mark.parametrize(
    ("words", "p_holm", "answer", "says"),
    [
        (["better"] * 3, 0.01, "better", "in favor of the method: taking hints from the clustered layers was better"),
        (["better"] * 3, 0.01, "better", "was better than every other choice"),
        (["better", "includes zero", "worse"], [0.01, 0.9, 0.2], "better", "better than some other choices"),
        (["worse"] * 3, 0.05, "worse", "layers was worse than every other choice"),
        (["worse", "includes zero", "better"], [0.01, 0.9, 0.2], "worse", "worse than some other choices"),
        (["better", "includes zero", "worse"], [0.01, 0.9, 0.02], "mixed", "both ways"),
        (["better", "includes zero", "worse"], [0.2, 0.9, 0.3], "uncorrected", "survives the correction"),
        (["includes zero"] * 3, 0.7, "open", "cannot tell the clustered layers"),
        (["unknown (one seed)"] * 3, math.nan, "one seed", "one seed gives no interval"),
        (["same layers"] * 3, math.nan, "same layers", "Nothing to compare"),
        (["worse", "includes zero", "includes zero"], math.nan, "worse", "worse than some other choices"),
    ],
)  # fmt: skip
def test_the_verdict_comes_first_and_follows_the_corrected_numbers(home, words, p_holm, answer, says):
    runs = make_study(home)
    page = with_contrasts(home, runs, words, p_holm)
    verdict = next(element for element in page.root.iter("p") if element.get("data-answer"))
    assert verdict.get("data-answer") == answer and says in text(verdict)
    row = page.table("The verdict in numbers").find(".//tr[@data-against='Other choices of layers']")
    compared = [word for word in words if word != "same layers"]
    counts = [len(compared)] + ([3 - len(compared)] if compared != words else [])
    counts += [3] if "unknown (one seed)" in words else []
    counts += [words.count(word) for word in ("better", "worse", "includes zero")]
    if not np.isnan(p_holm).all():
        kept = [word for word, p in zip(words, np.broadcast_to(p_holm, 3), strict=True) if p <= 0.05]
        counts += [kept.count("better"), kept.count("worse")]
    assert cells(row)[: len(counts)] == counts


def test_how_much_and_how_sure_are_medians_and_ranges_of_the_comparisons(home):
    runs = make_study(home, methods=("at", "fitnet"))
    add_certainty(runs)
    table = read_table(runs / "05_evaluate" / "contrasts.csv")
    own = table[
        table["arm"].str.endswith("clustered_r2_cca") & (table["family"] == "main") & (table["control"] != "kd")
    ]
    page = report(home)
    row = page.table("The verdict in numbers").find(".//tr[@data-against='Other choices of layers']")
    assert cells(row)[0] == len(own) == 8
    assert cells(row)[-3:] == [own["mean"].median(), own["mean"].min(), own["mean"].max()]
    told = next(p for p in page.all("p") if text(p).startswith("By how much?"))
    assert numbers(told)[:4] == [8, own["mean"].median(), own["mean"].min(), own["mean"].max()]
    assert numbers(told)[-1] == own["detectable"].median()
    hints = page.table("The verdict in numbers").find(".//tr[@data-against='No hints']")
    assert cells(hints)[0] == 2 and FAMILY in numbers(page.table("The verdict in numbers").find(".//caption"))


def test_choices_of_another_number_of_layers_are_no_other_choice_of_layers(home):
    runs = make_study(home)
    file = runs / "03_cluster_layers" / "hint_points.json"
    chosen = read_json(file)
    fewer = {"layers": chosen["random_0"]["layers"][:1]}
    save_json(chosen | {"random_0": fewer, "random_1": fewer}, file)
    table = report(home).table("The verdict in numbers")
    counts = {row.get("data-against"): cells(row)[0] for row in table.findall(".//tr[@data-against]")}
    assert counts == {"Other choices of layers": 3, "Another number of layers": 1, "No hints": 1}


def test_a_notebook_run_by_hand_names_its_run_and_source(home):
    runs = make_study(home, records=False)
    for number, stage in enumerate(STAGES):
        about = {"source": {"commit": f"{number}c" * 20, "dirty": False}, "versions": {}, "hardware": {}}
        save_json(about | {"runs": {"notebook": f"{number}e" * 16, "trained_at": {}}}, runs / stage / LAB_RECORD)
    page = report(home)
    row = next(row for row in page.all("tr") if row.get("data-stage") == "04_distill_students")
    assert "3e" * 16 in text(row) and ("3c" * 20)[:7] in text(row)


def test_hints_used_otherwise_are_no_other_choice_of_layers(home):
    runs = make_study(home)
    file = runs / "03_cluster_layers" / "hint_points.json"
    chosen = read_json(file)
    save_json(chosen | {"uniform": chosen["clustered_r2_cca"] | {"pairing": "reversed"}}, file)
    table = report(home).table("The verdict in numbers")
    counts = {row.get("data-against"): cells(row)[0] for row in table.findall(".//tr[@data-against]")}
    assert counts == {"Other choices of layers": 3, "The same layers, used otherwise": 1, "No hints": 1}


MANY = (
    "at",
    "fitnet",
    "vid",
    "sp",
    "cc",
    "rkd",
    "pkt",
    "nst",
    "crd",
    "ofd",
    "reviewkd",
    "ab",
    "ft",
    "wsld+at",
    "dkd+at",
)


def test_many_methods_are_folded_away_and_few_are_not(home):
    runs = make_study(home, methods=MANY, seeds=2)
    add_tables(runs)
    page = report(home)
    paragraphs = page.all("p", **{"class": "method"})
    folded = [p for details in page.all("details") for p in details.iter("p") if p.get("class") == "method"]
    assert len(paragraphs) == len(folded) == len(MANY) == 15
    make_study(home, methods=MANY[:3])
    page = report(home)
    assert len(page.all("p", **{"class": "method"})) == 3
    assert not [p for details in page.all("details") for p in details.iter("p") if p.get("class") == "method"]


def test_certainty_against_kd_stands_beside_every_arm(home):
    runs = make_study(home)
    add_certainty(runs)
    summary = read_table(runs / "05_evaluate" / "summary.csv").set_index("arm")
    rows = report(home).table("Certainty of every arm against KD").findall(".//tr[@data-arm]")
    assert {row.get("data-arm") for row in rows} == set(summary.index) - {"kd"}
    names = ["difference", "difference_low", "difference_high", "boot_low", "boot_high", "effect", "p", "p_holm"]
    for row in rows:
        assert numbers(row) == [float(summary.loc[row.get("data-arm"), name]) for name in [*names, "detectable"]]


def test_comparisons_one_by_one_hold_the_table_of_contrasts_in_full(home):
    runs = make_study(home)
    add_certainty(runs)
    table = read_table(runs / "05_evaluate" / "contrasts.csv")
    page = report(home)
    rows = page.table("Comparisons one by one").findall(".//tr[@data-arm]")
    assert len(rows) == len(table)
    expected = {(c.arm, c.control): c for c in table.itertuples()}
    names = ["n", "mean", "low", "high", "boot_low", "boot_high", "effect", "p", "p_holm", "detectable"]
    for row in rows:
        c = expected[row.get("data-arm"), row.get("data-control")]
        shown = names[:1] if c.word == "same layers" else names
        found = numbers(row)[1 if c.control == "random" else 0 :]  # without that of "mean of 2 draws"
        assert found == [float(getattr(c, name)) for name in shown] and text(row).endswith(c.word)
    families = [text(row) for row in page.table("Comparisons one by one").iter("tr") if row.get("class") == "family"]
    assert families == ["Main strategy", "Other clustered choices"]


def test_measures_stand_with_intervals_and_are_explained(home):
    runs = make_study(home)
    add_tables(runs)
    measures = read_table(runs / "05_evaluate" / "measures.csv").set_index(["arm", "measure"])
    page = report(home)
    rows = page.table("Measures beyond accuracy").findall(".//tr[@data-arm]")
    assert len(rows) == 9
    for row in rows:
        for cell in row.findall("td[@data-measure]"):
            own = measures.loc[row.get("data-arm"), cell.get("data-measure")]
            assert numbers(cell) == [own["mean"], own["low"], own["high"]]
    terms = page.section("measures").find(".//dl")
    assert [text(term) for term in terms.iter("dt")] == [heading for heading, *_ in MEASURES.values()]
    temperature = read_table(runs / "05_evaluate" / "results.csv")["temperature"]
    told = next(p for p in page.section("measures").iter("p") if "Temperatures" in text(p))
    assert numbers(told) == [temperature.min(), temperature.max()]
    teacher = page.table("Measures beyond accuracy").find(".//tbody/tr")
    assert set(numbers(teacher)) == {1, 0.971, 1.0, 0.91, 0.0765, 0.0213}


def test_a_measure_that_a_study_lacks_has_no_column(home):
    runs = make_study(home)
    add_tables(runs)
    measures = read_table(runs / "05_evaluate" / "measures.csv")
    measures.loc[measures["measure"] == "top5", ["mean", "low", "high"]] = math.nan
    save_table(measures[measures["measure"] != "kl"], runs / "05_evaluate" / "measures.csv")
    said = text(report(home).section("measures"))
    assert "Top-5" not in said and "KL" not in said and "NLL" in said


def test_costs_of_use_of_training_and_of_selection(home):
    runs = make_study(home)
    add_tables(runs)
    page = report(home)
    sizes = page.table("Size of the networks").findall(".//tr[@data-role]")
    assert [numbers(row) for row in sizes] == [[464154, 69_000_000], [5012, 800_000]]
    speed = page.table("Speed of the networks").findall(".//tr[@data-role]")
    assert numbers(speed[0]) == [1, 12.3456, 12.0, 13.0, 81.0, 7.654321]
    assert text(speed[1]).endswith("cpu, threads 2, float32")
    timings = read_table(runs / "04_distill_students" / "timings.csv")
    group = timings[timings["seed"] == 0]["arm"].nunique()
    total = timings.drop_duplicates(["seed", "epoch"])["seconds"].sum()
    rows = {row.get("data-arm"): row for row in page.table("Cost of training by arm").findall(".//tr[@data-arm]")}
    assert "at_clustered_linear_cka" not in rows and "unaided" not in rows and len(rows) == group
    adapters = read_table(runs / "04_distill_students" / "adapters.csv").set_index("arm")
    for arm, row in rows.items():
        own = adapters.loc[arm]
        assert numbers(row) == [own["adapter_parameters"], own["state_bytes"] / 1e6, pytest.approx(total / group / 5)]
    told = next(p for p in page.section("cost").iter("p") if "distilled students" in text(p))
    assert numbers(told) == [group * 5, pytest.approx(total), pytest.approx(total / group / 5)]
    rows = {
        row.get("data-what"): numbers(row) for row in page.table("Cost of the selection").findall(".//tr[@data-what]")
    }
    assert rows == {"profile": [1.25], "cluster": [0.5], "02_profile_layers": [13.5], "03_cluster_layers": [14.5]}
    told = next(p for p in page.section("cost").iter("p") if "Both notebooks" in text(p))
    assert numbers(told) == [pytest.approx((13.5 + 14.5) / total)]


def test_stability_says_how_often_and_how_far_the_choice_moves(home):
    runs = make_study(home)
    add_tables(runs)
    page = report(home)
    rows = page.table("Stability of the clusters").findall(".//tr[@data-between]")
    assert {row.get("data-between"): numbers(row) for row in rows} == {
        "random halves": [2, 0.75, 0.5, 1.0, 0.5, 2],
        "measures": [1, 0.75, 0.0, 1],
    }
    often = page.table("Layers that resamples chose").find(".//tr[@data-metric='r2_cca']")
    frequency = read_table(runs / "03_cluster_layers" / "stability.csv")["frequency"]
    assert numbers(often) == sorted(frequency[frequency > 0], reverse=True)


def test_a_landscape_is_placed_answered_and_folded(home):
    runs = make_study(home)
    add_landscape(runs)
    page = report(home)
    told = read_json(runs / "05_evaluate" / "landscape.json")["at"]
    assert told["answer"] in text(page.section("landscape")) and told["short"] in text(page.section("answer"))
    rows = {
        row.get("data-strategy"): row
        for row in page.table("Named choices among all subsets").findall(".//tr[@data-strategy]")
    }
    assert numbers(rows["uniform"]) == [0.635, 81.25, 25.0, 97.5, 0.01, 0.0, 0.02]
    assert numbers(rows["reversed"]) == [0.65, 90.0]
    assert rows["uniform"].get("data-runs") == " ".join(f"run-uniform-{seed}" for seed in range(5))
    main = {row.get("data-arm") for row in page.table("Accuracy of all arms").findall(".//tr[@data-arm]")}
    subsets = page.table("Accuracy of single layers and subsets").findall(".//tr[@data-arm]")
    assert len(subsets) == 22 and not main & {row.get("data-arm") for row in subsets} and "at_uniform" in main
    assert any(
        "Accuracy of single layers and subsets" in {e.get("aria-label") for e in d.iter()} for d in page.all("details")
    )


def test_the_answers_of_several_methods_are_all_told(home):
    runs = make_study(home, figures=False)
    save_json(
        {m: {"answer": "", "short": f"{m}: yes."} for m in ("at", "vid")}, runs / "05_evaluate" / "landscape.json"
    )
    assert "at: yes. vid: yes." in text(report(home).section("answer"))


def test_without_a_landscape_there_is_no_section_of_one(home):
    add_tables(make_study(home, figures=False))
    assert report(home).section("landscape") is None


def published(home, *, data="cifar100", teacher="resnet32", student="resnet8_w4", classes=100, **parameters):
    """The toy study as if it were of other data and networks; returns its page."""
    runs = make_study(home, classes=[str(i) for i in range(classes)])
    images = read_json(runs / "01_train_teacher" / "images.json")
    save_json(images | {"data": data}, runs / "01_train_teacher" / "images.json")
    baselines = read_table(runs / "01_train_teacher" / "baselines.csv").assign(network=[teacher, student])
    save_table(baselines, runs / "01_train_teacher" / "baselines.csv")
    save_json(TEACHER | {"network": teacher}, runs / "05_evaluate" / "teacher.json")
    record = read_json(runs / "04_distill_students" / "record.json")
    record["inputs"]["parameters"] |= parameters
    save_json(record, runs / "04_distill_students" / "record.json")
    return report(home)


def test_published_figures_stand_beside_ours_with_what_differs(home):
    page = published(home, teacher="resnet56", student="resnet20", schedule="fast", balance="gradient", temperature=4.0)
    summary = read_table(home / "runs" / "toy" / "05_evaluate" / "summary.csv").set_index("arm")["test_mean"]
    rows = page.table("Published accuracies beside ours").findall(".//tr[@data-method]")
    by_arm = {(row.get("data-method"), row.get("data-arm")): numbers(row) for row in rows}
    assert by_arm["teacher", "teacher"] == [0.7234, 0.6725, 1, 0.6725 - 0.7234]
    assert by_arm["kd", "kd"] == [0.7066, 5, summary["kd"], 5, summary["kd"] - 0.7066]
    assert by_arm["unaided", "unaided"][0] == 0.6906
    assert by_arm["fitnet", None] == [0.6921, 5]  # which this study did not try
    for arm in ("at_stage_ends", "at_clustered_r2_cca"):
        assert by_arm["at", arm] == [0.7055, 5, summary[arm], 5, summary[arm] - 0.7055]
    differs = {
        row.get("data-what"): [text(cell) for cell in row.iter("td")]
        for row in page.table("What differs from the benchmarks").findall(".//tr[@data-what]")
    }
    assert differs["Training images"] == ["50,000", "1,200"] and differs["Held-out validation images"] == ["0", "200"]
    assert differs["Epochs of a student"] == ["240", "3"] and differs["Schedule"] == ["paper", "fast"]
    assert differs["Weight of a hint"][1] == "set by its gradient" and differs["KD"][1].startswith("always")
    assert "Teacher" in differs and not {"Classes", "Runs averaged", "Temperature of KD"} & set(differs)
    links = [a.get("href") for a in page.section("literature").iter("a") if a.get("class") == "source"]
    assert links and set(links) <= {address for _, address in SOURCES.values()}


def test_accuracies_on_other_classes_are_not_subtracted(home):
    page = published(home, teacher="resnet56", student="resnet20", classes=15)
    rows = page.table("Published accuracies beside ours").findall(".//tr[@data-method='kd']")
    assert len(numbers(rows[0])) == 4  # published, runs, ours, n
    assert "Classes" in [row.get("data-what") for row in page.table("What differs from the benchmarks").iter("tr")]


@pytest.mark.parametrize(("data", "says"), [("digits", "nothing for digits"), ("cifar100", "nothing for the pair")])
def test_where_nothing_is_published_the_page_says_so_and_shows_no_numbers(home, data, says):
    section = published(home, data=data).section("literature")
    assert says in text(section) and not numbers(section) and not list(section.iter("table"))


def test_an_image_folder_of_a_thousand_classes_is_imagenet(home):
    page = published(home, data="image_folder", teacher="resnet34", student="resnet18", classes=1000)
    rows = page.table("Published accuracies beside ours").findall(".//tr[@data-method='kd']")
    assert len(rows) == 3 and len({text(row) for row in rows}) == 3  # three sources, each with its own figure


def test_the_published_table_is_of_networks_and_methods_that_this_library_knows():
    table = read_table(REPOSITORY / "pursuhint_lib" / TABLE)
    assert table["accuracy"].between(0.5, 0.85).all() and set(table["source"]) == set(SOURCES)
    assert not table.duplicated(["data", "teacher", "student", "method", "source"]).any()
    cifar = table[table["data"] == "cifar100"]
    assert set(cifar["teacher"]) | set(cifar["student"]) <= set(MODELS)
    names = {part for method in table["method"] for part in method.split("+")} - {"teacher", "unaided"}
    assert names <= {*METHODS, *LOGIT_LOSSES}
    pairs = table.groupby(["data", "teacher", "student"])["method"].agg(set)
    assert len(pairs) == 14 and all({"teacher", "unaided", "kd", "at"} <= methods for methods in pairs)
    one_teacher = cifar[cifar["method"] == "teacher"].groupby("teacher")["accuracy"].nunique()
    assert (one_teacher == 1).all()


def test_limits_are_worked_out_from_the_study(home):
    runs = make_study(home)
    add_tables(runs)
    save_table(pd.DataFrame({"model": ["teacher_1", "teacher_2"]}), runs / "01_train_teacher" / "other_teachers.csv")
    table = read_table(runs / "05_evaluate" / "contrasts.csv")
    compared = table[table["word"] != "same layers"]
    limits = {text(item.find("strong")): item for item in report(home).section("limits").iter("li")}
    assert numbers(limits["Seeds."]) == [5]
    assert numbers(limits["Bootstrap of few seeds."]) == [5, 15 / 16]
    assert numbers(limits["One teacher"]) == [2]
    assert numbers(limits["Many comparisons."]) == [len(compared), pytest.approx(0.05 * len(compared))]
    assert numbers(limits["“Includes zero” is no proof of equality:"]) == [compared["detectable"].median()]


def test_rows_name_the_runs_and_the_commit_behind_them(home):
    make_study(home)
    page = report(home)
    row = page.table("Accuracy of all arms").find(".//tr[@data-arm='at_clustered_linear_cka']")
    assert row.get("data-runs") == " ".join(f"run-uniform-{seed}" for seed in range(5))  # of its twin
    assert row.get("data-commit") == f"abcdef0+ {('3c' * 20)[:7]}"
    students = page.table("Results and run ids by arm and seed").findall(".//tr[@data-arm='at_uniform']")
    assert [text(row).endswith("abcdef0+") for row in students] == [True] + [False] * 4
    table = pd.read_csv(home / "reports" / "toy" / "tables" / "provenance.csv").set_index("network")
    assert table.loc["at_uniform-s0", "commit"] == "abcdef0" * 5 and table.loc["at_uniform-s1", "commit"] == "3c" * 20
    target = page.root.find(f".//tr[@id='{row.find('.//a').get('href')[1:]}']")
    assert target.get("data-arm") == "at_clustered_linear_cka" and target.get("data-seed") == "0"
    assert not page.table("Accuracy of all arms").find(".//tr[@data-arm='kd']").get("data-runs")  # not recorded


def test_a_comparison_names_the_runs_of_both_sides(home):
    runs = make_study(home)
    add_certainty(runs)
    rows = report(home).table("Comparisons one by one").findall(".//tr[@data-arm='at_clustered_r2_cca']")
    behind = {row.get("data-control"): set(row.get("data-runs").split()) for row in rows}
    own = {f"run-clustered_r2_cca-{seed}" for seed in range(5)}
    assert behind["uniform"] == own | {f"run-uniform-{seed}" for seed in range(5)}
    assert behind["random"] == own | {f"run-random_{draw}-{seed}" for draw in (0, 1) for seed in range(5)}


def test_a_model_card_is_linked_once_a_student_was_exported(home):
    make_study(home)
    assert MODEL_CARD not in report(home).source
    card = home / "reports" / "toy" / MODEL_CARD
    card.parent.mkdir()
    card.write_text("# A student")
    assert [e for e in report(home).all("a") if e.get("href") == MODEL_CARD]


def test_a_deleted_report_is_rebuilt_from_tables_alone(home):
    runs = make_study(home)
    add_tables(runs)
    before = write_report("toy").read_bytes()
    shutil.rmtree(home / "reports")
    assert not list(runs.rglob("*.safetensors"))
    assert write_report("toy").read_bytes() == before


def test_the_templates_are_packed_with_the_library():
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["pursuhint_lib"]
    library = REPOSITORY / "pursuhint_lib"
    needed = [path.name for path in library.glob("*.j2")] + [TABLE]
    assert TEMPLATE in needed and len(needed) > 5
    for name in needed:
        assert (library / name).is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
