"""Notebooks in order, headless.

    python -m pursuhint_lib.pipeline reproduce STUDY [--force]    run what is not there yet, end with a verdict
                                    [--executor local|slurm ...]  independent work in jobs, see `fanout`
    python -m pursuhint_lib.pipeline status STUDY                 where the study stands; runs nothing
    python -m pursuhint_lib.pipeline check STUDY                  is params/STUDY.yaml fit to run? runs nothing

The driver owns each stage. It executes the notebook through papermill (only here) with this environment's own
interpreter, creates and closes the MLflow run, and writes the stage's record; it believes neither the notebook's
metadata (papermill marks the cells of a dead kernel "completed") nor an exit code (``sys.exit(0)`` in a cell is no
success). papermill works in a second thread, so that the first one can draw the live line, watch the kernel's memory
and answer Ctrl-C at once.

Every expected error ends with one line and a status other than 0; ``PURSUHINT_DEBUG=1`` shows the traceback.
"""

import argparse
import contextlib
import errno
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pursuhint_lib import records, tracking
from pursuhint_lib.command import run_command
from pursuhint_lib.errors import first_line
from pursuhint_lib.execution import Execution, StageFailed, copy_whole, kernel_environment, publish, run_notebook
from pursuhint_lib.fanout import FanOut, Fleet, Work, add_options, settle
from pursuhint_lib.jobs import Job, job_folder, jobs_of, run_job
from pursuhint_lib.live import LiveLine, stage_line, study_seconds_left
from pursuhint_lib.params import (
    PARAMS_FOLDER,
    ParameterError,
    check_names,
    images_folder,
    load_params,
    nearest,
    study_file,
)
from pursuhint_lib.progress import duration, read_progress, write_progress
from pursuhint_lib.provenance import hardware, source_state, versions
from pursuhint_lib.records import Record, Stage
from pursuhint_lib.status import (
    StudyBusy,
    command_line,
    end_process,
    folders,
    is_busy,
    kept,
    progress_text,
    read_status,
    read_verdict,
    short,
    stamp,
    state_text,
    study_lock,
    where,
)
from pursuhint_lib.storage import REPOSITORY, home, read_table, read_valid, report_folder, run_folder, save_json
from pursuhint_lib.tracking_mirror import SPOOL, Mirror, lacking
from pursuhint_lib.verdict import Verdict, as_json, judge

_EVALUATED = ("results.csv", "summary.csv", "contrasts.csv", "measures.csv", "alike.csv", "costs.csv", "teacher.json")
# Written by a study that trains every subset of the layers, or each layer alone.
_OF_LANDSCAPE = ("landscape.csv", "placement.csv", "layer_effects.csv", "positions.csv")
STAGES = (
    Stage(
        "01_train_teacher",
        writes=(
            "networks/teacher*-s*.safetensors",
            "networks/unaided-s*.safetensors",
            "baselines.csv",
            "other_teachers.csv",
            "histories.csv",
            "timings.csv",
            "images.json",
        ),
        compared=("baselines.csv", "other_teachers.csv", "histories.csv"),
        resumes=True,
        pieces="networks/*.safetensors",
        share=0.25,
    ),
    Stage(
        "02_profile_layers",
        reads=("01_train_teacher",),
        writes=(
            "layers_teacher.csv",
            "layers_student.csv",
            "similarity_*.csv",
            "similarity_untrained.csv",
            "agreement.csv",
            "sizes.csv",
            "first_last.csv",
            "teachers.csv",
            "resamples.csv",
            "timings.csv",
        ),
        compared=("layers_*.csv", "similarity_*.csv", "sizes.csv", "teachers.csv", "resamples.csv"),
        share=0.07,
    ),
    Stage(
        "03_cluster_layers",
        reads=("01_train_teacher", "02_profile_layers"),
        writes=("hint_points.json", "clusters.csv", "scores.csv", "stability.csv", "partitions.csv"),
        compared=("hint_points.json", "clusters.csv", "scores.csv", "stability.csv", "partitions.csv"),
        share=0.05,
    ),
    Stage(
        "04_distill_students",
        reads=("01_train_teacher", "02_profile_layers", "03_cluster_layers"),
        writes=("networks/*.safetensors", "students.csv", "pairs.csv", "adapters.csv", "histories.csv", "timings.csv"),
        compared=("students.csv", "pairs.csv", "adapters.csv", "histories.csv"),
        resumes=True,
        pieces="networks/*.safetensors",
        share=0.55,
    ),
    Stage(
        "05_evaluate",
        reads=("01_train_teacher", "02_profile_layers", "03_cluster_layers", "04_distill_students"),
        writes=(*_EVALUATED, "speed.csv", "settings.json"),
        compared=(*_EVALUATED, *_OF_LANDSCAPE),
        share=0.08,
    ),
)
RESULTS = "results.csv"  # of the last stage: what the verdict looks at
NOTEBOOK = "notebook"  # the job that executes a stage's notebook
PREVIOUS = "previous"  # runs/<study>/previous/: tables and records that the verdict compares with
SHOWN = "shown.json"  # in runs/<study>/: sha256 of the files of its report, so that a changed one is made again
SET_ASIDE = "set_aside"
_UNFINISHED = ("running", "failed", "interrupted", "killed")


