"""Shared by all tests: quiet MLflow, one thread (tiny tensors), a home of its own for everything a test writes."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


LONGEST = ["test_notebooks.py", "test_imagenet_study.py", "test_parallel.py", "test_grid.py"]


def pytest_collection_modifyitems(items):
    """The longest files first, so that `make test` does not wait for one of them at its end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder in place of the repository for runs/, reports/, data/ and mlflow.db."""
    monkeypatch.setenv("PURSUHINT_HOME", str(tmp_path))
    monkeypatch.delenv("PURSUHINT_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path
