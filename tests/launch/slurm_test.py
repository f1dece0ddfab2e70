"""launch/single-node.sbatch on a real Slurm: one controller and one node, from a plain folder."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import time

import pytest
from foretoken.client import Client
from service_helper import FORETOKEN, ROOT, SMALL, make_model, wait_until

PROGRAMS = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "scancel", "scontrol")


def find_program(name):
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a slurmd of its own needs root"),
    pytest.mark.skipif(
        not all(find_program(name) for name in PROGRAMS),
        reason="needs slurmctld, slurmd and slurm-client (launch/setup.sh --tests)",
    ),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Slurm:
    """slurmctld and slurmd on loopback, no authentication, two cores."""

    def __init__(self, folder):
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
        )
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons = []

    def __enter__(self):
        for words in (
            [find_program("slurmctld"), "-D"],
            [find_program("slurmd"), "-D", "-d", find_program("slurmstepd")],
        ):
            self.daemons.append(
                subprocess.Popen(words, env=self.environment, stderr=subprocess.DEVNULL)
            )
        wait_until(lambda: "State=IDLE" in self.call("scontrol", "show", "node"), 60, "an idle node")
        return self

    def __exit__(self, *_):
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait()

    def call(self, *words, **more):
        done = subprocess.run(
            words, env={**self.environment, **more}, capture_output=True, text=True, cwd=self.folder
        )
        return done.stdout

    def job(self, number):
        return self.call("scontrol", "show", "job", number)


def test_the_batch_job_serves_and_drains(tmp_path):
    model = make_model(tmp_path / "tiny")
    with Slurm(tmp_path) as slurm:
        job = slurm.call(
            "sbatch", "--parsable", "--mem=0", ROOT / "launch" / "single-node.sbatch",
            FORETOKEN_JOB_MODEL=str(model), FORETOKEN_JOB_COMMAND=str(FORETOKEN),
            FORETOKEN_JOB_FLAGS=" ".join(SMALL),
        ).strip()  # fmt: skip
        assert job.isdigit()
        endpoint_file = pathlib.Path(tmp_path / f"foretoken-{job}.json")
        try:
            wait_until(endpoint_file.exists, 90, "the endpoint file")
            endpoint = json.loads(endpoint_file.read_text())
            with Client(endpoint["endpoint"], endpoint["key_file"]) as client:
                assert client.status()["tensor_parallel_size"] == 2
                assert len(client.generate("Hello", max_tokens=5, ignore_eos=True).ids) == 5
            slurm.call("scancel", "--signal=TERM", "--batch", job)
            wait_until(lambda: "JobState=COMPLETED" in slurm.job(job), 60, "the job's end")
            assert "ExitCode=0:0" in slurm.job(job)
            assert not endpoint_file.exists()
        finally:
            slurm.call("scancel", job)
            time.sleep(0.5)
            for log in tmp_path.glob("foretoken-*.out"):
                print(log.read_text())