def _write_report(study: str) -> None:
    from pursuhint_lib.report import write_report  # here, so that a run with nothing to do stays light

    write_report(study)


def _images(params: Mapping[str, Any]) -> str:
    """Fingerprint of a study's images; "" for digits, and before the first download."""
    images = params["01_train_teacher"]
    folder = images_folder(images, f"{PARAMS_FOLDER.name}/{images.study}.yaml")
    return records.listing_hash(images.data, folder) if folder else ""


@dataclass(frozen=True)
class Sources:
    """What a study is made from; tests put toys in their place."""

    stages: tuple[Stage, ...] = STAGES
    notebooks: Path = REPOSITORY / "notebooks"
    library: Path = REPOSITORY / "pursuhint_lib"
    lock: Path = REPOSITORY / "requirements.lock"
    find: Callable[[str], Path] = study_file
    load: Callable[[Path], Mapping[str, Any]] = load_params
    check: Callable[[Mapping[str, Any], str], None] = check_names
    images: Callable[[Mapping[str, Any]], str] = _images  # a part of the first stage's key
    jobs: Callable[[str, Mapping[str, Any]], list[Job]] = jobs_of  # what an executor is given before the notebook
    run_job: Callable[[Job, Mapping[str, Any], Path, Path], list[Path]] = run_job
    report: Callable[[str], Any] | None = _write_report  # the page, made again when all records are there

    def notebook(self, stage: Stage) -> Path:
        """Where a stage's notebook is."""
        return self.notebooks / f"{stage.name}.ipynb"


class Stopped(Exception):
    """A signal asked the driver to stop."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


# --- Commands


def main(arguments: list[str] | None = None, sources: Sources | None = None) -> int:
    """Run a command line; returns the exit status (0, 1, or 128 + the number of the signal that stopped it)."""
    parser = argparse.ArgumentParser(
        prog="python -m pursuhint_lib.pipeline", description="Run a study's notebooks in order."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("reproduce", "run what is not there yet, end with a verdict"),
        ("status", "say where the study stands"),
        ("check", "check the study's parameters"),
    ):
        command = verbs.add_parser(verb, help=text)
        command.add_argument("study", help="a name in params/, for example digits")
        if verb == "reproduce":
            command.add_argument(
                "--force", action="store_true", help="run every notebook again and train every model again"
            )
            command.add_argument("--jobs", default="", help="at most so many jobs at a time")
            add_options(command)
    options = parser.parse_args(arguments)
    sources = sources or Sources()
    with noted_signals() as stop:
        try:
            if options.verb == "reproduce":
                asked = (options.executor, options.jobs, options.cores, options.gpus, options.slurm)
                fan_out = FanOut.of_options(*asked)
                reproduce(options.study, force=options.force, sources=sources, stop=stop, fan_out=fan_out)
            elif options.verb == "status":
                print(describe(options.study, sources))
            else:
                print(check(options.study, sources))
        except Stopped as stopped:
            return 128 + stopped.signum
        except Exception as error:
            if os.environ.get("PURSUHINT_DEBUG"):
                traceback.print_exc()
            print(one_line(error), file=sys.stderr)
            return 1
    return 0


def check(study: str, sources: Sources) -> str:
    """Check a study's parameters against their types, the notebooks and the library. Returns one line.

    Raises ParameterError.
    """
    params, file = _parameters(study, sources)
    sources.check(params, file)
    return f"{file}: fit to run"


def reproduce(study: str, *, force: bool, sources: Sources, stop: "StopFlag", fan_out: FanOut | None = None) -> None:
    """Run the stages of a study that are not there yet and print what came of it.

    fan_out: how independent work is run as jobs; None for one notebook after the other. Raises ParameterError,
    StageFailed, StudyBusy, Stopped, and what the system raises (a full disk).
    """
    params, file = _parameters(study, sources)
    check_jobs(fan_out, params, sources)
    with study_lock(study):
        Driver(study, params, file, sources, stop, fan_out).run(force)


def check_jobs(fan_out: FanOut | None, params: Mapping[str, Any], sources: Sources) -> None:
    """See that a study's jobs can be run as they are asked for. Raises ParameterError."""
    if fan_out:
        of_stages = [fan_out.for_stage(params[stage.name].model_dump()) for stage in sources.stages]
        for number, options in enumerate(of_stages):
            if options not in of_stages[:number]:
                options.check_slurm()


