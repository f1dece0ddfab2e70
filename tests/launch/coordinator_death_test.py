"""The coordinator is killed: what its clients, the service's processes and the next service make of it.

FORETOKEN_KILLS=20 pytest -s does it 20 times, and prints how long things took.
"""

import os
import signal
import statistics
import subprocess
import time

import pytest
from foretoken.client import Client, ServiceError
from service_helper import FORETOKEN, Service, make_model, processes_of, wait_until

KILLS = int(os.environ.get("FORETOKEN_KILLS", "1"))
FLAGS = ("--kv-policy=full", "--tensor-parallel-size=2", "--kv-persist", "--kv-nvme-gib=0.05")
PROMPT = [1 + (3 * place + place * place % 11) % 250 for place in range(400)]  # one segment is reusable
OPTIONS = {"temperature": 0, "ignore_eos": True}


def wait_for_the_disk(client):
    """Until it has the prefix. Counts come with a step: one that needs them."""

    def has_it():
        client.generate([1], max_tokens=1, **OPTIONS)
        return client.status()["kv_nvme"]["slabs_held"] >= 1

    wait_until(has_it, what="the prefix on the disk")


def stream_of_the_command(service):
    command = [FORETOKEN, "generate", *service.connect, "--prompt=x", "--max-tokens=8000", "--ignore-eos"]
    return subprocess.Popen(
        [*map(str, command), "--stream"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def seconds_to_errors(service, client):
    """Of two streams, one of each client library, from the coordinator's death on."""
    command = stream_of_the_command(service)
    stream = client.stream([1, 2, 3], max_tokens=8000, **OPTIONS)
    next(stream)
    wait_until(lambda: client.status()["requests_running"] == 2, what="both streams")
    begin = time.monotonic()
    os.kill(service.pids("foretoken-coordinator")[0], signal.SIGKILL)
    with pytest.raises(ServiceError, match="was lost, and the request with it") as failure:
        for _ in stream:
            pass
    seconds = [time.monotonic() - begin]
    assert failure.value.code == "unavailable"
    _, told = command.communicate(timeout=10)
    seconds.append(time.monotonic() - begin)
    assert command.returncode == 75 and "was lost, and the request with it" in told
    return begin, seconds


def check_end(service):
    """Nothing of the service is left, and it has said why."""
    wait_until(lambda: service.process.poll() is not None and not processes_of(service.folder), 4)
    assert service.process.returncode == 1
    last_line = service.log.read_text().strip().splitlines()[-1]
    assert "the coordinator was ended by signal 9 (Killed)" in last_line


def test_clients_are_told_and_the_next_service_goes_on(tmp_path):
    model = make_model(tmp_path / "tiny", max_position=8192)
    folder = tmp_path / "service"
    folder.mkdir()
    flags = (*FLAGS, f"--kv-nvme-path={folder}/kv", "--kv-nvme-reuse=always")
    ids, seconds = [], {"Client": [], "the command": [], "no process": [], "the next service's answer": []}
    for life in range(KILLS + 1):
        start = time.monotonic()
        with Service(model, *flags, folder=folder) as service:
            with Client(service.endpoint, service.key_file) as client:
                answer = client.generate(PROMPT, max_tokens=24, **OPTIONS)
                if life > 0:
                    seconds["the next service's answer"].append(time.monotonic() - start)
                    assert answer.usage["cached_tokens"] == 256 and answer.ids == ids
                    assert client.status()["kv_nvme"]["slabs_read"] >= 1
                ids = answer.ids
                wait_for_the_disk(client)
                if life == KILLS:
                    break
                assert len(service.pids("foretoken-worker")) == 2
                begin, to_errors = seconds_to_errors(service, client)
                check_end(service)
                seconds["no process"].append(time.monotonic() - begin)
                seconds["Client"].append(to_errors[0])
                seconds["the command"].append(to_errors[1])
    for what, values in seconds.items():
        print(f"{what}: median {statistics.median(values):.3f} s, most {max(values):.3f} s")
    assert max(seconds["Client"] + seconds["the command"]) < 2
