"""Start the processes that train a study's networks together, and follow them.

torchrun starts them; each runs this module with a file that says what to do, and finds the others (see `parallel`).
They live no longer than who started them: all read the one end of a pipe whose other end only the starter holds, so
that they notice its death whatever it died of.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from pursuhint_lib.deaths import oom_kills, way_of_death
from pursuhint_lib.jobs import Job, job_folder, run_job
from pursuhint_lib.params import STAGES, StudentTraining
from pursuhint_lib.status import short
from pursuhint_lib.storage import REPOSITORY, read_json, run_folder, save_json

PATIENCE = 60  # seconds that processes have to end by themselves once they are told to


def train_together(job: Job, params: StudentTraining, folder: Path, report_to: Path) -> None:
    """Train the networks of a job by `params.processes` processes on this machine, each with its share of the threads.

    folder: where the networks are kept, which must be the stage's own. report_to: where the heartbeat is written. The
    first process's lines are printed as they come; everything that any of them says is in `together.log` in the job's
    folder.

    Raises RuntimeError, one line, when a process died: which one and how, where the log is, and what to do next.
    Raises ValueError for another folder.
    """
    if Path(folder).resolve() != run_folder(params.study, job.stage).resolve():
        raise ValueError(f"{folder}: several processes keep networks below {run_folder(params.study, job.stage)} only")
    own = job_folder(params.study, job)
    for stale in own.glob("error-*.json"):
        stale.unlink()
    order = {"job": asdict(job), "params": params.model_dump(mode="json"), "report_to": str(Path(report_to).resolve())}
    save_json(order, own / "together.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={params.processes}", "-m", "pursuhint_lib.launch", str(own / "together.json")]
    log = own / "together.log"
    log.unlink(missing_ok=True)
    kills_before = oom_kills()
    with open(log, "ab", buffering=0) as said:
        torchrun = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=_environment(max(1, params.threads // params.processes)),
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
        )
        try:
            for line in torchrun.stdout:
                said.write(line)
                print(line.decode(errors="replace"), end="", flush=True)
            torchrun.wait()
        finally:
            _end(torchrun)
    if torchrun.returncode:
        what = _what_died(own, params.processes, torchrun.returncode, kills_before)
        raise RuntimeError(
            f"{what}; all that was said is in {short(log)}; the same command goes on from the last checkpoint"
        )


def _environment(threads: int) -> dict[str, str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | dict.fromkeys(names, str(threads))


def _end(torchrun: subprocess.Popen) -> None:
    torchrun.stdin.close()  # which every process that is still there notices
    for end in (torchrun.terminate, torchrun.kill):
        with contextlib.suppress(subprocess.TimeoutExpired):
            torchrun.wait(PATIENCE)
            break
        end()
    torchrun.wait()
    torchrun.stdout.close()


def _what_died(own: Path, processes: int, code: int, kills_before: int) -> str:
    """Which process ended the others, and how."""
    text = (own / "together.log").read_text(encoding="utf-8", errors="replace")
    ends = re.findall(r"^ *rank *: (\d+).*\n *exitcode *: (-?\d+)", text, re.M)  # torchrun's report, first death last
    ends = [(int(rank) + 1, int(exit_code)) for rank, exit_code in ends]
    killed = [end for end in ends if end[1] < 0 and end[1] != -signal.SIGTERM]  # others' exceptions: that it was gone
    killed += [end for end in ends[-1:] if end[1] == -signal.SIGTERM]  # torchrun itself sends it, but not to the first
    if killed:
        return f"process {killed[0][0]} of {processes} died: {way_of_death(killed[0][1], kills_before)}"
    errors = []
    for file in own.glob("error-*.json"):
        with contextlib.suppress(ValueError):
            errors.append(read_json(file))
    if errors:
        first = min(errors, key=lambda error: error["time"])
        return f"process {first['rank'] + 1} of {processes} stopped: {first['error']}"
    return f"the {processes} processes died: {way_of_death(code, kills_before)}"


def main(file: Path) -> None:
    """One of the processes: what `train_together` has ordered in `file`, together with the others."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    rank = int(os.environ["RANK"])
    if rank:
        os.dup2(2, 1)  # the first one's lines are for the reader, the others' for the log
    try:
        _run(file)
    except Exception as error:
        # At once, and before the others can notice: the first to write is the one at fault.
        said = (str(error).splitlines() or [""])[0]
        state = {"rank": rank, "time": time.time(), "error": f"{type(error).__name__}: {said}"}
        save_json(state, file.with_name(f"error-{rank}.json"))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not by way of the group's end, which may wait for the others


def _run(file: Path) -> None:
    import torch.distributed

    from pursuhint_lib import parallel
    from pursuhint_lib.training import resolve_device

    order = json.loads(file.read_text(encoding="utf-8"))
    job = Job(**order["job"] | {name: tuple(order["job"][name]) for name in ("seeds", "arms")})
    parallel.join(resolve_device(STAGES[job.stage].model_validate(order["params"]).device))
    report_to = Path(order["report_to"]) if parallel.rank() == 0 else file.with_name(f"process-{parallel.rank() + 1}")
    run_job(job, order["params"], report_to)
    torch.distributed.destroy_process_group()


def _end_with_starter() -> None:
    os.read(0, 1)  # nothing is ever sent: this returns when the other end is gone
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