def describe(study: str, sources: Sources) -> str:
    """Where a study stands, in a few lines. Looks only."""
    params, _ = _parameters(study, sources)
    status, busy = read_status(study), is_busy(study)
    lines = [f"study {study}: {state_text(study, status, busy, sources.stages)}"]
    earlier: dict[str, dict] = {}
    for stage in sources.stages:
        record, reason = _standing(study, stage, params, sources, earlier)
        if stage.name in status.get("to_redo", ()):
            reason = "is to be made again (--force)"
        if reason and busy and status.get("stage") == stage.name:
            reason = "running"
        lines.append(f"  {stage.name}: {reason or 'done, ' + duration(record['seconds'])}")
        if reason:
            lines += [f"  {later.name}: waits" for later in sources.stages[sources.stages.index(stage) + 1 :]]
            break
        earlier[stage.name] = record
    return "\n".join(lines)


def is_finished(study: str, sources: Sources) -> bool:
    """Whether `reproduce` would find nothing to do. Looks only, and imports nothing heavy. Raises ParameterError."""
    params, _ = _parameters(study, sources)
    status = read_status(study)
    if status.get("state") != "finished" or status.get("to_redo"):
        return False
    earlier: dict[str, dict] = {}
    for stage in sources.stages:
        record, reason = _standing(study, stage, params, sources, earlier)
        if reason:
            return False
        earlier[stage.name] = record
    return not _changed_report(study) and not lacking(earlier)


def _changed_report(study: str) -> list[str]:
    """Files of a study's report that are gone or changed."""
    reports, shown = home() / "reports" / study, read_valid(home() / "runs" / study / SHOWN, dict[str, str])
    changed = records.changed_outputs(shown or {}, reports)
    return changed or ([] if shown is not None and (reports / "report.html").exists() else ["report.html"])


def _parameters(study: str, sources: Sources) -> tuple[Mapping[str, Any], str]:
    """Checked parameters of every stage, and the file's name for messages. No name may be known to one side only."""
    path = sources.find(study)
    file = f"{path.parent.name}/{path.name}"
    params = sources.load(path)
    for stage in sources.stages:
        notebook = sources.notebook(stage)
        declared, given = records.declared_parameters(notebook), list(params[stage.name].model_dump())
        unknown = [name for name in given if name not in declared]  # papermill only warns of these
        unset = [name for name in declared if name not in given]
        if unknown:
            raise ParameterError(
                f"{file}: {unknown[0]}: not declared in the parameters cell of {notebook.parent.name}/{notebook.name}"
                f"{nearest(unknown[0], declared)} (declared: {', '.join(declared)})"
            )
        if unset:
            raise ParameterError(
                f"{file}: {unset[0]}: declared in the parameters cell of {notebook.parent.name}/{notebook.name}, but "
                f"no parameter of {stage.name}{nearest(unset[0], given)} (parameters: {', '.join(given)})"
            )
    return params, file


def _standing(
    study: str, stage: Stage, params: Mapping[str, Any], sources: Sources, earlier: Mapping[str, dict]
) -> tuple[dict | None, str]:
    """The record of a stage, and why the stage has to run ("" when it holds)."""
    folder, _ = folders(study, stage.name)
    record = records.read_record(folder)
    if record is None:
        return None, "not done yet"
    inputs = _inputs(stage, params, sources, earlier)
    if record["key"] != records.key_of(inputs):
        return record, records.what_changed(record["inputs"], inputs)
    changed = records.changed_outputs(record["outputs"], folder)
    return record, f"output {changed[0]} is gone or changed" if changed else ""


