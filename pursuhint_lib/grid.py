"""Many studies from one file, several at a time.

    python -m pursuhint_lib.grid reproduce GRID [--jobs N] [--executor ...]  run what is not there yet, stack the tables
    python -m pursuhint_lib.grid status GRID                                 where each study stands; runs nothing

``params/grids/GRID.yaml`` names a study of params/ and what varies: keys as in a study file, ``section.key``, each with
a list of values. Keys that vary together stand in one, and their values are lists::

    base: digits
    vary:
      common.teacher, common.student: [[resnet32, resnet8_w4], [resnet20, resnet8_w2]]
      distill_students.temperature: [2.0, 4.0]

Every combination is a study of its own, GRID-VALUE-VALUE..., with a study file below ``runs/grids/GRID/params/``. Each
runs as a child process, the command line of `pipeline`, which keeps what it has finished; so the driver here may be
stopped or killed at any time, and goes on from there. Here a grid's studies are its jobs; under Slurm each of them has
its own work done by jobs, see `fanout`.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import yaml

from pursuhint_lib.command import run_command
from pursuhint_lib.deaths import oom_kills, way_of_death
from pursuhint_lib.fanout import FanOut, add_options, visible_gpus, whole_number
from pursuhint_lib.live import LiveLine, stage_line, study_seconds_left
from pursuhint_lib.params import (
    PARAMS_FOLDER,
    SECTIONS,
    ParameterError,
    load_params,
    nearest,
    params_of,
    read_sections,
    read_yaml,
    section_keys,
)
from pursuhint_lib.pipeline import Sources, StopFlag, Stopped, check_jobs, is_finished, noted_signals, one_line
from pursuhint_lib.progress import duration, read_progress
from pursuhint_lib.status import StudyBusy, is_busy, read_status, read_verdict, short, stamp, state_text
from pursuhint_lib.storage import REPOSITORY, home, read_table, report_folder, run_folder, save_table, written_whole

GRIDS_FOLDER = PARAMS_FOLDER / "grids"
TABLES = ("results.csv", "summary.csv")  # of every study, stacked
TRIES = 2
_LONGEST_NAME = 120  # of a study: it names folders, and files with more behind it
_PATIENCE_S = 30.0  # a child that was told to stop ends its kernel and closes its MLflow run


@dataclass(frozen=True)
class GridStudy:
    """One combination. values: "section.key" -> value, what varies; sections: what its study file holds."""

    name: str
    values: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Grid:
    """A grid's studies, in the order of the file: the last key changes fastest. file: its name for messages."""

    name: str
    file: str
    studies: Sequence[GridStudy]


# --- From one file to many studies


def grid_file(grid: str) -> Path:
    """The file of a grid, by its name in ``params/grids/``. Raises ParameterError listing the grids there are."""
    there = sorted(path.stem for path in GRIDS_FOLDER.glob("*.yaml"))
    if grid not in there:
        raise ParameterError(f"no grid {grid!r}: params/grids/ holds {', '.join(there)}{nearest(grid, there)}")
    return GRIDS_FOLDER / f"{grid}.yaml"


def read_grid(path: Path) -> Grid:
    """Read a grid's YAML and check every study of it, without torch. Writes nothing.

    Raises ParameterError, one line that names file, key, value and what is allowed.
    """
    path = Path(path)
    file = f"params/grids/{path.name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", path.stem):
        # Without a hyphen no study of one grid can have the name of a study of another.
        raise ParameterError(f"{file}: the name of a grid should hold letters, digits and underscores only")
    content = read_yaml(path, file)
    if not isinstance(content, dict):
        holds = "is empty" if content is None else f"holds {type(content).__name__}"
        raise ParameterError(f"{file}: should hold base and vary; it {holds}")
    for key in content:
        if key not in ("base", "vary"):
            raise ParameterError(f"{file}: unknown key {key!r}{nearest(key, ('base', 'vary'))} (allowed: base, vary)")
    base, vary = content.get("base"), content.get("vary")
    there = sorted(path.stem for path in PARAMS_FOLDER.glob("*.yaml"))
    if base not in there:
        hint = f"{nearest(base, there)} (allowed: {', '.join(there)})"
        raise ParameterError(f"{file}: base = {base!r}: should be a study of params/{hint}")
    if not isinstance(vary, dict) or not vary:
        raise ParameterError(f"{file}: vary = {vary!r}: should hold keys as common.student, each with a list of values")
    base_file = PARAMS_FOLDER / f"{base}.yaml"
    load_params(base_file)  # so that a mistake found below is one of this file
    sections = read_sections(base_file, f"params/{base}.yaml")
    sections = {name: {key: value for key, value in keys.items() if key != "study"} for name, keys in sections.items()}
    choices, seen = [], set()
    for key, values in vary.items():
        choices.append(_choices(file, str(key), values))
        for name in choices[-1][0]:
            if name in seen:
                raise ParameterError(f"{file}: vary: {name} is given twice")
            seen.add(name)
    studies: dict[str, GridStudy] = {}
    for combination in itertools.product(*choices):
        study = _combined(path.stem, sections, {key: value for part in combination for key, value in part.items()})
        if study.name in studies:
            raise ParameterError(
                f"{file}: vary: {_in_words(studies[study.name].values)} and {_in_words(study.values)} give one name, "
                f"{study.name} (in a name only letters, digits and underscores of a value count)"
            )
        if study.name in there:
            raise ParameterError(f"{file}: vary: {study.name} is the name of a study of params/ already")
        if len(study.name) > _LONGEST_NAME:
            raise ParameterError(
                f"{file}: vary: the name {study.name} is too long ({len(study.name)} characters; allowed: up to "
                f"{_LONGEST_NAME})"
            )
        params_of(study.sections, study.name, _place(file, study))
        studies[study.name] = study
    return Grid(path.stem, file, list(studies.values()))


