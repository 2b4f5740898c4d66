"""The five notebooks are stored without outputs and without traces of the machine that ran them (`make strip`)."""

import os
import subprocess
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def traces(notebook: nbformat.NotebookNode) -> list[str]:
    """What running left in a notebook, one line each; an empty list when it is stripped."""
    found = [f"metadata.{key}" for key in ("papermill", "language_info", "widgets") if key in notebook.metadata]
    for number, cell in enumerate(notebook.cells):
        found += [f"cell {number}: {key}" for key in ("papermill", "execution", "collapsed") if key in cell.metadata]
        if cell.cell_type == "code":
            found += [f"cell {number}: outputs"] * bool(cell.outputs)
            found += [f"cell {number}: execution_count"] * (cell.execution_count is not None)
    return found


def test_there_are_five_notebooks_in_order():
    names = ["01_train_teacher", "02_profile_layers", "03_cluster_layers", "04_distill_students", "05_evaluate"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_valid_and_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert traces(notebook) == [], "run make strip"
    assert notebook.metadata.kernelspec.name == "python3", "without a kernel name JupyterLab asks for one on opening"


def test_make_strip_removes_what_running_left_and_keeps_the_parameters_tag(tmp_path):
    cell = nbformat.v4.new_code_cell("seed = 0", execution_count=3)
    cell.metadata.update(tags=["parameters"], papermill={"status": "completed"}, execution={"iopub.execute_input": "t"})
    cell.outputs = [nbformat.v4.new_output("stream", text="done")]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata.update(papermill={"duration": 1.0}, language_info={"name": "python", "version": "3.11.0"})
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "dirty.ipynb"
    nbformat.write(notebook, path)
    assert len(traces(nbformat.read(path, as_version=4))) == 6

    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-o", "ready", "strip", f"NOTEBOOKS={path}"]
    subprocess.run(command, cwd=ROOT, env=clean, check=True, capture_output=True)
    stripped = nbformat.read(path, as_version=4)
    assert traces(stripped) == []
    assert stripped.cells[0].source == "seed = 0"
    assert stripped.cells[0].metadata.tags == ["parameters"]
    assert stripped.metadata.kernelspec.name == "python3"