def _inputs(stage: Stage, params: Mapping[str, Any], sources: Sources, earlier: Mapping[str, dict]) -> dict[str, Any]:
    parameters = params[stage.name].model_dump(mode="json")
    images = sources.images(params) if stage == sources.stages[0] else ""
    return records.inputs_of(stage, parameters, sources.notebook(stage), sources.library, sources.lock, earlier, images)


# --- The driver


class Driver:
    """One run of one study, under the study's lock."""

    def __init__(
        self,
        study: str,
        params: Mapping[str, Any],
        file: str,
        sources: Sources,
        stop: "StopFlag",
        fan_out: FanOut | None = None,
    ):
        self.study, self.params, self.file, self.sources, self.stop = study, params, file, sources, stop
        self.fan_out = fan_out
        self.options = fan_out.as_typed if fan_out else ""
        self.live = LiveLine()
        self.status = read_status(study)
        self.past: dict[str, float] = dict(self.status.get("seconds", {}))  # what stages took, for the forecast
        self.spent: dict[str, float] = dict(self.status.get("spent", {}))  # by unfinished attempts at a stage
        self.records: dict[str, dict] = {}
        self.mirror = Mirror(study, self.live.say, command_line("reproduce", study, self.options))
        self.prepared = False
        self.ran = 0

    def run(self, force: bool) -> None:
        """Go through the stages; however it ends, the status says so."""
        warnings.showwarning = lambda message, *_: self.live.say(f"warning: {message}")
        try:
            self._go_through(force)
        except BaseException as error:
            self._tell_of_end(error)
            raise

    def _go_through(self, force: bool) -> None:
        started = time.time()
        died = self.status.get("state") == "running"
        if died:
            self._tell_of_death()
        to_redo = [stage.name for stage in self.sources.stages] if force else list(self.status.get("to_redo", ()))
        for number, stage in enumerate(self.sources.stages, start=1):
            self.stop.check()
            place = f"[{number}/{len(self.sources.stages)}]"
            record, reason = _standing(self.study, stage, self.params, self.sources, self.records)
            if stage.name in to_redo:
                reason = "forced"
            if reason:
                self._prepare(to_redo)
                record = self._run_stage(stage, place, reason, record, to_redo)
                self.ran += 1
            else:
                self._restore_notebook(stage)
                if self.prepared:
                    self.live.say(f"{place} {stage.name}: done before, kept")
            self.records[stage.name] = record
        if not self.ran and not died and self.status.get("state") == "finished":
            self._nothing_to_do()
            return
        if died and not self.ran:
            self._prepare(to_redo)  # closes the dead run's MLflow runs
        self._finish(time.time() - started)

    # Before the first stage that has to run

    def _prepare(self, to_redo: list[str]) -> None:
        """What a run with nothing to do never pays for: names checked with torch, the tracker, papermill."""
        if self.prepared:
            return
        self.live.draw("starting: torch, MLflow and papermill are imported")
        report_folder(self.study, "notebooks")  # before anything runs: it may be that it cannot be made
        self.sources.check(self.params, self.file)
        for folder in (run_folder(self.study), report_folder(self.study)):
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, "cannot be written", str(folder))
        self.stop.check()
        if os.environ.get("MLFLOW_TRACKING_URI"):
            tracking.open_experiment(self.study)  # a store that the user names has to be there
        self.mirror.open()
        self.stop.check()
        if self.status.get("state") not in _UNFINISHED:
            self._keep_previous()
        self._save_status(state="running", stage="", progress="", stage_started=time.time(), to_redo=to_redo)
        importlib.import_module("papermill")
        self.prepared = True
        self.live.clear()

    def _keep_previous(self) -> None:
        """Set aside what the verdict will compare with: the last whole run here, else the published one."""
        last = self.sources.stages[-1]
        folder, reports = folders(self.study, last.name)
        target = run_folder(self.study, PREVIOUS)
        shutil.rmtree(target)
        found = {stage.name: records.read_record(folders(self.study, stage.name)[0]) for stage in self.sources.stages}
        results = folder / RESULTS
        whole = (
            all(found.values())
            and results.exists()
            and found[last.name]["outputs"].get(RESULTS) == records.sha256(results)
        )
        if not whole:
            results = reports / "tables" / RESULTS
            if not results.exists():
                return
            found = read_valid(reports / "records.json", dict[str, Record]) or {}
        target.mkdir()
        shutil.copyfile(results, target / RESULTS)
        save_json(found, target / "records.json")

    def _tell_of_death(self) -> None:
        """The last driver is dead and could say nothing: say it for it, and see that its kernel is gone."""
        status = self.status
        if status.get("host") == socket.gethostname():
            end_process(status.get("kernel"))
        stage = status.get("stage", "")
        heartbeat = read_progress(folders(self.study, stage)[0]) if stage else None
        if heartbeat and heartbeat["updated"] >= status.get("stage_started", 0):
            status["progress"] = progress_text(heartbeat)
            self.spent[stage] = self.spent.get(stage, 0.0) + heartbeat["updated"] - status["stage_started"]
        self.live.say(
            f"the last run was killed {where(status)}; "
            f"kept: {kept(self.study, self.sources.stages)}; going on from there"
        )

    # One stage

    def _run_stage(self, stage: Stage, place: str, reason: str, old: dict | None, to_redo: list[str]) -> dict:
        folder = run_folder(self.study, stage.name)
        inputs = _inputs(stage, self.params, self.sources, self.records)
        key, forced = records.key_of(inputs), stage.name in to_redo
        parameters = self.params[stage.name].model_dump(mode="json")
        fan_out = self.fan_out.for_stage(parameters) if self.fan_out else None
        self.mirror.catch_up(self.records)  # an evaluation is logged on the runs of what it evaluates
        self.live.say(f"{place} {stage.name} ({reason})")
        goes_on = fan_out is not None and fan_out.executor == "slurm" and not forced
        at_work = settle(self.study, stage.name, key if goes_on else "", self.live.say)
        self._clear(stage, folder, old, forced=forced, at_work=at_work)
        if forced:
            shutil.rmtree(run_folder(self.study, f"jobs/{stage.name}"))
            to_redo.remove(stage.name)
        started = time.time()
        self._save_status(
            state="running", stage=stage.name, progress="", stage_started=started, to_redo=to_redo, kernel=None
        )
        made = {"source": source_state(REPOSITORY), "versions": versions(), "hardware": hardware()}
        run_id = self.mirror.begin(stage.name, made | {"inputs": inputs})
        environment = kernel_environment(parameters.get("threads"))
        if fan_out and fan_out.executor == "local" and not fan_out.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # what jobs do not see would make another result in the notebook
        of_notebook = environment | tracking.environment(run_id, folder / SPOOL)
        how = {}
        try:
            if fan_out:
                fleet = partial(Fleet, fan_out, key, say=self.live.say, check_stop=self.stop.check)
                jobs = self._fan_out(stage, place, started, fleet(environment, self.sources.notebooks), at_work, run_id)
                how["fan_out"] = {name: getattr(fan_out, name) for name in ("executor", "jobs", "cores", "gpus")}
                how["fan_out"]["ran"] = jobs
            if fan_out and fan_out.notebooks_too:
                fleet = fleet(environment, Path.cwd())
                notebook, peak_gb = self._execute_apart(stage, place, started, fleet, at_work, of_notebook)
            else:
                execution = Execution(self.sources.notebook(stage), folder, parameters, of_notebook)
                notebook = self._watch(stage, place, started, execution)
                peak_gb = round(execution.peak_bytes / 2**30, 2)
            publish(notebook, folder, report_folder(self.study, "notebooks") / f"{stage.name}.ipynb")
            outputs = records.outputs_of(stage, folder)
        except BaseException as error:
            self.spent[stage.name] = self.spent.get(stage.name, 0.0) + time.time() - started
            if not self.mirror.away:
                with contextlib.suppress(Exception):
                    tracking.ingest(folder / SPOOL, tracking.StageRun(self.study, stage.name, run_id))
                with contextlib.suppress(Exception):
                    tracking.finish_run(run_id, "KILLED" if isinstance(error, Stopped) else "FAILED")
            raise
        seconds = time.time() - started + self.spent.pop(stage.name, 0.0)
        self.past[stage.name] = seconds
        if stage == self.sources.stages[0] and "images" not in inputs and (images := self.sources.images(self.params)):
            inputs["images"] = images  # the stage itself has downloaded them
        record = {
            "stage": stage.name,
            "key": records.key_of(inputs),
            "inputs": inputs,
            "outputs": outputs,
            "runs": {"notebook": run_id, "models": {}, "trained_at": records.trained_at(folder), "logged": False},
            **made,
            "threads": parameters.get("threads"),
            "peak_memory_gb": peak_gb,
            "started": stamp(started),
            "ended": stamp(time.time()),
            "seconds": round(seconds, 1),
        } | how
        self.mirror.publish(stage.name, record)
        save_json(record, folder / records.RECORD)  # last: from here on the stage is done
        self._save_status(stage=stage.name, progress="", kernel=None)
        self.live.say(f"{place} {stage.name}: done in {duration(time.time() - started)}")
        return record

    def _clear(
        self, stage: Stage, folder: Path, old: dict | None, *, forced: bool, at_work: Collection[str] = ()
    ) -> None:
        """Make the stage's folder ready: empty, or with what the notebook itself can go on from.

        at_work: jobs of an earlier driver that write there now.
        """
        (folder / records.RECORD).unlink(missing_ok=True)
        if NOTEBOOK in at_work:
            return
        if forced or not stage.resumes:
            shutil.rmtree(folder)
            folder.mkdir()
            return
        of_last_try = ("progress.json", records.FAILED, records.TRACE, records.RUNNING, SPOOL)
        for name in of_last_try:  # the notebook spools everything again
            (folder / name).unlink(missing_ok=True)
        for unfinished in folder.rglob(".*.partial*") if not at_work else ():  # of a killed writer
            unfinished.unlink(missing_ok=True)
        for name in records.changed_outputs(old["outputs"], folder) if old else ():
            if (folder / name).exists():
                aside = run_folder(self.study, SET_ASIDE) / stage.name / name
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, aside)
                self.live.say(f"{name} is not what was recorded: moved to {short(aside)}, made again")

    def _fan_out(
        self, stage: Stage, place: str, started: float, fleet: Fleet, at_work: Mapping[str, dict], run_id: str
    ) -> dict[str, dict[str, float]]:
        """Have the stage's jobs done, so that its notebook finds their work; each is logged as soon as it is over.

        Returns seconds and memory of each. Raises StageFailed or Stopped.
        """
        parameters = fleet.options.of_job(self.params[stage.name].model_dump(mode="json"))
        works = []
        for job in self.sources.jobs(stage.name, parameters):
            own = job_folder(self.study, job)
            work = partial(self.sources.run_job, job, parameters, own, own / SPOOL)
            works.append(Work(job.name, work, own, heartbeat=own))
        folder, _ = folders(self.study, stage.name)

        def log(work: Work) -> None:
            run = tracking.StageRun(self.study, stage.name, run_id)
            self.mirror.tried(tracking.ingest, work.folder / SPOOL, run)
            (work.folder / SPOOL).unlink(missing_ok=True)  # the notebook logs the same again

        def show(heartbeat: dict[str, Any], lines: list[str]) -> None:
            write_progress(folder, heartbeat)
            self._draw(stage, place, started, heartbeat, lines)

        done = fleet.run(works, at_work, log, show)
        self.live.clear()
        (folder / "progress.json").unlink(missing_ok=True)  # from here on it is the notebook's
        return done

    def _execute_apart(
        self,
        stage: Stage,
        place: str,
        started: float,
        fleet: Fleet,
        at_work: Mapping[str, dict],
        environment: Mapping[str, str],
    ) -> tuple[Any, float]:
        """Have the notebook executed by a job. Returns it and the memory that it took, in GB. Raises StageFailed or
        Stopped.
        """
        import nbformat

        folder, _ = folders(self.study, stage.name)
        parameters = self.params[stage.name].model_dump(mode="json")
        work = partial(run_notebook, stage, self.sources.notebook(stage), folder, parameters, environment)
        own = run_folder(self.study, f"jobs/{stage.name}/{NOTEBOOK}")

        def show(_heartbeat: dict[str, Any], lines: list[str]) -> None:
            self._draw(stage, place, started, read_progress(folder), lines)

        done = fleet.run([Work(NOTEBOOK, work, own, heartbeat=folder)], at_work, lambda _: None, show)
        self.live.clear()
        return nbformat.read(folder / records.RUNNING, as_version=4), done[NOTEBOOK]["peak_memory_gb"]

    def _watch(self, stage: Stage, place: str, started: float, execution: "Execution") -> dict:
        """Wait for the notebook, drawing the live line. Returns it executed; raises StageFailed or Stopped."""
        execution.start()
        kernel = None
        while not execution.wait(0.2):
            if self.stop.signum is not None:
                execution.kill()
                self.stop.check()
            execution.look()
            if execution.kernel != kernel:
                kernel = execution.kernel
                self._save_status(kernel=kernel)
            self._draw(stage, place, started, read_progress(execution.folder))
        self.live.clear()
        return execution.result(stage.name)

    def _draw(
        self, stage: Stage, place: str, started: float, heartbeat: Mapping[str, Any] | None, lines: Sequence[str] = ()
    ) -> None:
        """The stage's live line, and one for each of its jobs."""
        names = [one.name for one in self.sources.stages]
        later = names[names.index(stage.name) + 1 :]
        shares, now = {one.name: one.share for one in self.sources.stages}, time.time()
        left, study_left = study_seconds_left(stage.name, later, now - started, heartbeat, self.past, shares, now)
        self.live.draw("\n".join([stage_line(place, stage.name, heartbeat, left, study_left), *lines]))

    def _tell_of_end(self, error: BaseException) -> None:
        """Tell the truth after an error or a signal; a status that cannot be written must not hide the error."""
        self.live.clear()
        stopped = isinstance(error, Stopped)
        if self.status.get("state") == "running" and self.prepared:
            stage = self.status["stage"]
            heartbeat = read_progress(folders(self.study, stage)[0]) if stage else None
            text = progress_text(heartbeat) if heartbeat else ""
            message = "" if stopped else one_line(error)
            with contextlib.suppress(Exception):
                state = "interrupted" if stopped else "failed"
                self._save_status(state=state, progress=text, kernel=None, message=message)
        if stopped:
            print(
                f"stopped by {'Ctrl-C' if error.signum == signal.SIGINT else error} {where(self.status)}; "
                f"kept: {kept(self.study, self.sources.stages)}; "
                f"'{command_line('reproduce', self.study, self.options)}' goes on from there",
                file=sys.stderr,
            )

    def _restore_notebook(self, stage: Stage) -> None:
        folder, reports = folders(self.study, stage.name)
        copy = reports / "notebooks" / f"{stage.name}.ipynb"
        if not copy.exists() or records.sha256(copy) != records.sha256(folder / records.EXECUTED):
            copy_whole(folder / records.EXECUTED, copy)

    # After the last stage

    def _nothing_to_do(self) -> None:
        if lacking(self.records):
            self.live.draw("starting: MLflow is imported")
            self.mirror.open()
            if self.mirror.catch_up(self.records):
                self._write_report()  # it names the runs
            self.mirror.close(self.records)
        if changed := _changed_report(self.study):
            self._write_report()
            what = f"{changed[0]} was" if len(changed) == 1 else f"{len(changed)} of its files were"
            self.live.say(f"the report was made again from the tables: {what} gone or changed")
        verdict = read_verdict(self.study)
        took = sum(record["seconds"] for record in self.records.values())
        ended = max(record["ended"] for record in self.records.values())
        self.live.say(
            f"nothing to do: all {len(self.records)} notebooks of {self.study} are done "
            f"(last {ended}, {duration(took)} in all)"
        )
        self.live.say(f"verdict of the last run: {verdict['text']}")
        self.live.say(f"report: {self._report()}")

    def _finish(self, seconds: float) -> None:
        verdict = self._verdict()
        self.mirror.open()  # it may be back
        self.mirror.catch_up(self.records)
        self._write_report()
        save_json(as_json(verdict) | {"ended": stamp(time.time())}, run_folder(self.study) / "verdict.json")
        self._save_status(state="finished", stage="", progress="", to_redo=[], kernel=None, message="")
        self.live.say(f"study {self.study}: done in {duration(seconds)}")
        self.mirror.close(self.records)
        if link := self.mirror.tried(tracking.compare_link, self.study):
            self.live.say(f"compare the runs (after 'make ui'): {link}")
        self.live.say(f"verdict: {verdict.text}")
        self.live.say(f"report: {self._report()}")

    def _write_report(self) -> None:
        reports = report_folder(self.study)
        save_json(self.records, reports / "records.json")
        if self.sources.report:
            self.sources.report(self.study)
        of_report = [path for path in reports.rglob("*") if path.is_file()]
        names = sorted(path.relative_to(reports).as_posix() for path in of_report)
        names = [name for name in names if not name.startswith(("notebooks/", "student/", "."))]
        save_json({name: records.sha256(reports / name) for name in names}, run_folder(self.study) / SHOWN)

    def _verdict(self) -> Verdict:
        folder = home() / "runs" / self.study
        previous = folder / PREVIOUS
        old_table = previous / RESULTS
        if not old_table.exists():
            return judge(None, None, {}, {})
        old = read_valid(previous / "records.json", dict[str, Record]) or {}
        new_table = folder / self.sources.stages[-1].name / RESULTS
        changed = [
            f"{key} {before!r} -> {now!r}"
            for name, record in self.records.items()
            if name in old
            for key, before, now in records.differences(
                old[name]["inputs"]["parameters"], record["inputs"]["parameters"]
            )
        ]
        old_digests = self._compared(old) or {f"{self.sources.stages[-1].name}/{RESULTS}": records.sha256(old_table)}
        return judge(
            read_table(old_table),
            read_table(new_table),
            old_digests,
            self._compared(self.records),
            ", ".join(dict.fromkeys(changed)),
        )

    def _compared(self, found: Mapping[str, dict]) -> dict[str, str]:
        """sha256 of each table that counts, by ``stage/name``."""
        return {
            f"{stage.name}/{name}": digest
            for stage in self.sources.stages
            if stage.name in found
            for name, digest in records.matching(found[stage.name]["outputs"], stage.compared).items()
        }

    def _report(self) -> str:
        reports = home() / "reports" / self.study
        page = reports / "report.html"
        return short(page if page.exists() else reports)

    def _save_status(self, **changes: Any) -> None:
        self.status |= {
            "study": self.study,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "options": self.options,
            "updated": time.time(),
        } | changes
        self.status |= {"seconds": self.past, "spent": self.spent}
        path = run_folder(self.study) / "status.json"
        try:
            save_json(self.status, path)
        except OSError as error:
            if error.errno != errno.ENOSPC or not path.exists():
                raise
            with open(
                path, "r+", encoding="utf-8"
            ) as file:  # a full disk has no room for a new file, but for the old one's bytes
                file.write(json.dumps(self.status, ensure_ascii=False))
                file.truncate()


