"""A published figure can be drawn again from the published tables, and is the same."""

import importlib.metadata
import json

import pytest

from pursuhint_lib.drawings import PICTURES, main, redraw
from pursuhint_lib.storage import REPOSITORY

STUDIES = ("digits", "cifar100_resnet32_resnet8")


def same_matplotlib(study):
    records = json.loads((REPOSITORY / "reports" / study / "records.json").read_text(encoding="utf-8"))
    return {record["versions"]["matplotlib"] for record in records.values()} == {
        importlib.metadata.version("matplotlib")
    }


@pytest.mark.parametrize("study", STUDIES)
def test_every_published_figure_is_drawn_again_from_its_tables_byte_for_byte(study, tmp_path):
    if not same_matplotlib(study):
        pytest.skip("another matplotlib draws other bytes")
    reports = REPOSITORY / "reports" / study
    drawn = {path.name: path.read_bytes() for path in redraw(reports, tmp_path)}
    published = {path.name: path.read_bytes() for path in (reports / "figures").glob("*.png")}
    assert published.keys() == drawn.keys() and not {path.split(".")[0] for path in published} & set(PICTURES)
    assert [name for name in drawn if drawn[name] != published[name]] == []


def test_a_study_that_is_not_published_is_refused_in_one_line(home, capsys):
    assert main(["nothing"]) == 1
    assert capsys.readouterr().err == "no study 'nothing': reports/ holds none\n"


def test_a_table_that_is_gone_is_named(home, capsys):
    folder = home / "reports" / "cut"
    folder.mkdir(parents=True)
    (folder / "records.json").write_text("{}")
    assert main(["cut"]) == 1
    assert "layers_teacher.csv" in capsys.readouterr().err
