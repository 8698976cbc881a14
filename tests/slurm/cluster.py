"""A throw-away SLURM cluster of several nodes on this one machine, for tests and for trying things out.

    with Cluster(folder) as cluster:
        subprocess.run(["sbatch", "--wrap", "hostname"], env=os.environ | cluster.environment)

No systemd, no cgroups, no accounting database, GPUs that are only counted. Its ports are free ones and its munge key
and socket its own, so that several clusters and one of the machine's own stand side by side; it runs as root or not,
and it stops exactly the processes that it started. `python -m tests.slurm.cluster FOLDER` keeps one up until Ctrl-C.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scontrol", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/local/sbin"])
UP = {"idle", "mixed", "allocated", "completing"}

CONFIG = """
ClusterName=rlhf
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job may start again when its old credential has expired: by default after 2 minutes
AuthInfo=socket={root}/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType={completion}
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# more CPUs than the machine has
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# else --signal does not reach the steps of a job that is preempted
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait={kill_wait}
MinJobAge={min_job_age}
ReturnToService=2
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=60
OverTimeLimit=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
"""
PARTITIONS = """
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs of SLURM and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def free_ports(number: int) -> list[int]:
    """Ports that nobody has now; all are held until the last is found, so that they differ."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _pid(file: Path) -> int | None:
    """What a daemon wrote; None: not yet, or it has ended and taken the file away."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


class Cluster:
    """Nodes n1, n2 ... with partitions low (default; jobs are preempted by requeueing) and high."""

    def __init__(
        self,
        folder: str | Path,
        nodes: int = 2,
        cpus: int = 8,
        gpus: int = 2,
        grace: int = 20,
        kill_wait: int = 10,
        min_job_age: int = 300,
        completion_file: bool = True,
    ):
        """folder: where everything of it is written. cpus, gpus: of each node, whatever the machine has.

        grace: seconds that a preempted job has. kill_wait: seconds between SIGTERM and SIGKILL. min_job_age:
        seconds that SLURM remembers a finished job. completion_file: whether finished jobs are written to one.
        """
        self.root = Path(folder).absolute()
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.cpus, self.gpus = cpus, gpus
        completion = f"jobcomp/filetxt\nJobCompLoc={self.root}/log/jobcomp.txt"
        self.settings = {
            "grace": grace,
            "kill_wait": kill_wait,
            "min_job_age": min_job_age,
            "completion": completion if completion_file else "jobcomp/none",
        }
        self.started: dict[str, Path] = {}  # process -> file in which it writes its pid

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need to find this cluster; SLURM's own variables may not lead elsewhere."""
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": PATH}

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start munge, the controller and the nodes, and wait until the nodes are there (a second or two)."""
        for name in ("munge", "state", "spool", "log", "run"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        self._write()
        self._munge()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        """Cancel what runs, then end the processes that `start` started."""
        if "slurmctld" in self.started:
            self.run("scancel", "--quiet", "--full", "--user", getpass.getuser(), check=False)
        for name in sorted(self.started, key=lambda name: (name == "munged", name == "slurmctld")):
            self._end(name)

    def run(self, *words: str, check: bool = True, timeout: float = 30) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(
            words,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}\n{self.logs()}"
            )
        return done.stdout

    # ------------------------------------------------------------ what tests do to it

    def start_controller(self) -> None:
        self._daemon("slurmctld", ["slurmctld", "-i"], self.root / "run" / "slurmctld.pid")

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def start_node(self, node: str) -> None:
        (self.root / "spool" / node).mkdir(exist_ok=True)
        self._daemon(f"slurmd {node}", ["slurmd", "-N", node], self.root / "run" / f"slurmd-{node}.pid")

    def set_node(self, node: str, state: str) -> None:
        """down or resume, as an administrator does it; one that has come back by itself need not be resumed."""
        words = ("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")
        self.run(*words, check=state != "resume")

    def wait_for_nodes(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            lines = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
            up = {line.split()[0] for line in lines if line.split()[1].rstrip("*~#") in UP}
            if up >= set(self.nodes):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the nodes did not come up: {lines}\n{self.logs()}")

    def logs(self) -> str:
        """The ends of the daemons' logs, for a message."""
        ends = []
        for path in sorted((self.root / "log").glob("*.log")):
            ends += [f"== {path.name}", *path.read_text(errors="replace").splitlines()[-8:]]
        return "\n".join(ends)

    # ------------------------------------------------------------ how

    def _write(self) -> None:
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        port, *node_ports = free_ports(1 + len(self.nodes))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 95 // 100 // 2**20  # MiB
        lines = [CONFIG.format(root=self.root, host=host, user=user, port=port, **self.settings)]
        for node, node_port in zip(self.nodes, node_ports, strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={self.cpus} "
                f"RealMemory={memory} Gres=gpu:{self.gpus} State=UNKNOWN"
            )
        lines.append(PARTITIONS.format(**self.settings))
        (self.root / "slurm.conf").write_text("\n".join(lines))
        for number in range(self.gpus):  # SLURM looks whether the device is there, and no further
            (self.root / f"gpu{number}").touch()
        files = f"{self.root}/gpu[0-{self.gpus - 1}]"
        (self.root / "gres.conf").write_text(f"Name=gpu File={files}\n" if self.gpus else "")

    def _munge(self) -> None:
        folder = self.root / "munge"
        folder.chmod(0o711)
        key = folder / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
        words = ["munged", "--force", f"--key-file={key}", f"--socket={folder}/sock", "--num-threads=2"]
        words += [f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed"]
        self._daemon("munged", words, folder / "pid")

    def _daemon(self, name: str, words: list[str], pid_file: Path) -> None:
        """Start a daemon, which goes into the background by itself, and note its process."""
        pid_file.unlink(missing_ok=True)
        self.started[name] = pid_file
        self.run(*words)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if _pid(pid_file) is not None:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{name} did not start\n{self.logs()}")

    def _end(self, name: str) -> None:
        pid = _pid(self.started.pop(name))
        if pid is None or not alive(pid):
            return
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.05)
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def main(folder: str) -> None:
    with Cluster(folder) as cluster:
        print(f"up: {', '.join(cluster.nodes)}; export SLURM_CONF={cluster.root}/slurm.conf", flush=True)
        # only now: the daemons would inherit it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main(*sys.argv[1:])