# --- Signals


class StopFlag:
    """Remembers a signal; `check` raises Stopped for it."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def check(self) -> None:
        if self.signum is not None:
            raise Stopped(self.signum)


@contextlib.contextmanager
def noted_signals() -> Iterator[StopFlag]:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying of them; a second one ends the driver at once. The death of the
    process that started it counts as SIGTERM, see `_end_with_parent`.

    A shell without job control starts background commands with SIGINT ignored; here it is heeded all the same.
    """
    flag = StopFlag()

    def note(signum: int, _frame: Any) -> None:
        if flag.signum is not None:
            os._exit(128 + signum)
        flag.signum = signum

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup
            before[signum] = signal.signal(signum, note)
        _end_with_parent()
    try:
        yield flag
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end_with_parent() -> None:
    """Stop as for SIGTERM when the process that started this one dies: make and a driver of many studies give their
    number as $PURSUHINT_PARENT, because one that is killed cannot stop what it has started. Kernels do the same with
    their driver.
    """
    parent = os.environ.pop("PURSUHINT_PARENT", "")  # not for those that this process starts

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, name="parent", daemon=True).start()


# --- Words


def one_line(error: BaseException) -> str:
    """An error in one line; a full disk says what to do."""
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno == errno.ENOSPC) or "No space left on device" in str(cause):
            free = shutil.disk_usage(home()).free / 2**20
            return (
                f"a disk is full (that of {short(home())} has {free:.0f} MB free): {first_line(error)}; "
                "make room, the same command goes on"
            )
        cause = cause.__cause__
    expected = (ParameterError, StageFailed, StudyBusy, OSError, ValueError, tracking.TrackingError)
    text, known = first_line(str(error)), isinstance(error, expected)
    if isinstance(error, OSError) and error.strerror and (name := error.filename2 or error.filename):
        text = f"{short(Path(os.fsdecode(name)))}: {error.strerror}"
    return text if known and text else f"{type(error).__name__}: {text} (PURSUHINT_DEBUG=1 shows where)"


if __name__ == "__main__":
    sys.exit(run_command(main))
