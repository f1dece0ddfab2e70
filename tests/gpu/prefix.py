"""How long a prefix that the store has makes a request wait: one in host memory; one on NVMe, whose place
in host memory others have taken, and after a restart of the whole service.

    python3 tests/gpu/prefix.py --bin FOLDER --model FOLDER --nvme FOLDER [--length TOKENS]
                                [--host-gib SIZE] [--device cuda|cpu] [--json FILE]

Beside them: the same prompt computed, a prompt as long as what is always computed behind a prefix, and
how fast the tier's file is read past the page cache. Times are what the client sees to the first token,
the least of --repeat requests. Takes a minute on a GPU. Exit code 1 where fewer tokens than should be
come from the store, or other tokens come out.
"""

import argparse
import concurrent.futures
import json
import mmap
import os
import pathlib
import sys
import tempfile
import time

from faults import Checks
from service import Service

SEGMENT = 256
TAIL = 64  # always computed
OTHERS = 4  # prompts of the same length, which take all of the arena
READ_BYTES = 4 << 20
READERS = 8


class TieredService(Service):
    """With an NVMe tier that outlives it."""

    def __init__(self, arguments, folder):
        cuda = arguments.device == "cuda"
        flags = [
            arguments.model, f"--device={arguments.device}", "--load-format=dummy", "--kv-policy=full", "--port=0",
            f"--max-model-len={arguments.length + SEGMENT}", f"--kv-nvme-gib={40 if cuda else 1}",
            f"--kv-host-gib={arguments.host_gib or (12 if cuda else 0.25)}", f"--kv-nvme-path={arguments.nvme}",
            "--kv-persist", "--kv-nvme-reuse=always", "--max-batched-tokens=8192",
        ]  # fmt: skip
        super().__init__(f"{arguments.bin}/foretoken", folder, flags)

    def ask(self, ids):
        return super().ask(ids, "--max-tokens=4")

    def tier(self):
        return self.run("status")["kv_nvme"]

    def wait_until_written(self):
        """All that is complete is on NVMe, too."""
        held = -1
        for _ in range(600):
            time.sleep(0.5)
            now = self.tier()["slabs_held"]
            if now == held > 0:
                return
            held = now

    def ask_counted(self, ids):
        """The answer, and how many slabs it took from NVMe."""
        before = self.tier()["slabs_read"]
        return self.ask(ids) | {"slabs_read": self.tier()["slabs_read"] - before}


def read_rate(path, most):
    """GB/s of the file's first bytes, past the page cache, several reads at a time."""
    size = min(path.stat().st_size, most) // READ_BYTES * READ_BYTES

    def read(offset):
        buffer = mmap.mmap(-1, READ_BYTES)  # aligned
        return os.preadv(file, [buffer], offset)

    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            done = sum(pool.map(read, range(0, size, READ_BYTES)))
        return done * 1e-9 / (time.monotonic() - begin)
    finally:
        os.close(file)


def prompt_of(length, seed):
    return [1 + (place * place + seed * place + seed) % 241 for place in range(length)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--nvme", required=True, type=pathlib.Path)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--host-gib", type=float, help="less than a prompt takes: it then runs from NVMe")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    arguments.nvme.mkdir(mode=0o700, parents=True, exist_ok=True)
    checks = Checks()
    cached = (arguments.length - TAIL) // SEGMENT * SEGMENT
    prompt = prompt_of(arguments.length, 3)
    with tempfile.TemporaryDirectory(prefix="ft-prefix-") as folder:
        with TieredService(arguments, folder) as service:
            service.ask(prompt_of(arguments.length, 5))  # what a first request pays once
            computed = service.ask(prompt)
            suffixes = [service.ask(prompt_of(arguments.length - cached, 7 + i)) for i in range(arguments.repeat)]
            hits = [service.ask_counted(prompt) for _ in range(arguments.repeat)]
            service.wait_until_written()
            for seed in range(OTHERS):
                service.ask(prompt_of(arguments.length, 37 + seed))
                service.wait_until_written()
            from_nvme = service.ask_counted(prompt)
        with TieredService(arguments, folder) as service:
            service.ask(prompt_of(arguments.length - cached, 31))
            restarted = service.ask_counted(prompt)
    places = {"host memory": hits, "NVMe": [from_nvme], "NVMe, after a restart": [restarted]}
    for name, answers in places.items():
        found = {
            "cached_tokens": [answer["usage"]["cached_tokens"] for answer in answers],
            "equal_tokens": all(answer["token_ids"] == computed["token_ids"] for answer in answers),
            "from_nvme": sorted({answer["slabs_read"] > 0 for answer in answers}),
        }
        ok = found == {
            "cached_tokens": [cached] * len(answers),
            "equal_tokens": True,
            "from_nvme": [name != "host memory"],
        }
        checks.expect(f"a prefix comes from {name}", ok, found)
    bytes_of_token = computed["kv"]["full_kv_bytes"] / (arguments.length + len(computed["token_ids"]))
    gigabytes = cached * bytes_of_token * 1e-9
    file = max(arguments.nvme.glob("*"), key=lambda path: path.stat().st_size)
    suffix_ms = min(answer["first_token_ms"] for answer in suffixes)
    host_ms = min(answer["first_token_ms"] for answer in hits)
    figures = {
        "length": arguments.length,
        "prefix_gb": gigabytes,
        "computed_ms": computed["first_token_ms"],
        "suffix_ms": suffix_ms,
        "host_ms": host_ms,
        "host_gb_per_s": gigabytes / (host_ms - suffix_ms) * 1e3,
        "nvme_ms": from_nvme["first_token_ms"],
        "nvme_gb_per_s": gigabytes / (from_nvme["first_token_ms"] - suffix_ms) * 1e3,
        "restarted_ms": restarted["first_token_ms"],
        "restarted_gb_per_s": gigabytes / (restarted["first_token_ms"] - suffix_ms) * 1e3,
        "disk_gb_per_s": read_rate(file, int(gigabytes * 1e9)),
        "checks": checks.results,
    }
    print(json.dumps(figures))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=1))
    sys.exit(0 if all(result["ok"] for result in checks.results) else 1)


if __name__ == "__main__":
    main()
