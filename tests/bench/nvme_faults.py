"""What a failing disk costs those who don't use it (docs: R6 of the promises, CPU device).

    PYTHONPATH=client/python:tests/launch python3 tests/bench/nvme_faults.py [--rounds 5]
        [--seconds 4] [--faults eio:1 eio:100 ...] [FLAGS...]

One service with an NVMe tier on tests/launch/faulty_disk.cc. One client streams tokens of a prompt
without a whole segment, which the tier never holds; two more ask for prefixes that the arena has
given up, twice a second each. In turns the disk works, the disk fails (the same service), and a
service without a tier has the same load: three turns a round. A row says, for the stream: 50th and
99th percentile of the time from token to token, ms, of each kind of turn, and the ratios failing to
working and failing to none: medians over rounds. All tokens of all clients must be those of the
service without a tier. What a disk does not give is computed, so the stream's steps have more of
others' prompts in them: that is what the third turn is for, and --max-inter-token-ms says how much
at a time. FLAGS go to every service.
"""

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import statistics
import tempfile
import time

from foretoken.client import Client
from service_helper import Service, faulty_disk, make_model, wait_until

SIZE = ("--device=cpu", "--kv-host-gib=0.006", "--device-memory-gib=1")  # 16 slabs
# A thread, so that the clients have a core, and the bound on a step is kept.
BASE = ("--kv-policy=full", "--max-inter-token-ms=2", "--threads-per-rank=1")
PREFIXES = 24  # of a segment each: in turns, the arena never has the next one
PERIOD = 0.5  # s, of a reader
OPTIONS = {"temperature": 0, "ignore_eos": True}
STREAM = {**OPTIONS, "max_tokens": 150}
READER = {**OPTIONS, "max_tokens": 4}


def prompt(number, length=400):
    return [1 + (7 * number + 3 * place + place * place % 11) % 250 for place in range(length)]


def read_prefixes(endpoint, key_file, first, answers, is_over, ended):
    """Asks for one prefix after the other; puts whether every answer was right, and the number."""
    number, count, same = first, 0, True
    with Client(endpoint, key_file, silence_timeout=60) as client:
        while not is_over.is_set():
            due = time.monotonic() + PERIOD
            ids = client.generate(prompt(number), **READER).ids
            same = same and ids == answers[number]
            count += 1
            number = (number + 2) % PREFIXES
            is_over.wait(max(0, due - time.monotonic()))
    ended.put((same, count))


@contextlib.contextmanager
def readers(service, answers):
    """Two of them, and what they say at the end in the list that this gives."""
    is_over, ended, said = multiprocessing.Event(), multiprocessing.Queue(), []
    processes = [
        multiprocessing.Process(
            target=read_prefixes,
            args=(service.endpoint, service.key_file, first, answers, is_over, ended),
        )
        for first in range(2)
    ]
    for process in processes:
        process.start()
    try:
        yield said
    finally:
        is_over.set()
        said += [ended.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()


def stream(client, seconds, wanted):
    """Times from token to token, ms, of streams for so long."""
    gaps = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ids, last = [], None
        for piece in client.stream(prompt(1000, 32), **STREAM):
            now = time.monotonic()
            gaps += [] if last is None or not piece.ids else [(now - last) * 1e3]
            last = now if piece.ids else last
            ids += piece.ids
        assert ids == wanted, "a stream that has nothing of the tier has other tokens"
    return gaps


def percentiles(gaps):
    cuts = statistics.quantiles(gaps, n=100)
    return cuts[49], cuts[98]


class Side:
    """A service and the client that streams from it."""

    def __init__(self, service, answers, wanted):
        self.service, self.answers, self.wanted = service, answers, wanted
        self.client = Client(service.endpoint, service.key_file, silence_timeout=60)

    def tier(self):
        return self.client.status()["kv_nvme"]

    def ask_for_all(self):
        for number, ids in enumerate(self.answers):
            assert self.client.generate(prompt(number), **READER).ids == ids

    def turn(self, seconds):
        """Percentiles of the stream, and how many requests the readers made."""
        with readers(self.service, self.answers) as said:
            gaps = stream(self.client, seconds, self.wanted)
        assert all(same for same, _ in said), "a reader of the tier has other tokens"
        return percentiles(gaps), sum(count for _, count in said)


def is_online(side):
    """Asks for all that the tier should have, so that it is tried again, and has it."""
    before = side.tier()["slabs_read"]
    side.ask_for_all()
    tier = side.tier()
    return tier["state"] == "online" and tier["slabs_read"] - before > PREFIXES / 2


def measure(fault, told, side, plain, options):
    """A row: turns with a disk that works, one that fails, and without a tier."""
    turns, states, errors = [], set(), 0
    for _ in range(options.rounds):
        wait_until(lambda: is_online(side), timeout=120, what="a tier that works again")
        working = side.turn(options.seconds)
        before = side.tier()
        told.write_text(fault.replace(":", " "))
        failing = side.turn(options.seconds)
        states.add(side.tier()["state"])
        errors += side.tier()["io_errors"] - before["io_errors"]
        told.write_text("")
        turns.append((working, failing, plain.turn(options.seconds)))
    row = {"fault": fault, "readers": [sum(turn[1] for turn in kind) for kind in zip(*turns)]}
    for place, name in ((0, "p50"), (1, "p99")):
        times = [[percentile[place] for percentile, _ in kinds] for kinds in turns]
        row[f"{name}_ms"] = [round(statistics.median(kind), 2) for kind in zip(*times)]
        for other, what in ((0, "working"), (2, "no_tier")):
            ratio = statistics.median(kinds[1] / kinds[other] for kinds in times)
            row[f"{name}_to_{what}"] = round(ratio, 3)
    return row | {"io_errors": errors, "states": sorted(states)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--faults", nargs="+", help="KIND:PERCENT",
                        default=[f"{kind}:{share}" for kind in ("eio", "short", "stall")
                                 for share in (1, 100)])  # fmt: skip
    options, flags = parser.parse_known_args()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_model(folder / "model", hidden_size=384, num_attention_heads=6,
                           intermediate_size=1024, num_hidden_layers=6)  # fmt: skip
        plain = stack.enter_context(Service(model, *BASE, *flags, size=SIZE))
        with Client(plain.endpoint, plain.key_file, silence_timeout=60) as client:
            answers = [client.generate(prompt(n), **READER).ids for n in range(PREFIXES)]
            wanted = client.generate(prompt(1000, 32), **STREAM).ids
        told = folder / "faults"
        told.write_text("")
        tier = (f"--kv-nvme-path={folder}/kv", "--kv-nvme-gib=0.05", "--kv-nvme-reuse=always")
        with faulty_disk(told):
            service = stack.enter_context(Service(model, *BASE, *tier, *flags, size=SIZE))
        sides = [Side(each, answers, wanted) for each in (service, plain)]
        for fault in options.faults:
            print(json.dumps(measure(fault, told, *sides, options)), flush=True)


if __name__ == "__main__":
    main()