def _choices(file: str, key: str, values: Any) -> list[dict[str, Any]]:
    """One entry of `vary`: for each of its values, "section.key" -> value."""
    names = [name.strip() for name in key.split(",")]
    for name in names:
        section, _, rest = name.partition(".")
        allowed = [f"{section}.{one}" for one in section_keys(section)] if section in ("common", *SECTIONS) else []
        allowed = [one for one in allowed if one != "common.study"]
        if name == "common.study":
            raise ParameterError(f"{file}: vary: common.study: each study gets its name from its values")
        if name not in allowed:
            everywhere = [f"{one}.{other}" for one in ("common", *SECTIONS) for other in section_keys(one)]
            same = [known for known in everywhere if rest and known.endswith(f".{rest}")]
            hint = f"; did you mean {same[0]!r}?" if same else nearest(name, everywhere)
            which = ", ".join(allowed) or "section.key, sections common, " + ", ".join(SECTIONS)
            raise ParameterError(f"{file}: vary: {name!r}: unknown key{hint} (allowed: {which})")
    if not isinstance(values, list) or not values:
        raise ParameterError(f"{file}: vary: {key} = {values!r}: should be a list of values, at least one")
    if len(names) == 1:
        return [{names[0]: value} for value in values]
    for value in values:
        if not isinstance(value, list) or len(value) != len(names):
            raise ParameterError(
                f"{file}: vary: {key}: {value!r}: should be a list of {len(names)} values, one for each key"
            )
    return [dict(zip(names, value)) for value in values]


