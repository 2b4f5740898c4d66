"""What the jobs of test_fanout do, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd

from pursuhint_lib.fanout import FanOut, Fleet, Work
from pursuhint_lib.progress import Progress
from pursuhint_lib.storage import run_folder
from pursuhint_lib.tracking_spool import SpooledRun


def write(name, fault, folder):
    """Write a file, unless the fault has it otherwise; each try leaves a line in <name>.tries."""
    with open(folder / f"{name}.tries", "a") as tries:
        tries.write(f"{os.getpid()}\n")
    number = len((folder / f"{name}.tries").read_text().split())
    if fault == "killed" or (fault == "killed once" and number == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "crashed once" and number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "device" and number == 2:
        raise RuntimeError("CUDA error\nmore of it")
    if fault == "wrong":
        raise ValueError("learning_rate = -1: should be more than 0")
    (folder / f"{name}.on").touch()
    together = sorted(path.stem for path in folder.glob("*.on"))
    time.sleep(0.5)
    (folder / f"{name}.on").unlink()
    seen = [os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], Path.cwd().name, *together]
    (folder / f"{name}.txt").write_text(" ".join(seen))
    return [folder / f"{name}.txt"]


def wait_with_a_child(folder):
    """Never end, with a child in a session of its own, as torchrun's are."""
    progress = Progress(folder, 4, "rounds")
    progress.advance("first round")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (folder / "pids.partial").write_text(f"{os.getpid()} {child.pid}")
    (folder / "pids.partial").rename(folder / "pids")
    child.wait()


def drive(folder, stop=lambda: None, show=lambda heartbeat, lines: None):
    """A driver of one job, in `folder`, that never ends."""
    work = Work("waits", partial(wait_with_a_child, folder), folder, folder)
    fleet = Fleet(FanOut("local", 1, 1, 0), "key", {"PYTHONPATH": os.environ["PYTHONPATH"]}, Path.cwd(), print, stop)
    fleet.run([work], {}, lambda work: None, show)


def make_part(job, params, folder, spool):
    """Of the toy study in test_pipeline: a part that notebook 01_make would make, and its run."""
    stage, number = run_folder(params["study"], job.stage), job.seeds[0]
    progress = Progress(folder, 1, "part")
    if number == 1 and (stage.parent / "kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    with open(stage.parent / "trained.txt", "a") as log:
        log.write(f"{number}\n")
    part = stage / "parts" / f"p{number}.txt"
    part.parent.mkdir(exist_ok=True)
    part.write_text(str(params["base"]))
    log_part(SpooledRun(params["study"], job.stage, "", spool), number)
    assert "mlflow" not in sys.modules
    progress.advance(f"part {number}")
    return [part]


def log_part(run, number):
    """Log a part as if it were a network."""
    history = pd.DataFrame({"arm": "part", "seed": number, "epoch": [1, 2], "val_loss": [1.0, 0.1 + number]})
    run.log_trained_model(arm="part", seed=number, history=history, params={}, key="k")
