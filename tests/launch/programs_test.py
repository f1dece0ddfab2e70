"""The service's programs, started by hand as docs/operations.md has it."""

import json
import os
import signal
import subprocess
import time

import pytest
from foretoken.client import Client
from service_helper import BIN, make_model, wait_until

PROGRAMS = ("foretoken-kvstore", "foretoken-coordinator", "foretoken-worker")
MPIRUN = ("mpirun", "--bind-to", "none", "--oversubscribe")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_command_line_exits_with_2(program):
    for words in (["--no-such-flag"], []):
        done = subprocess.run([BIN / program, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_exits_with_0(program):
    done = subprocess.run([BIN / program, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert program in done.stdout


def test_what_the_configuration_refuses_exits_with_3(tmp_path):
    words = ["--config", "/nowhere", "--runtime-dir", tmp_path, "--store-socket", "none"]
    done = subprocess.run([BIN / "foretoken-coordinator", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1


class ByHand:
    """A store, a coordinator and two ranks under an mpirun whose parent is none of them."""

    def __init__(self, folder, timeout_s):
        config = {
            "model": str(make_model(folder / "tiny")),
            "device": "cpu",
            "device_memory_gib": 1,
            "tensor_parallel_size": 2,
            "zmq_endpoint": f"ipc://{folder}/client.sock",
        }
        (folder / "config.json").write_text(json.dumps(config))
        self.endpoint = config["zmq_endpoint"]
        self.log = folder / "ranks.log"
        store, worker_socket = folder / "store.sock", folder / "worker.sock"
        self.store = self._start("foretoken-kvstore", "--socket", store, "--arena-bytes", "256MiB")
        self.coordinator = self._start(
            "foretoken-coordinator", "--config", folder / "config.json", "--runtime-dir", folder,
            "--store-socket", store,
        )  # fmt: skip
        worker = [BIN / "foretoken-worker", "--coordinator", f"ipc://{worker_socket}"]
        worker += ["--coordinator-timeout-s", str(timeout_s)]
        with open(self.log, "wb") as log:
            self.ranks = subprocess.Popen(
                [*MPIRUN, "-n", "2", *worker], stdout=log, stderr=log, env={**os.environ, **AS_ROOT}
            )

    @staticmethod
    def _start(program, *words):
        return subprocess.Popen([BIN / program, *words], stdout=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in (self.ranks, self.coordinator, self.store):
            process.kill()
            process.wait()


def test_a_rank_that_is_not_welcome_ends_and_says_so(tmp_path):
    with ByHand(tmp_path, timeout_s=60) as service:
        with Client(service.endpoint, None, silence_timeout=60) as client:
            wait_until(lambda: client.status()["state"] == "ready", what="readiness")
            one_more = [*MPIRUN, "-n", "1", BIN / "foretoken-worker", "--group", "1"]
            one_more += ["--coordinator", f"ipc://{tmp_path}/worker.sock"]
            done = subprocess.run(
                one_more, capture_output=True, text=True, timeout=20, env={**os.environ, **AS_ROOT}
            )
            assert done.returncode == 75 and "turned this rank away: rank 0 of 1 in group 1" in done.stderr
            assert client.generate("x", max_tokens=3, ignore_eos=True).usage["completion_tokens"] == 3


def test_ranks_end_by_themselves_when_their_coordinator_is_gone(tmp_path):
    with ByHand(tmp_path, timeout_s=2) as service:
        with Client(service.endpoint, None, silence_timeout=60) as client:
            wait_until(lambda: client.status()["state"] == "ready", what="readiness")
            time.sleep(4)  # idle for longer than the deadline: a coordinator that lives is heard
            assert service.ranks.poll() is None, service.log.read_text()
            assert client.generate("x", max_tokens=3, ignore_eos=True).usage["completion_tokens"] == 3
            service.coordinator.send_signal(signal.SIGKILL)
            assert service.ranks.wait(20) == 75, service.log.read_text()
        lines = [line for line in service.log.read_text().splitlines() if "was silent for 2 s" in line]
        assert 1 <= len(lines) <= 2  # one a rank, where mpirun leaves the second the time
