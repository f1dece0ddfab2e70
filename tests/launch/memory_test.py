"""Too little memory for all requests at once: the service runs under a cgroup's limit of a tenth more
than it is configured for, and more is asked of it than its arena and its device hold. It is never
killed; requests wait, or are refused, and their tokens are those of a service with room for all.

FORETOKEN_MEMORY_ROUNDS sets how many times all prompts are asked (1)."""

import collections
import contextlib
import os
import pathlib
import re
import threading
import time

import pytest
from foretoken.client import Client, ServiceError
from service_helper import Service, make_model, wait_until

ROUNDS = int(os.environ.get("FORETOKEN_MEMORY_ROUNDS", "1"))
ARENA_GIB, DEVICE_GIB = 0.025, 0.06  # 50 segments of two heads; four sequences or so
CONFIGURED = int((ARENA_GIB + DEVICE_GIB) * 2**30)
FLAGS = ("--kv-policy=full", "--max-model-len=16384", "--max-num-seqs=16", "--max-waiting=12")
TIGHT = ("--device=cpu", f"--kv-host-gib={ARENA_GIB}", f"--device-memory-gib={DEVICE_GIB}")
ROOMY = ("--device=cpu", "--kv-host-gib=0.5", "--device-memory-gib=1")
OPTIONS = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
PROMPTS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(
        tmp_path_factory.mktemp("models") / "small",
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=96,
        num_hidden_layers=4,
        max_position=16384,
    )


def prompt(number):
    length = 600 + 97 * number % 2200
    return [1 + (7 * number + 3 * place + place * place % 101) % 250 for place in range(length)]


class MemoryGroup:
    """A cgroup below ours that a service is put into, of either version."""

    def __init__(self, name):
        rows = [row.split(":", 2) for row in pathlib.Path("/proc/self/cgroup").read_text().splitlines()]
        self._is_v1 = any("memory" in controllers.split(",") for _, controllers, _ in rows)
        owner = next(
            path for _, controllers, path in rows
            if ("memory" in controllers.split(",") if self._is_v1 else not controllers)
        )  # fmt: skip
        root = pathlib.Path("/sys/fs/cgroup", "memory") if self._is_v1 else pathlib.Path("/sys/fs/cgroup")
        self._folder = root / owner.lstrip("/") / name
        try:
            self._folder.mkdir()
            self._limit_file = self._file("memory.limit_in_bytes", "memory.max")
            assert self._limit_file.exists()
        except (OSError, AssertionError) as reason:
            with contextlib.suppress(OSError):
                self._folder.rmdir()
            pytest.skip(f"no cgroup with a memory limit can be made here: {reason!r}")

    def _file(self, v1, v2):
        return self._folder / (v1 if self._is_v1 else v2)

    @property
    def under(self):
        """For Service: a command that runs another one in this group."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', self._folder / "cgroup.procs")

    def limit(self, count):
        self._limit_file.write_text(str(count))

    def _stat(self, name):
        rows = (self._folder / "memory.stat").read_text().splitlines()
        return int(next(row.split()[1] for row in rows if row.split()[0] == name))

    def own_bytes(self):
        """What processes have that is no file's and no shared memory."""
        return self._stat("total_rss" if self._is_v1 else "anon")

    def peak_bytes(self):
        return int(self._file("memory.max_usage_in_bytes", "memory.peak").read_text())

    def kills(self):
        rows = self._file("memory.oom_control", "memory.events").read_text().splitlines()
        return sum(int(row.split()[1]) for row in rows if row.split()[0] == "oom_kill")

    def close(self):
        wait_until(lambda: not (self._folder / "cgroup.procs").read_text(), what="the group's end")
        self._folder.rmdir()


@contextlib.contextmanager
def memory_group(name):
    group = MemoryGroup(f"ft-{name}-{os.getpid()}")
    try:
        yield group
    finally:
        group.close()


def used_device_bytes(service):
    """Of a service without a request: what its device memory is planned for, but sequences."""
    free, whole = (
        float(re.search(rf"^  {what} +([0-9.]+)$", service.log.read_text(), re.M)[1])
        for what in ("free, for sequences", "in all")
    )
    return int((whole - free) * 2**20)


@pytest.fixture(scope="module")
def answers(model):
    with Service(model, *FLAGS, size=ROOMY) as service:
        with Client(service.endpoint, service.key_file, silence_timeout=120) as client:
            return [client.generate(prompt(number), **OPTIONS).ids for number in range(PROMPTS)]


@pytest.fixture(scope="module")
def base(model):
    """What the service's processes take beside arena and device memory."""
    with memory_group("base") as group:
        with Service(model, *FLAGS, size=TIGHT, under=group.under) as service:
            with Client(service.endpoint, service.key_file) as client:
                client.generate(prompt(0)[:64], **OPTIONS)
            return group.own_bytes() - used_device_bytes(service)


class Crowd:
    """Clients that ask all at once, and again where they are refused."""

    def __init__(self, service, answers):
        self._service = service
        self._answers = answers
        self.wrong = []
        self.told = collections.Counter()

    def ask_all(self):
        threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(PROMPTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask(self, number):
        with Client(self._service.endpoint, self._service.key_file, silence_timeout=300) as client:
            for _ in range(1000):
                try:
                    ids = client.generate(prompt(number), **OPTIONS).ids
                except ServiceError as refusal:
                    self.told[refusal.code] += 1
                    if refusal.code != "exhausted":
                        return self.wrong.append(f"{number}: {refusal}")
                    time.sleep(0.1)
                    continue
                self.told["done"] += 1
                if ids != self._answers[number]:
                    self.wrong.append(f"{number}: other tokens")
                return
            self.wrong.append(f"{number}: refused for ever")


def watch(client, ended, seen):
    while not ended.is_set():
        status = client.status()
        seen["waiting"] = max(seen["waiting"], status["requests_waiting"])
        seen["slabs"] = max(seen["slabs"], status["kv_slabs_used"])
        ended.wait(0.05)


def test_a_limit_of_a_tenth_more_than_configured_kills_nobody(model, answers, base):
    with memory_group("limited") as group:
        group.limit(int(1.1 * (CONFIGURED + base)))
        with Service(model, *FLAGS, size=TIGHT, under=group.under) as service:
            with Client(service.endpoint, service.key_file, silence_timeout=300) as client:
                total = client.status()["kv_slabs_total"]
                with pytest.raises(ServiceError) as refusal:  # more than the arena ever holds
                    client.generate([1 + place % 250 for place in range(14000)], **OPTIONS)
                assert "can never fit" in str(refusal.value)

                crowd, ended, seen = Crowd(service, answers), threading.Event(), collections.Counter()
                watcher = threading.Thread(target=watch, args=(client, ended, seen))
                watcher.start()
                for _ in range(ROUNDS):
                    crowd.ask_all()
                ended.set()
                watcher.join()
                assert crowd.wrong == []
                assert crowd.told["done"] == ROUNDS * PROMPTS
                assert crowd.told["exhausted"] > 0 and seen["waiting"] > 0
                assert seen["slabs"] > total / 2
                wait_until(lambda: client.status()["kv_slabs_used"] == 0, what="slabs that are free")
                assert client.status()["worker_restarts"] == 0
            print(f"base {base >> 20} MiB, peak {group.peak_bytes() >> 20} MiB, {dict(crowd.told)}, {seen}")
            assert group.kills() == 0
            assert service.stop() == 0
