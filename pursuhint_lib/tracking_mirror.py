"""MLflow as a mirror of a study: what the driver logs there, from what stages leave in their folders and records.

A mirror costs no result. Where it fails that is said in a line, the study goes on, and what MLflow lacks is logged
later, from the files: at the study's end, or by the next run. The same holds for a store that was deleted or damaged.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pursuhint_lib import tracking
from pursuhint_lib.records import RECORD
from pursuhint_lib.storage import home, run_folder, save_json
from pursuhint_lib.tracking_store import missing_runs

SPOOL = ".mlflow-spool.jsonl"  # in a stage's folder: what its notebook logs, kept; in a job's: what the job does


def lacking(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Stages, by their records, whose runs MLflow did not take or does not have any more. Imports no MLflow."""
    missing = missing_runs(record["runs"]["notebook"] for record in records.values())
    return [
        stage
        for stage, record in records.items()
        if not record["runs"].get("logged") or record["runs"]["notebook"] in missing
    ]


class Mirror:
    """The runs of one study.

    say: prints a line that stays. again: the command that runs the study. away: not opened yet, or has failed since.
    """

    def __init__(self, study: str, say: Callable[[str], None], again: str):
        self.study, self.say, self.again = study, say, again
        self.away = True

    def open(self) -> None:
        """Find the study's experiment, and put right what a dead driver or a moved folder has left there."""
        self.away = False
        self.tried(self._open)

    def _open(self) -> None:
        if (old := tracking.relocate()) is not None:
            self.say(f"the folder has moved: MLflow's artifacts were at {old}, their addresses were replaced")
        tracking.open_experiment(self.study)
        tracking.sweep_dead_runs(self.study)

    def tried(self, log: Callable[..., Any], *arguments: Any) -> Any:
        """What `log` returns; None where MLflow fails, which is said, or is away."""
        if self.away:
            return None
        try:
            return log(*arguments)
        except tracking.TrackingError as error:
            self.say(f"warning: {error}; going on without MLflow")
            self.away = True
            return None

    def begin(self, stage: str, made: Mapping[str, Any]) -> str:
        """Create a notebook's run; returns its id, "" where MLflow is away. made: its record, as far as it is known."""
        return self.tried(self._create_run, stage, made) or ""

    def _create_run(self, stage: str, made: Mapping[str, Any]) -> str:
        inputs = made["inputs"]
        threads = {name: value for name, value in inputs["parameters"].items() if name == "threads"}
        tags = {"lock": inputs["lock"]} | threads
        return tracking.create_run(self.study, stage, tags=tags, params=inputs["parameters"], made=made)

    def publish(self, stage: str, record: dict[str, Any]) -> bool:
        """Log what a stage has left, whatever was logged before, and put the ids of its runs into its record."""
        return bool(self.tried(self._publish, stage, record))

    def _publish(self, stage: str, record: dict[str, Any]) -> bool:
        folder, runs = run_folder(self.study, stage), record["runs"]
        if not (runs["notebook"] and tracking.has_run(self.study, runs["notebook"])):
            runs["notebook"] = self._create_run(stage, record)
        run_id = runs["notebook"]
        tracking.ingest(folder / SPOOL, tracking.StageRun(self.study, stage, run_id, made=record))
        tracking.log_stage_files(run_id, folder)
        tracking.retire_other_models(self.study, stage, run_id)
        table = tracking.run_table(self.study, stage)
        tracking.finish_run(run_id, "FINISHED")
        runs |= {"models": {f"{row.arm}-s{row.seed}": row.run_id for row in table.itertuples()}, "logged": True}
        return True

    def catch_up(self, records: Mapping[str, dict[str, Any]]) -> bool:
        """Publish, in their order, the stages done that MLflow lacks. Returns whether there were any."""
        stages = [] if self.away else lacking(records)
        for stage in stages:
            if self.publish(stage, records[stage]):
                self.say(f"{stage}: MLflow did not have its runs; they were logged from its files")
            save_json(records[stage], run_folder(self.study, stage) / RECORD)
        return bool(stages)

    def close(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Keep the study's page with the run of its last stage, and say what MLflow lacks."""
        page = home() / "reports" / self.study / "report.html"
        if page.exists():
            *_, last = records.values()
            self.tried(tracking.log_files, last["runs"]["notebook"], [page], "report")
        if stages := lacking(records):
            self.say(f"MLflow lacks the runs of {', '.join(stages)}: '{self.again}' logs them from the files")
