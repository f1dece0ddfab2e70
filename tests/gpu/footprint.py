"""Whether a benchmark's service grows while it decodes: a filter for what the benchmark prints.

    foretoken bench decode --json ... | python3 tests/gpu/footprint.py

Samples the GPUs' memory in use and the memory that is the ranks' own (RssAnon) until its input ends, and
adds both to the JSON object that came: as they were at half the time, and at the end. Exit code 1 where
either has grown by more than an allocator may, or where too little was sampled.
"""

import json
import pathlib
import re
import statistics
import subprocess
import sys
import threading

PERIOD = 1.0  # s: nvidia-smi itself takes a step or two
MOST_GROWTH_MIB = {"device_mib": 2, "ranks_mib": 8}  # a leak of a KB a step would be 10 MiB (guessed)
LEAST_SAMPLES = 20


def device_mib():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) for line in subprocess.check_output(query, text=True).split())


def ranks_mib():
    """None where there are no ranks."""
    found = []
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if text.startswith("Name:\tforetoken-worke"):
            found.append(re.search(r"RssAnon:\s+(\d+)", text))
    return sum(int(own[1]) for own in found) / 1024 if found and all(found) else None


def sample(samples, stop):
    while not stop.wait(PERIOD):
        ranks = ranks_mib()
        if ranks is not None:
            samples.append({"device_mib": device_mib(), "ranks_mib": ranks})


def figures_of(samples):
    """Without the last two: the service may be ending."""
    samples = samples[:-2]
    few = max(1, len(samples) // 10)
    middle = len(samples) // 2
    parts = {"half": samples[middle : middle + few], "end": samples[-few:]}
    return {
        key: {name: statistics.median(one[key] for one in part) for name, part in parts.items()}
        for key in MOST_GROWTH_MIB
    }


def main():
    samples, stop = [], threading.Event()
    sampling = threading.Thread(target=sample, args=(samples, stop))
    sampling.start()
    result = json.loads(sys.stdin.read() or "{}")
    stop.set()
    sampling.join()
    enough = len(samples) >= LEAST_SAMPLES
    footprint = figures_of(samples) if enough else {}
    grown = [key for key, at in footprint.items() if at["end"] - at["half"] > MOST_GROWTH_MIB[key]]
    result["footprint"] = {"samples": len(samples), **footprint, "grown": grown}
    print(json.dumps(result))
    sys.exit(1 if grown or not enough else 0)


if __name__ == "__main__":
    main()
