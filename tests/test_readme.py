"""What README says can be done can be done, and its numbers are those of the reports."""

import re
import subprocess
import sys

import pytest
import torch

from pursuhint_lib.arms import parse_method
from pursuhint_lib.data import Batch, Batches, ImageSet
from pursuhint_lib.grid import grid_file, read_grid
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import build_model, state_hash
from pursuhint_lib.params import load_params
from pursuhint_lib.storage import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
import readme as readme_tool

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_first_minute_gives_hint_points_then_a_student_and_leaves_the_model_as_it_was():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines, distil = (block for block in blocks if "mlflow" not in block)  # that one is for `make ui`
    torch.manual_seed(0)
    model = build_model("resnet20", 10)
    batches = [Batch(torch.randn(40, 3, 16, 16), torch.zeros(40), torch.arange(40)) for _ in range(3)]
    teacher_before, was_training = state_hash(model), model.training
    names = {"model": model, "batches": batches}
    exec(lines, names)
    assert len(names["hints"].hint_points_) == 3 and set(names["hints"].hint_points_) <= set(
        dict(model.named_modules())
    )
    assert state_hash(model) == teacher_before and model.training == was_training
    assert not any(module._forward_hooks for module in model.modules())

    student = build_model("resnet8", 10)
    before = state_hash(student)
    images = ImageSet(torch.randint(256, (50, 3, 16, 16), dtype=torch.uint8), torch.arange(50) % 10, list("abcdefghij"))
    batches = Batches(images, 25, mean=[0.5] * 3, std=[0.25] * 3, shuffle=True)
    names |= {"student": student, "batches": batches, "image_shape": (3, 16, 16)}
    exec(distil.replace("epochs=30", "epochs=2"), names)
    history = names["history"]
    assert history["status"].tolist() == ["trained"] * 2 and history["at"].notna().all()
    assert state_hash(student) != before and state_hash(model) == teacher_before


def test_every_method_is_named():
    for name in [*METHODS, *(name for name in LOGIT_LOSSES if not name.endswith("_std"))]:
        assert f"`{name}`" in README, name
    for written in ("wsld+at", "dkd", "at+crd@last"):
        assert f"`{written}`" in README and parse_method(written)


def test_every_make_target_that_is_named_exists():
    known = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", README, re.MULTILINE))
    assert {"reproduce", "test", "lab", "ui"} <= targets
    for target in targets:
        assert re.search(rf"^  make {target} ", known, re.MULTILINE), target


def test_the_parameter_file_for_images_of_ones_own_is_accepted(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(text)
    params = load_params(tmp_path / "mine.yaml")
    assert params["01_train_teacher"].teacher_epochs == params["04_distill_students"].epochs == 60
    assert len(text.splitlines()) <= 10


def test_files_and_studies_that_are_named_exist():
    for name in re.findall(r"`(\d\d_[a-z_]+)`", README):
        assert (REPOSITORY / "notebooks" / f"{name}.ipynb").exists()
    grids = [read_grid(grid_file(grid)) for grid in re.findall(r"GRID=(\w+)", README)]
    of_grids = [study.name for grid in grids for study in grid.studies]
    for study in re.findall(r"STUDY=([\w-]+)", README):
        assert study in ("name", "mine", *of_grids) or (REPOSITORY / "params" / f"{study}.yaml").exists()


def reports_are_those_of_record():
    """Whether reports/ is as it was committed: a study that was run here since may well have other numbers."""
    git = ["git", "status", "--porcelain", *(f"reports/{study}/tables" for study in readme_tool.STUDIES)]
    try:
        found = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return found.returncode == 0 and not found.stdout


@pytest.mark.skipif(not reports_are_those_of_record(), reason="reports/ were made again here, or there is no git")
def test_the_table_of_results_is_that_of_the_reports():
    assert readme_tool.BEGIN + readme_tool.results() + readme_tool.END in README, "run make readme"
    rows = readme_tool.results_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(readme_tool.STUDIES)
