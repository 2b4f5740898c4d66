"""pyproject.toml, requirements.lock, environment.yml, the Makefile and continuous integration say the same."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pursuhint_lib.grid import _grid_lock
from pursuhint_lib.status import study_lock
from tools import clean, setup_venv

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


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run make with nothing inherited from a make that runs this test; `ready` counts as done (-o)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-o", "ready", *arguments]
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)


def makefile_targets() -> list[str]:
    (phony,) = re.findall(r"(?m)^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"))
    return [target for target in phony.split() if target != "ready"]


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_make_help_explains_every_target_and_is_the_default(arguments):
    shown = make(*arguments).stdout
    for target in makefile_targets():
        assert re.search(rf"(?m)^  make {target} +\S+", shown), f"make help does not explain {target}"
    assert set(makefile_targets()) >= {"reproduce", "test", "lab", "ui", "bench", "strip", "lock", "clean"}


@pytest.fixture
def clone(tmp_path):
    """A folder with the Makefile and a Python that does nothing but say with what it was started; its name is odd."""
    folder = tmp_path / "a $(touch x) `touch x` clone"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    say = "import os, sys; print(sys.argv[1:], os.environ, os.getppid(), sep='\\n')"
    python.write_text(f"#!/usr/bin/env python3\n{say}\n")
    python.chmod(0o755)
    shutil.copyfile(ROOT / "Makefile", folder / "Makefile")
    return folder


def started(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The command line of Python that make gives."""
    done = make(*arguments, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[0])


def test_make_reproduce_hands_over_study_force_and_data(clone):
    plain = started(clone, "reproduce")
    assert plain[:3] == ["-m", "pursuhint_lib.pipeline", "reproduce"] and plain[-2:] == ["--", "digits"]
    assert "--force" not in plain
    chosen = started(clone, "reproduce", "STUDY=cifar100_quick", "FORCE=1")
    assert "--force" in chosen and chosen[-1] == "cifar100_quick"
    assert started(clone, "reproduce", STUDY="other") == plain, "a stray environment variable chose the study"


def test_make_reproduce_hands_over_a_grid_and_refuses_to_force_one(clone):
    shown = started(clone, "reproduce", "GRID=digits_pairs", "JOBS=2")
    assert shown[1] == "pursuhint_lib.grid" and "--jobs=2" in shown and shown[-1] == "digits_pairs"
    assert "--jobs=" in started(clone, "reproduce", "GRID=digits_pairs"), "empty: not given"
    forced = make("reproduce", "GRID=digits_pairs", "FORCE=1")
    assert forced.returncode != 0 and forced.stderr.startswith("FORCE=1 is for one study")
    both = make("reproduce", "GRID=digits_pairs", "STUDY=digits")
    assert both.returncode != 0 and both.stderr.startswith("STUDY or GRID: name one of them")


HOSTILE = """$(touch x)$$(touch x)$(shell touch x)`touch x`"; touch x; '; touch x; $HOME \\n * --help"""


@pytest.mark.parametrize(
    ("name", "target", "seen"),
    [
        ("STUDY", "reproduce", "{}"),
        ("STUDY", "export", "{}"),
        ("STUDY", "figures", "{}"),
        ("GRID", "reproduce", "{}"),
        ("EXECUTOR", "reproduce", "--executor={}"),
        ("JOBS", "reproduce", "--jobs={}"),
        ("JOB_CORES", "reproduce", "--cores={}"),
        ("JOB_GPUS", "reproduce", "--gpus={}"),
        ("SLURM", "reproduce", "--slurm={}"),
        ("ARM", "export", "--arm={}"),
        ("SEED", "export", "--seed={}"),
    ],
)
def test_what_is_given_to_make_reaches_python_to_the_letter_and_executes_nothing(clone, name, target, seen):
    assert seen.format(HOSTILE) in started(clone, target, f"{name}={HOSTILE}")
    assert seen.format("--help") in started(clone, target, f"{name}=--help")[3 if seen == "{}" else 0 :]
    assert not list(clone.rglob("x"))


@pytest.mark.parametrize("target", ["reproduce", "strip", "lab", "clean"])
def test_what_a_recipe_reads_itself_and_its_folder_are_not_executed_either(clone, target):
    make(
        target, *(f"{name}={HOSTILE}" for name in ("FORCE", "DATA", "NOTEBOOKS", "PYTHON", "PYTHONS", "RUN")), cwd=clone
    )
    assert not list(clone.rglob("x"))


def test_args_are_read_as_the_end_of_a_command_line(clone):
    """By a shell, with all that it does: quotes would mean nothing else."""
    assert started(clone, "test", """ARGS=-k 'a or b' "$(echo c)" """)[-3:] == ["-k", "a or b", "c"]


