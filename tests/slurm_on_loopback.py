"""A Slurm of one node on 127.0.0.1, for tests: daemons, jobs and files are all the caller's, and in one folder.

In a test, ``with slurm(folder) as environment: ...``; by hand, ``python tests/slurm_on_loopback.py start FOLDER``,
which prints what to export, and ``stop FOLDER``. A Slurm that the user has is not touched: the commands find this one
by ``SLURM_CONF`` alone, and its ports are its own.

One process, the keeper, is the ancestor of the three daemons and of every job. It ends when the test's process does,
however that ends, and leaves no process behind.
"""

import ctypes
import fcntl
import getpass
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo"]
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
PORTS = range(20000, 32000)  # below those that Linux gives to outgoing connections
START_SECONDS = 60
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

# As in the plainest installation: no accounting, no cgroups, cores counted and not bound. By process group (pgid) Slurm
# also ends what a killed job leaves behind; by descent (linuxproc) it does not. A job that names no memory gets its
# share by cores; else it would get all of it, and the next job would wait. SchedulerParameters: when a job ends, look
# at the queue at once, not some seconds later.
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}({address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MailProg=/bin/true
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_min_interval=1,batch_sched_delay=0
KillWait=2
DefMemPerCPU={memory_per_core}
NodeName=loopback NodeHostname={host} NodeAddr={address} Port={node_port} CPUs={cores} RealMemory={memory}
PartitionName=tests Nodes=ALL Default=YES State=UP
"""


def slurm_missing():
    """Why no Slurm can be started here, in one line; empty where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    return f"Slurm is not installed (Debian: slurm-wlm, munge); not found: {', '.join(absent)}" if absent else ""


@contextmanager
def slurm(folder, cores=None):
    """A running Slurm. Its node has this machine's memory and `cores` cores (None: as many as the machine has).

    folder: for its files; made when it is absent. Its path is short: that of the socket in it has 107 bytes at most.
    Yields the environment variables by which ``sbatch``, ``squeue``, ``scancel`` and submitit find it. At the end every
    job and daemon is killed. Raises RuntimeError, in one line, when it does not start.
    """
    keeper = start(folder, cores, os.getpid())
    try:
        yield environment(folder)
    finally:
        keeper.terminate()
        keeper.wait()


def environment(folder):
    """What the commands and submitit need to find the Slurm of `folder`."""
    return {"SLURM_CONF": str(Path(folder).absolute() / "slurm.conf")}


def start(folder, cores=None, parent=0):
    """The keeper (Popen) of a Slurm that takes jobs. It ends with the process `parent` (0: with ``stop`` only)."""
    folder = Path(folder).absolute()
    if missing := slurm_missing():
        raise RuntimeError(missing)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "keep", str(folder), str(cores or os.cpu_count()), str(parent)]
    with open(folder / "keeper.log", "w") as log:
        # A session of its own: a Ctrl-C in the terminal reaches the test, and the keeper through the test's end.
        keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    with keeper.stdout:
        ready = keeper.stdout.readline()
    if not ready:
        keeper.wait()
        raise RuntimeError(f"Slurm did not start in {folder}: {last_line(folder / 'keeper.log')}")
    return keeper


def stop(folder):
    """Ends the Slurm that ``start`` left in `folder`, and its jobs, and waits for that. Where none runs: nothing."""
    with suppress(FileNotFoundError), open(Path(folder) / "keeper.pid") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the keeper holds it as long as it lives
        except BlockingIOError:
            os.kill(int(held.read()), signal.SIGTERM)
            fcntl.flock(held, fcntl.LOCK_EX)


def keep(folder, cores, parent):
    """Runs the daemons in `folder`, until SIGTERM or the end of the process `parent`; then no descendant is left."""
    held = os.open(folder / "keeper.pid", os.O_RDWR | os.O_CREAT)  # never closed: the lock lasts as long as the process
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("one runs there already")
    os.truncate(held, 0)
    os.write(held, b"%d" % os.getpid())

    def leave(message=None):
        for number in [signal.SIGTERM, signal.SIGALRM]:
            signal.signal(number, signal.SIG_IGN)  # nothing may interrupt what follows
        sys.exit(message)

    # Whatever a daemon or a job leaves without a parent becomes a child of this process, not of init.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: leave())
    signal.signal(signal.SIGALRM, lambda *_: leave() if parent and os.getppid() != parent else None)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        write_config(folder, cores)
        daemons = start_daemons(folder)
        print("ready", flush=True)
        while True:
            ended, _ = os.waitpid(-1, 0)
            if ended in daemons:
                leave(f"{daemons[ended]} ended: {last_line(folder / f'{daemons[ended]}.log')}")
    finally:
        end_descendants()


def write_config(folder, cores):
    """slurm.conf for this machine, with two free ports, and what the daemons want to find beside it."""
    host = socket.gethostname().partition(".")[0]
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    # Slurm listens at the address of the host's name or everywhere. Everywhere, its key still keeps others out.
    on_loopback = address.startswith("127.")
    memory = psutil.virtual_memory().total // 2**20
    controller_port, node_port = free_ports(2)
    text = CONFIG.format(
        folder=folder,
        user=getpass.getuser(),
        host=host,
        address=address if on_loopback else "127.0.0.1",
        controller_port=controller_port,
        node_port=node_port,
        cores=cores,
        memory=memory,
        memory_per_core=memory // cores,
    )
    if on_loopback:
        text += "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
    for name in ["state", "spool"]:
        shutil.rmtree(folder / name, ignore_errors=True)  # no jobs of an earlier Slurm
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # the one that wants nothing of the machine
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))


def free_ports(count):
    """Ports of 127.0.0.1 that nobody has. By chance, so that several Slurms that start at once choose others."""
    ports = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    sys.exit("no free port")


def start_daemons(folder):
    """Starts munged, slurmctld and slurmd and waits until the node takes jobs. Returns their names by process id."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    variables |= environment(folder) | {"PATH": SEARCH_PATH}
    daemons = {}

    def run(name, *options):
        with open(folder / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [name, *options],
                env=variables,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        daemons[process.pid] = name
        return process

    def wait(ready, processes):
        end = time.monotonic() + START_SECONDS
        while not ready():
            for process in processes:
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{process.args[0]}: {last_line(folder / f'{process.args[0]}.log')}")
            time.sleep(0.05)

    def idle():
        shown = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=variables, capture_output=True, text=True)
        return shown.stdout.strip() == "idle"

    # --force: it asks for folders as on a server, where other users must reach the socket and must not replace the key.
    options = ["--foreground", "--force", "--origin=127.0.0.1", "--socket=munge.socket", "--key-file=munge.key"]
    munged = run("munged", *options, "--pid-file=munged.pid", "--seed-file=munged.seed")
    wait((folder / "munge.socket").exists, [munged])
    slurm_daemons = [run("slurmctld", "-D"), run("slurmd", "-D", "-N", "loopback")]
    wait(idle, [munged, *slurm_daemons])
    return daemons


def last_line(log):
    return log.read_text().strip().rpartition("\n")[2]


def end_descendants():
    """Kills every process below this one, and those that are born meanwhile."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def main():
    match sys.argv[1:]:
        case ["start", folder]:
            try:
                start(folder)
            except RuntimeError as error:
                sys.exit(str(error))
            print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(folder).items()))
        case ["stop", folder]:
            stop(folder)
        case ["keep", folder, cores, parent]:
            keep(Path(folder), int(cores), int(parent))
        case _:
            sys.exit("usage: python tests/slurm_on_loopback.py start|stop FOLDER")


if __name__ == "__main__":
    main()
