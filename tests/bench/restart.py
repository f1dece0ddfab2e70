"""How long a stream stands still when a rank is killed, with and without --keep-weights, in turns.

    python3 tests/bench/restart.py MODEL [--rounds N] [--cold] [FLAGS OF serve]

Prints a JSON line a round: the longest wait of the stream for a token, and what the log says of the
load meanwhile. --cold drops the model's files from the page cache before the kill, as a node does
that needs the memory.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "launch")]
from foretoken.client import Client  # noqa: E402
from service_helper import Service, wait_until  # noqa: E402

LOADED = re.compile(r"weights: ([\d.]+) GB in ([\d.]+) s \(([\d.]+) GB/s\) from ([a-z ]+)")
COPIED = re.compile(r"weights: the store keeps a copy: ([\d.]+) GB in ([\d.]+) s")


def drop_from_page_cache(folder):
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model, flags, keep, cold):
    flags = [*flags, "--keep-weights"] if keep else flags
    with Service(model, *flags, size=()) as running:
        log = running.log.read_text
        if keep:
            wait_until(lambda: COPIED.search(log()), timeout=300, what="the copy")
        with Client(running.endpoint, running.key_file, silence_timeout=120) as client:
            stream = client.stream("Once upon a time", max_tokens=24, temperature=0, ignore_eos=True)
            next(stream)
            # The first loading's pages are nobody's now: a serving rank has no file mapped.
            if cold:
                drop_from_page_cache(model)
            os.kill(running.pids("foretoken-worker")[0], signal.SIGKILL)
            arrivals = [time.monotonic()] + [time.monotonic() for piece in stream if piece.ids]
            stood_still = max(b - a for a, b in zip(arrivals, arrivals[1:]))
            assert client.status()["worker_restarts"] == 1
        gigabytes, seconds, rate, source = LOADED.findall(log())[-1]
        copied = COPIED.search(log())
    return {
        "keep_weights": keep,
        "cold": cold,
        "stood_still_s": round(stood_still, 2),
        "load": {"gb": float(gigabytes), "s": float(seconds), "gb_per_s": float(rate), "from": source},
        "copy_s": float(copied[2]) if copied else None,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    options, flags = parser.parse_known_args()
    for _ in range(options.rounds):
        for keep in (False, True):
            print(json.dumps(measure(options.model, flags, keep, options.cold)), flush=True)


if __name__ == "__main__":
    main()