def _combined(grid: str, base: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> GridStudy:
    sections = {name: dict(keys) for name, keys in base.items()}
    for place, value in values.items():
        section, _, key = place.partition(".")
        sections.setdefault(section, {})[key] = value
    return GridStudy("-".join([grid, *map(_part_of_name, values.values())]), values, sections)


def _part_of_name(value: Any) -> str:
    """A value as a study's name holds it: resnet8_w4, 4_0, at_crd_last."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", _text(value)).strip("_") or "none"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def _place(file: str, study: GridStudy) -> str:
    return f"{file} ({study.name})"


def write_studies(grid: Grid) -> dict[str, Path]:
    """Write the grid's study files, and remove those of combinations that it no longer has. Returns study -> file."""
    folder = run_folder("grids", grid.name) / "params"
    files = {study.name: folder / f"{study.name}.yaml" for study in grid.studies}
    for old in set(folder.glob("*.yaml")) - set(files.values()):
        old.unlink()
    for study in grid.studies:
        text = f"# Made from {grid.file}, and made again at each run of the grid: change that file.\n"
        text += yaml.safe_dump(study.sections, sort_keys=False, allow_unicode=True)
        path = files[study.name]
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with written_whole(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return files


# --- Commands


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status (0, 1, or 128 + the number of the signal that stopped it)."""
    parser = argparse.ArgumentParser(
        prog="python -m pursuhint_lib.grid", description="Run the studies of a grid, several at a time."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("reproduce", "run what is not there yet"),
        ("status", "say where each study stands"),
    ):
        command = verbs.add_parser(verb, help=text)
        command.add_argument("grid", help="a name in params/grids/, for example digits_pairs")
        if verb == "reproduce":
            command.add_argument("--jobs", default="", help="how many studies run at a time")
            add_options(command)
    options = parser.parse_args(arguments)
    with noted_signals() as stop:
        try:
            grid = read_grid(grid_file(options.grid))
            if options.verb == "status":
                print(describe(grid, Sources()))
                return 0
            jobs = whole_number("JOBS", options.jobs, 1) or 1
            fan_out = fan_out_of_studies(options.executor, options.cores, options.gpus, options.slurm)
            failed = reproduce(grid, jobs=jobs, fan_out=fan_out, stop=stop)
        except Stopped as stopped:
            return 128 + stopped.signum
        except Exception as error:
            if os.environ.get("PURSUHINT_DEBUG"):
                traceback.print_exc()
            print(one_line(error), file=sys.stderr)
            return 1
    return 1 if failed else 0


def fan_out_of_studies(executor: str, cores: str, gpus: str, slurm: str) -> FanOut | None:
    """How each study of a grid has its work done, from the command line: None for in turn. Raises ParameterError."""
    fan_out = FanOut.of_options(executor, "", cores, gpus, slurm)
    if fan_out is None or fan_out.executor == "slurm":
        return fan_out
    for name, value in {"JOB_CORES": cores, "JOB_GPUS": gpus}.items():
        if value:
            raise ParameterError(
                f"{name} = {value!r}: says nothing here, where a grid's jobs are its studies (allowed with slurm)"
            )
    return None


def describe(grid: Grid, sources: Sources) -> str:
    """Where each study of a grid stands, a line each. Looks only."""
    lines = []
    for study in grid.studies:
        status = read_status(study.name)
        lines.append(f"  {study.name}: {state_text(study.name, status, is_busy(study.name), sources.stages)}")
    return "\n".join([f"grid {grid.name}: {_studies(len(lines))}", *lines])


def fetch_images(params: Mapping[str, Any]) -> None:
    """Download a study's images once, before several studies would do it at the same time into the same files.

    Raises FileNotFoundError, one line, when that cannot be done.
    """
    images = params["01_train_teacher"]
    if images.data in ("cifar10", "cifar100") and not Sources().images(params):
        from pursuhint_lib.data import load_images

        load_images(images.data, images.data_folder)


def pipeline_command(study: str, options: Sequence[str]) -> list[str]:
    """The command line that runs one study."""
    return [sys.executable, "-m", "pursuhint_lib.pipeline", "reproduce", study, *options]


def reproduce(
    grid: Grid,
    *,
    jobs: int,
    stop: StopFlag,
    fan_out: FanOut | None = None,
    sources: Sources = Sources(),
    command: Callable[[str, Sequence[str]], list[str]] = pipeline_command,
    fetch: Callable[[Mapping[str, Any]], None] = fetch_images,
) -> dict[str, str]:
    """Run the studies of a grid that are not finished, at most `jobs` at a time, and stack the tables of all.

    Each study is a process, `command(study, options)`; where there are GPUs, each has its own. fan_out: see `pipeline`.
    Returns study -> last line, of those that failed twice. Raises ParameterError, before anything runs, StudyBusy,
    Stopped, and what the system raises (a full disk).
    """
    live = LiveLine()
    with _grid_lock(grid.name):
        files = write_studies(grid)
        done = [study.name for study in grid.studies if is_finished(study.name, sources)]
        to_run = [study for study in grid.studies if study.name not in done]
        for study in to_run:
            stop.check()
            live.draw(f"grid {grid.name}: checking {study.name}")
            params = sources.load(files[study.name])
            sources.check(params, _place(grid.file, study))
            check_jobs(fan_out, params, sources)
            fetch(params)
        waiting = [study.name for study in to_run]
        run = _Run(grid, jobs, fan_out, sources, stop, command, live, waiting, list(done), before=len(done))
        run.go()
        tables = stack_tables(grid, run.done)
    _tell_of_results(grid, run, tables, live)
    return run.failed


@contextlib.contextmanager
def _grid_lock(grid: str) -> Iterator[None]:
    """Hold the grid. The system lets go of it when the process ends, however it ends."""
    with open(run_folder("grids", grid) / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyBusy(
                f"grid {grid} is being run by another process; 'python -m pursuhint_lib.grid status {grid}' shows how "
                "far it is"
            ) from None
        yield


# --- Children


@dataclass
class _Child:
    process: subprocess.Popen
    started: float
    place: int  # among those that run at a time, from 0
    kills_before: int  # see `deaths`


@dataclass
class _Run:
    """One run of a grid, under the grid's lock."""

    grid: Grid
    jobs: int
    fan_out: FanOut | None
    sources: Sources
    stop: StopFlag
    command: Callable[[str, Sequence[str]], list[str]]
    live: LiveLine
    waiting: list[str]
    done: list[str]
    before: int  # studies that were done before
    running: dict[str, _Child] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # study -> last line
    past: dict[str, Mapping[str, float]] = field(default_factory=dict)  # seconds that stages took, of studies done

    def go(self) -> None:
        """Until every study is done or has failed. Raises Stopped, with no child left."""
        try:
            while self.waiting or self.running:
                self.stop.check()
                self._start()
                self._collect()
                self.live.draw(self._view(time.time()))
                time.sleep(0.25)
        except BaseException as error:
            self.live.clear()
            self._end_children(error.signum if isinstance(error, Stopped) else signal.SIGTERM)
            if isinstance(error, Stopped):
                jobs = f" JOBS={self.jobs}" if self.jobs > 1 else ""
                jobs += self.fan_out.as_typed if self.fan_out else ""
                print(
                    f"stopped by {'Ctrl-C' if error.signum == signal.SIGINT else error}; {len(self.done)} of "
                    f"{_studies(len(self.grid.studies))} are done; "
                    f"'make reproduce GRID={self.grid.name}{jobs}' goes on from there",
                    file=sys.stderr,
                )
            raise
        self.live.clear()

    def log(self, study: str) -> Path:
        return run_folder("grids", self.grid.name) / f"{study}.log"

    def _start(self) -> None:
        while self.waiting and len(self.running) < self.jobs:
            # One that somebody runs by hand, or that a killed driver left and that is just ending, has to wait.
            study = next((study for study in self.waiting if not is_busy(study)), None)
            if study is None:
                return
            self.waiting.remove(study)
            self.tries[study] = self.tries.get(study, 0) + 1
            place = min(set(range(self.jobs)) - {child.place for child in self.running.values()})
            environment = os.environ | {"PURSUHINT_PARENT": str(os.getpid()), "PURSUHINT_HOME": str(home())}
            environment |= self._gpus_of(place)
            with open(self.log(study), "a", encoding="utf-8") as log:
                print(f"--- {stamp(time.time())}", file=log, flush=True)
                process = subprocess.Popen(
                    self.command(study, self.fan_out.as_arguments if self.fan_out else []),
                    cwd=REPOSITORY,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # the terminal's Ctrl-C is for the driver, which hands it on once
                )
            self.running[study] = _Child(process, time.time(), place, oom_kills())

    def _gpus_of(self, place: int) -> dict[str, str]:
        """The GPUs of the study that runs in this place of those that run at a time."""
        gpus = visible_gpus()
        if self.fan_out or not gpus:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place :: self.jobs] or [gpus[place % len(gpus)]])}

    def _collect(self) -> None:
        """Take in the children that have ended."""
        for study, child in list(self.running.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self.running[study]
            if code == 0:
                self.done.append(study)
                took = duration(time.time() - child.started)
                self.live.say(f"[{len(self.done)}/{len(self.grid.studies)}] {study}: done in {took}")
                continue
            last = way_of_death(code, child.kills_before) if code < 0 else _last_line(self.log(study))
            if self.tries[study] < TRIES:
                self.live.say(f"{study} failed and is tried once more: {last}")
                self.waiting.append(study)
            else:
                self.live.say(f"{study} failed again: {last}")
                self.failed[study] = last

    def _end_children(self, signum: int) -> None:
        """Stop all children as the driver was stopped, and say what each of them keeps."""
        children = {study: child.process for study, child in self.running.items()}
        for process in children.values():
            process.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)
        end = time.monotonic() + _PATIENCE_S
        for study, process in children.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # its kernel ends by itself
                process.wait()
            self.live.say(f"{study}: {_last_line(self.log(study))}")

    # The view

    def _view(self, now: float) -> str:
        """A line for the grid and one for each running study."""
        for study in self.done:
            if study not in self.past:
                self.past[study] = read_status(study).get("seconds", {})
        past = list(self.past.values())
        usual = {
            stage.name: mean(seconds)
            for stage in self.sources.stages
            if (seconds := [one[stage.name] for one in past if stage.name in one])
        }
        lines, times = [], []
        for study, child in self.running.items():
            text, left = self._state(study, child, usual, now)
            lines.append(f"  {study} {text}")
            times.append((now - child.started, left))
        left = grid_seconds_left(times, len(self.waiting), [sum(one.values()) for one in past if one], self.jobs)
        parts = [f"{len(self.done)}/{_studies(len(self.grid.studies))} done", f"{len(self.running)} running"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += ["waiting for another process that runs one of them"] if self.waiting and not self.running else []
        parts += [f"about {duration(left)} left"] if left is not None else []
        return "\n".join([f"grid {self.grid.name}: {', '.join(parts)}", *lines])

    def _state(self, study: str, child: _Child, usual: Mapping[str, float], now: float) -> tuple[str, float | None]:
        """A running study in words, and its seconds left. usual: what stages took in the studies that are done."""
        status = read_status(study)
        stage = status.get("stage")
        if status.get("pid") != child.process.pid or not stage:
            return "begins", None
        names = [one.name for one in self.sources.stages]
        place = names.index(stage)
        began = status["stage_started"]
        heartbeat = read_progress(home() / "runs" / study / stage)
        if heartbeat and heartbeat["updated"] < began:
            heartbeat = None
        shares = {one.name: one.share for one in self.sources.stages}
        past = dict(usual) | status.get("seconds", {})
        left, study_left = study_seconds_left(stage, names[place + 1 :], now - began, heartbeat, past, shares, now)
        return stage_line(f"[{place + 1}/{len(names)}]", stage, heartbeat, left, study_left), study_left


def grid_seconds_left(
    running: Sequence[tuple[float, float | None]], waiting: int, whole: Sequence[float], jobs: int
) -> float | None:
    """Seconds left of a grid; None while nothing is known.

    running: for each study seconds so far and seconds left (None: not known); waiting: how many studies have not begun;
    whole: seconds that finished ones took, from which the others are guessed, else from the running ones.
    """
    known = list(whole) or [spent + left for spent, left in running if left is not None]
    if not known:
        return None
    usual = mean(known)
    lefts = [max(0.0, usual - spent) if left is None else left for spent, left in running]
    return max([(sum(lefts) + waiting * usual) / jobs, *lefts])


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _studies(count: int) -> str:
    return f"{count} {'study' if count == 1 else 'studies'}"


# --- What came of it


def stack_tables(grid: Grid, studies: Sequence[str]) -> list[Path]:
    """Stack the tables of these studies into ``reports/grids/<grid>/``: "study" and what varies in front, then the
    study's own columns, whose texts are kept to the letter. Returns the files written.
    """
    written = []
    for name in TABLES:
        stacked = []
        for study in grid.studies:
            path = home() / "reports" / study.name / "tables" / name
            if study.name not in studies or not path.exists():
                continue
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            values = {key: _text(value) for key, value in study.values.items()}
            front = pd.DataFrame({"study": study.name} | values, index=table.index)
            stacked.append(pd.concat([front, table], axis=1))
        if stacked:
            path = report_folder("grids", grid.name) / name
            written.append(save_table(pd.concat(stacked, ignore_index=True), path))
    return written


def conclusion(study: str) -> str:
    """What a finished study says of its clustered layers, in the words of its report; without such comparisons, its
    verdict: whether its run gave what the last one did.
    """
    from pursuhint_lib.findings import CONCLUSIONS  # here: it imports torch

    path = home() / "reports" / study / "tables" / "contrasts.csv"
    contrasts = read_table(path) if path.exists() else pd.DataFrame(columns=["arm", "control", "family", "word"])
    sentences = []
    for arm, own in contrasts[contrasts["family"] == "main"].groupby("arm", sort=False):
        controls = {text: own.loc[own["word"] == word, "control"] for word, text in CONCLUSIONS.items()}
        sayings = [f"{text} {', '.join(names)}" for text, names in controls.items() if len(names)]
        sentences.append(f"{arm} {'; it '.join(sayings)}")
    return ". ".join(sentences) or read_verdict(study)["text"]


def _tell_of_results(grid: Grid, run: _Run, tables: Sequence[Path], live: LiveLine) -> None:
    done = [study.name for study in grid.studies if study.name in run.done]
    for study in done:
        live.say(f"{study}: {conclusion(study)}")
    if run.before == len(grid.studies):
        live.say(f"nothing to do: all {_studies(len(done))} of {grid.name} are done")
    else:
        before = f" ({run.before} of them before)" if run.before else ""
        live.say(f"grid {grid.name}: {len(done)} of {_studies(len(grid.studies))} done{before}")
    if tables:
        live.say(f"tables: {', '.join(short(path) for path in tables)}")
    for study, last in run.failed.items():
        print(f"{study} failed {TRIES} times: {last}; log: {short(run.log(study))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
