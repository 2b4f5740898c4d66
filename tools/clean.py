"""`make clean`: remove what running made, but nothing while a study or a grid is at work. Standard library only."""

import contextlib
import fcntl
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = ["runs", "mlflow.db*", "mlartifacts", "build", "*.egg-info", ".pytest_cache", ".ruff_cache"]
MADE += ["notebooks/.ipynb_checkpoints", "pursuhint_lib/**/__pycache__", "tests/**/__pycache__", "tools/__pycache__"]


def clean() -> None:
    """Raises SystemExit, one line, when a lock of a study or a grid is held, and OSError."""
    with contextlib.ExitStack() as held:  # all locks to the end, so that nothing begins meanwhile
        for path in filter(Path.is_file, [*ROOT.glob("runs/*/.lock"), *ROOT.glob("runs/grids/*/.lock")]):
            try:
                fcntl.flock(held.enter_context(open(path)), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"{path.parent.relative_to(ROOT)}/ is in use: make clean removes nothing while a study runs")
        for path in [path for pattern in MADE for path in ROOT.glob(pattern)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


if __name__ == "__main__":
    try:
        clean()
    except OSError as error:
        sys.exit(f"make clean stopped: {error}")
    print("Removed runs/, mlflow.db, mlartifacts/ and caches. Kept .venv, data/ and reports/.")
