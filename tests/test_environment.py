"""pyproject.toml, requirements.lock, environment.yml, the Makefile and continuous integration say the same."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import setup_venv

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
CORE = [
    "torch",
    "torchvision",
    "jupyterlab",
    "papermill",
    "scikit-learn",
    "pandas",
    "matplotlib",
    "mlflow",
    "numpy",
    "scipy",
    "pydantic",
    "pytest",
]
# torch and torchvision are compiled for each other: torchvision's minor version is torch's plus this.
TORCHVISION_AHEAD = 14
URL_OR_PATH = re.compile(r"://|--(?:extra-)?index|--find-links|file:|\bgit\+|(?<![\w.])/[a-z]+/", re.IGNORECASE)


def locked_blocks() -> list[str]:
    """The lock cut into one text per pin: the pin, its hashes, its comments."""
    return re.split(r"(?m)^(?=[A-Za-z0-9])", LOCK)[1:]


def locked() -> list[Requirement]:
    return [Requirement(block.split("\\\n")[0].strip()) for block in locked_blocks()]


def pinned_version(requirement: Requirement) -> Version:
    (only,) = requirement.specifier
    assert only.operator == "==", f"{requirement} is not pinned"
    return Version(only.version)


def declared() -> list[Requirement]:
    """What pyproject.toml asks of the lock: the dependencies, the extras that `make lock` compiles, and what the
    editable install builds with.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    locked_extras = re.findall(r"--extra (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert "test" in locked_extras
    extras = [line for name in locked_extras for line in project["project"]["optional-dependencies"][name]]
    return [
        Requirement(line) for line in project["project"]["dependencies"] + extras + project["build-system"]["requires"]
    ]


def pins_on(python: str, platform: str) -> dict[str, Version]:
    """Name -> version that the lock gives on one Python and platform."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_machine": "x86_64" if platform == "linux" else "arm64",
        "os_name": "posix",
    }
    found: dict[str, Version] = {}
    for requirement in locked():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"two pins of {name} apply on Python {python}, {platform}"
            found[name] = pinned_version(requirement)
    return found


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_satisfies_every_range_of_pyproject(python, platform):
    pins = pins_on(python, platform)
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is declared, but the lock has no pin for it: run make lock"
        assert requirement.specifier.contains(pins[name]), f"{requirement} is declared, {pins[name]} is locked"


def test_the_lock_holds_the_core_stack_and_a_matching_pair_of_torch_and_torchvision():
    pins = pins_on("3.11", "linux")
    assert set(CORE) <= set(pins)
    assert pins["torch"] >= Version("2.11")
    assert pins["torchvision"].minor == pins["torch"].minor + TORCHVISION_AHEAD
    assert pins["mlflow"] < Version("3.18"), "mlflow 3.18.0 pinned packages that were not published"
    assert pins["mlflow"] == pins["mlflow-skinny"] == pins["mlflow-tracing"]


def test_every_pin_of_the_lock_has_hashes():
    without = [block.split()[0] for block in locked_blocks() if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", block)]
    assert len(locked_blocks()) > 150
    assert without == []


@pytest.mark.parametrize("name", ["requirements.lock", "environment.yml", "pyproject.toml"])
def test_no_index_host_or_machine_path_is_written_down(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if URL_OR_PATH.search(line)] == []


def test_environment_yml_holds_exactly_the_pins_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (by_pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(map(str, map(Requirement, by_pip))) == sorted(map(str, locked())), "run make lock"
    assert "pip" in conda
    assert "python=3.11" in conda


def test_the_packages_installed_here_are_the_locked_ones():
    from importlib.metadata import version

    pins = pins_on(".".join(map(str, sys.version_info[:2])), sys.platform)
    assert {name: version(name).split("+")[0] for name in CORE} == {name: str(pins[name]) for name in CORE}


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make with nothing inherited from a make that runs this test; `ready` counts as done (-o)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-o", "ready", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)


def makefile_targets() -> list[str]:
    (phony,) = re.findall(r"(?m)^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"))
    return [target for target in phony.split() if target != "ready"]


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_make_help_explains_every_target_and_is_the_default(arguments):
    shown = make(*arguments).stdout
    for target in makefile_targets():
        assert re.search(rf"(?m)^  make {target} +\S+", shown), f"make help does not explain {target}"
    assert set(makefile_targets()) >= {"reproduce", "test", "lab", "ui", "bench", "strip", "lock", "clean"}


def test_make_reproduce_hands_over_study_force_and_data():
    plain = make("-n", "reproduce").stdout
    assert 'pursuhint_lib.pipeline reproduce "digits"' in plain
    assert "--force" not in plain
    chosen = make("-n", "reproduce", "STUDY=cifar100_quick", "FORCE=1").stdout
    assert 'pursuhint_lib.pipeline reproduce "cifar100_quick" --force' in chosen
    assert make("-n", "reproduce", STUDY="other").stdout == plain, "a stray environment variable chose the study"


def test_make_reproduce_hands_over_a_grid_and_refuses_to_force_one():
    shown = make("-n", "reproduce", "GRID=digits_pairs", "JOBS=2").stdout
    assert 'pursuhint_lib.grid reproduce "digits_pairs" --jobs="2"' in shown and "pipeline" not in shown
    assert "--jobs" not in make("-n", "reproduce", "GRID=digits_pairs").stdout
    forced = make("reproduce", "GRID=digits_pairs", "FORCE=1")
    assert forced.returncode != 0 and forced.stderr.startswith("FORCE=1 is for one study")
    both = make("reproduce", "GRID=digits_pairs", "STUDY=digits")
    assert both.returncode != 0 and both.stderr.startswith("STUDY or GRID: name one of them")


def test_options_of_sbatch_reach_the_commands_as_they_were_given():
    options = """comment="a b" constraint='x&y' time=3 name=`whoami`"""
    show = "--eval=show: ; @printf '%s' --slurm=\"$$SLURM\""
    assert make(show, "show", f"SLURM={options}").stdout == f"--slurm={options}"
    assert '--slurm="$SLURM"' in make("-n", "reproduce", "EXECUTOR=slurm", f"SLURM={options}").stdout


@pytest.mark.parametrize(
    ("given", "seen"), [("/some where/else", "/some where/else"), ("pictures", f"{ROOT}/pictures"), ("~/in", "~/in")]
)
def test_a_data_folder_reaches_the_commands_whole_and_absolute(given, seen):
    show = "--eval=show: ; @printenv PURSUHINT_DATA"
    assert make(show, "show", f"DATA={given}").stdout.rstrip("\n") == seen


def test_commands_run_without_telemetry_and_without_a_foreign_python_path():
    show = "--eval=show: ; @printenv MLFLOW_DISABLE_TELEMETRY DO_NOT_TRACK; printenv PYTHONPATH || echo unset"
    assert make(show, "show", PYTHONPATH="/elsewhere").stdout.split() == ["true", "true", "unset"]


def test_a_venv_counts_as_ready_only_when_complete_for_this_lock_and_this_folder(tmp_path, monkeypatch):
    python, stamp, lock = tmp_path / "python", tmp_path / ".ready", tmp_path / "requirements.lock"
    for name, path in {"PYTHON": python, "STAMP": stamp, "LOCK": lock}.items():
        monkeypatch.setattr(setup_venv, name, path)
    lock.write_text("torch==2.15.0\n")
    python.touch()
    assert not setup_venv.ready(), "interrupted: the stamp comes last"
    complete = "\n".join(setup_venv.stamp_now()) + "\n"
    stamp.write_text(complete)
    assert setup_venv.ready()
    stamp.write_text(complete[:30])
    assert not setup_venv.ready(), "the stamp itself was cut short"
    stamp.write_text(f"{setup_venv.stamp_now()[0]}\n/another/folder\n")
    assert not setup_venv.ready(), "the folder was moved or copied"
    stamp.write_text(complete)
    lock.write_text("torch==2.16.0\n")
    assert not setup_venv.ready(), "the lock has changed"
    lock.write_text("torch==2.15.0\n")
    python.unlink()
    assert not setup_venv.ready(), "the Python that it was made with is gone"


def test_an_unusable_python_ends_set_up_with_one_clear_line():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "ready", "PYTHON=no-such-python"], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    first, *rest = done.stderr.splitlines()
    assert done.returncode != 0
    assert "3.11" in first and "no-such-python" in first and "PYTHON=" in first
    assert all(line.startswith("make") for line in rest)


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert "make test" in lines
