"""Which code, versions and machine made a result.

What is said here goes into stage records and MLflow tags. Records may be published, so nothing here names a path, a
user or a host.
"""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pursuhint_lib.storage import REPOSITORY

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "matplotlib",
    "mlflow",
    "papermill",
    "ipykernel",
)


def source_state(repository: Path = REPOSITORY) -> dict[str, Any]:
    """``{"commit": hex or "unknown", "dirty": bool or None}`` of the checkout.

    Dirty means: tracked files changed or new files not ignored. ``reports/`` is left out, because a study writes there.
    A folder that is not the top of a git checkout (an unpacked archive, say inside some other checkout) is "unknown".
    """
    top, commit = _git(repository, "rev-parse", "--show-toplevel"), _git(repository, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != Path(repository).resolve():
        return {"commit": "unknown", "dirty": None}
    changes = _git(repository, "status", "--porcelain", "--", ".", ":(exclude)reports")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None when there is no git, no checkout or no commit."""
    # Another user's folder, at which git would not look otherwise, is trusted: its code runs at this moment.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # looking must never make someone else's git command fail
    try:
        done = subprocess.run(
            ["git", "-c", f"safe.directory={Path(folder).resolve()}", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def versions() -> dict[str, str]:
    """Version of Python and of the packages that shape a result, read without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """``{"cpu": model, "cores": usable, "memory_gb": total, "gpu": [names], "system": name}``."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory_limit() / 2**30, 1),
        "gpu": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return _printed(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Names of NVIDIA GPUs, asked of the driver: importing torch for it would take seconds."""
    return [line.strip() for line in _printed(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()]


def _printed(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