def test_a_python_may_lie_in_a_folder_of_any_name(clone):
    python = clone / ".venv" / "bin" / "python"
    done = make("clean", f"PYTHON={python}", cwd=clone)
    assert done.returncode == 0 and "['tools/clean.py']" in done.stdout.splitlines(), done.stderr


def test_a_study_is_told_to_end_with_its_make(clone):
    for arguments in ([], ["GRID=digits_pairs"]):
        _, environment, parent = make("reproduce", *arguments, cwd=clone).stdout.splitlines()
        assert f"'PURSUHINT_PARENT': '{parent}'" in environment


@pytest.mark.parametrize(
    ("given", "seen"), [("/some where/else", "/some where/else"), ("pictures", f"{ROOT}/pictures"), ("~/in", "~/in")]
)
def test_a_data_folder_reaches_the_commands_whole_and_absolute(given, seen):
    show = "--eval=show: ; @printenv PURSUHINT_DATA"
    assert make(show, "show", f"DATA={given}").stdout.rstrip("\n") == seen


def test_commands_run_without_telemetry_and_without_what_another_project_asks_of_python():
    show = (
        "--eval=show: ; @printenv MLFLOW_DISABLE_TELEMETRY DO_NOT_TRACK PYTHONUTF8; printenv PYTHONPATH PYTHONWARNINGS"
    )
    shown = make(show, "show", PYTHONPATH="/elsewhere", PYTHONWARNINGS="error", PYTHONUTF8="0").stdout.split()
    assert shown == ["true", "true", "1"]


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


def test_a_venv_that_was_copied_to_another_folder_is_whole_there_and_untouched_here(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there, with spaces"  # which the first line of a script may not hold
    venv.create(here / ".venv", symlinks=True)
    of_here = here / ".venv" / "bin" / "python"
    (here / ".venv" / "bin" / "tool").write_text(f"#!{of_here}\nimport sys; print(sys.prefix)\n")
    (here / ".venv" / "bin" / "tool").chmod(0o755)
    kernel = here / ".venv" / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": [str(of_here), "-m", "ipykernel_launcher"]}))
    (here / "requirements.lock").write_text("torch==2.15.0\n")
    set_up = []
    monkeypatch.setattr(setup_venv, "build", lambda *_, **__: set_up.append("built anew"))
    monkeypatch.setattr(setup_venv, "run", lambda command, *_: set_up.append("linked"))

    def set_up_in(folder):
        for name, path in {"ROOT": "", "LOCK": "requirements.lock", "VENV": ".venv"}.items():
            monkeypatch.setattr(setup_venv, name, folder / path)
        monkeypatch.setattr(setup_venv, "PYTHON", folder / ".venv" / "bin" / "python")
        monkeypatch.setattr(setup_venv, "STAMP", folder / ".venv" / ".ready")
        setup_venv.main()

    set_up_in(here)
    files = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    shutil.copytree(here, there, symlinks=True, copy_function=os.link)
    set_up_in(there)
    assert set_up == ["built anew", "linked", "linked"] and setup_venv.ready()
    assert {path: path.read_bytes() for path in files} == files, "the copy was made of hard links"
    named = [path for path in there.rglob("*") if path.is_file() and bytes(here / ".venv") in path.read_bytes()]
    assert named == []
    tool = subprocess.run([there / ".venv" / "bin" / "tool"], capture_output=True, text=True)
    assert tool.stdout == f"{there / '.venv'}\n", tool.stderr


def test_make_clean_takes_a_folder_in_the_place_of_a_lock_away_too(tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "ROOT", tmp_path)
    (tmp_path / "runs" / "odd" / ".lock").mkdir(parents=True)
    clean.clean()
    assert not (tmp_path / "runs").exists()


def test_make_clean_removes_what_running_made_but_nothing_while_a_study_or_a_grid_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "ROOT", tmp_path)
    monkeypatch.setenv("PURSUHINT_HOME", str(tmp_path))
    kept = [tmp_path / "data" / "image.png", tmp_path / "reports" / "toy" / "report.html"]
    made = [tmp_path / name for name in ("mlflow.db", "mlflow.db-wal", "mlartifacts/a", "tests/x/__pycache__/y.pyc")]
    for path in [*kept, *made]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for lock in (study_lock("toy"), _grid_lock("toys")):
        with lock, pytest.raises(SystemExit, match=r"^runs/(toy|grids/toys)/ is in use: .*$"):
            clean.clean()
        assert all(path.exists() for path in [*kept, *made])
    clean.clean()
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept) and not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_read_or_written_ends_set_up_with_one_line(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_venv.py", tmp_path / "tools")
    done = subprocess.run([sys.executable, "tools/setup_venv.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Set-up stopped: [Errno 2]") and "requirements.lock" in done.stderr


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
