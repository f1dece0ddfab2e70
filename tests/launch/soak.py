"""A service under load while things fail: a random fault every few seconds (docs: R20 of the promises,
CPU device).

    PYTHONPATH=client/python python3 tests/launch/soak.py [--minutes 30] [--period 10] [--seed N]
                                                          [--json FILE]

Two ranks, an NVMe tier, a random model. Four clients stream dense answers again and again. Every answer
must be the one without faults, or end with an error of the service that says why; meanwhile no process
that lives on may grow. Faults: a rank killed, or stopped for good (at most every 150 s together: a group
restarts five times in ten minutes); any process stopped for half a second; bits flipped in the arena; a
disk that fails or stands still for a while; a client that vanishes; malformed frames. Exit code 1 where
something isn't as promised.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time

import arena_faults_test as memory
from foretoken.client import Client, ServiceError
from service_helper import Service, faulty_disk, make_model, processes_of, wait_until
from service_test import MALFORMED

CLIENTS = 4
PROMPTS = 12
OPTIONS = {"max_tokens": 120, "temperature": 0, "ignore_eos": True}
FLAGS = ("--kv-policy=full", "--kv-resident=never", "--tensor-parallel-size=2", "--max-model-len=2048")
SIZE = ("--device=cpu", "--kv-host-gib=0.03", "--device-memory-gib=1")
SILENCE = 120  # s: a client that hears nothing for so long hangs
BETWEEN_RESTARTS = 150  # s
LASTING = ("foretoken", "foretoken-coordinator", "foretoken-kvstore")  # whom no fault ends
GROWTH = 0.01
ALLOCATOR_KIB = 1024  # what an allocator may hold more of at one moment than at another


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, service, answers, seed):
        self.done = 0
        self.errors = {}  # of the service, by their code
        self.wrong = []  # what must not be
        self._service = service
        self._answers = answers
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed + n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed):
        dice = random.Random(seed)
        with Client(self._service.endpoint, self._service.key_file, silence_timeout=SILENCE) as client:
            while not self._stop.is_set():
                number = dice.randrange(PROMPTS)
                try:
                    if client.generate(memory.prompt(number), **OPTIONS).ids != self._answers[number]:
                        self.wrong.append(f"other tokens for prompt {number}")
                    self.done += 1
                except ServiceError as error:
                    self.errors[error.code] = self.errors.get(error.code, 0) + 1
                    if "does not answer" in str(error):
                        self.wrong.append(f"no word for {SILENCE} s")
                except Exception as error:  # a thread has nobody to throw to
                    self.wrong.append(repr(error))
                    return

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * SILENCE)
            if thread.is_alive():
                self.wrong.append("a client hangs")


class Faults:
    """Each makes one, and returns what to do before the next."""

    def __init__(self, service, told, dice):
        self._service = service
        self._told = told
        self._dice = dice
        self._restarted = -BETWEEN_RESTARTS
        self.made = {}

    def make(self):
        restarting = ["kill", "stop"] if time.monotonic() - self._restarted > BETWEEN_RESTARTS else []
        kind = self._dice.choice(["pause", "flip", "disk", "vanish", "malformed", *restarting])
        if kind in restarting:
            self._restarted = time.monotonic()
        self.made[kind] = self.made.get(kind, 0) + 1
        getattr(self, f"_{kind}")()
        return kind

    def _send(self, number, program):
        pids = self._service.pids(program)
        if pids:  # else a fault before has ended it, and it is on its way
            os.kill(self._dice.choice(pids), number)

    def _kill(self):
        self._send(signal.SIGKILL, "foretoken-worker")

    def _stop(self):
        self._send(signal.SIGSTOP, "foretoken-worker")

    def _pause(self):
        pids = self._service.pids(self._dice.choice(("foretoken-worker", *LASTING)))
        if not pids:
            return
        pid = self._dice.choice(pids)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass  # its group has ended meanwhile

    def _flip(self):
        arena = memory.Arena(self._service)
        for _ in range(self._dice.randint(1, 64)):
            layer, head, block = self._dice.choice(memory.PLACES)
            at = arena.block(layer, head, block, self._dice.randrange(arena.num_slabs))
            arena.flip(at + self._dice.randrange(memory.BLOCK), self._dice.randrange(8))
        arena.close()

    def _disk(self):
        fault = self._dice.choice(("eio", "short", "stall", "slow"))
        self._told.write_text(f"{fault} {self._dice.choice((1, 10, 100))}")
        threading.Timer(5, lambda: self._told.write_text("")).start()

    def _vanish(self):
        with Client(self._service.endpoint, self._service.key_file, silence_timeout=SILENCE) as client:
            next(iter(client.stream(memory.prompt(0), **OPTIONS)), None)

    def _malformed(self):
        with Client(self._service.endpoint, self._service.key_file) as client:
            for frame in MALFORMED.values():
                client._socket.send(frame)
            client._socket.poll(10_000)


def footprint(service):
    """Of the processes that live on: KiB of their own, KiB shared, open files."""
    own = shared = files = 0
    for pid in [service.process.pid, *(pid for name in LASTING[1:] for pid in service.pids(name))]:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        own += int(re.search(r"RssAnon:\s+(\d+)", status)[1])
        shared += int(re.search(r"RssShmem:\s+(\d+)", status)[1])
        files += len(os.listdir(f"/proc/{pid}/fd"))
    return {"own_kib": own, "shared_kib": shared, "files": files}


def growth_of(samples):
    """From the second fifth of a run to its last: {what: (before, after)}."""
    fifth = max(1, len(samples) // 5)
    parts = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
    return {key: [statistics.median(one[key] for one in part) for part in parts] for key in samples[0]}


def too_much(growth):
    slack = {"own_kib": ALLOCATOR_KIB, "shared_kib": 0, "files": 1}
    return [key for key, (before, after) in growth.items() if after > before * (1 + GROWTH) + slack[key]]


def run_faults(service, told, minutes, period, seed):
    """What was done, and what went wrong."""
    with Client(service.endpoint, service.key_file, silence_timeout=SILENCE) as client:
        answers = [client.generate(memory.prompt(number), **OPTIONS).ids for number in range(PROMPTS)]
    load = Load(service, answers, seed)
    faults = Faults(service, told, random.Random(seed))
    samples = []
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end and not load.wrong and service.process.poll() is None:
        next_fault = time.monotonic() + period
        kind = faults.make()
        print(f"{kind}: {load.done} answers, errors {load.errors}", flush=True)
        time.sleep(max(0.0, next_fault - time.monotonic()))
        samples.append(footprint(service))
    load.stop()
    growth = growth_of(samples)
    wrong = load.wrong + [f"{key} grew: {growth[key]}" for key in too_much(growth)]
    return {"answers": load.done, "errors": load.errors, "faults": faults.made, "growth": growth}, wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--period", type=float, default=10)
    parser.add_argument("--seed", type=int, default=20261129)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ft-soak-") as folder:
        told = pathlib.Path(folder) / "faults"
        told.write_text("")
        model = memory.small_model(pathlib.Path(folder) / "model")
        flags = (*FLAGS, f"--kv-nvme-path={folder}/kv", "--kv-nvme-gib=0.1")
        with faulty_disk(told), Service(model, *flags, size=SIZE) as service:
            result, wrong = run_faults(service, told, arguments.minutes, arguments.period, arguments.seed)
            log = service.log.read_text()
            if service.process.poll() is not None or service.stop() != 0:
                wrong.append(f"the service ended with {service.process.returncode}")
            wait_until(lambda: not processes_of(service.folder), 10, "the end of all processes")
    result |= {"seed": arguments.seed, "wrong": wrong}
    print(json.dumps(result, indent=1))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=1))
    if wrong:
        print(log[-5000:], file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
