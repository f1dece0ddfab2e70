"""Foretoken and llama.cpp in turns on one machine: prefill and decode tokens/s, and their ratios.

    pip install gguf llama-cpp-python        (with CMAKE_ARGS=-DGGML_NATIVE=ON: a few minutes)
    PYTHONPATH=client/python python3 tests/bench/side_by_side.py MODEL_FOLDER MODEL.gguf [--json]

MODEL.gguf holds the folder's weights (the one that `foretoken model fetch` got). A round measures
every engine once, so that whatever else the machine does meets them alike; a ratio is the median,
over the rounds, of Foretoken's figure to the best of llama.cpp's in the same round.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from foretoken.client import Client
from llama_cpp import Llama
from llama_cpp_peer import write_unquantized

ROOT = pathlib.Path(__file__).resolve().parents[2]
FORETOKEN = pathlib.Path(os.environ.get("FORETOKEN_BIN", ROOT / "build/release/bin")) / "foretoken"
BATCH = 512  # llama.cpp's tokens a prefill step, its default


class LlamaCpp:
    def __init__(self, path, flash, context, threads):
        self._model = Llama(str(path), n_ctx=context, n_batch=BATCH, n_threads=threads,
                            n_threads_batch=threads, flash_attn=flash, verbose=False)  # fmt: skip

    def measure(self, prompt, steps):
        """Seconds of the prefill, and of each decode step."""
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(prompt)
        prefill = time.perf_counter() - start
        times = []
        for token in prompt[:steps]:
            start = time.perf_counter()
            self._model.eval([token])
            times.append(time.perf_counter() - start)
        return prefill, times


class Foretoken:
    """A service of one rank whose device memory has room for the whole context."""

    def __init__(self, model, policy, threads):
        self._folder = tempfile.TemporaryDirectory()
        endpoint = pathlib.Path(self._folder.name) / "endpoint.json"
        self._serve = subprocess.Popen(
            [FORETOKEN, "serve", model, "--quiet", "--device=cpu", "--port=0", f"--kv-policy={policy}",
             f"--threads-per-rank={threads}", "--kv-host-gib=1", "--device-memory-gib=4",
             f"--endpoint-file={endpoint}"]
        )  # fmt: skip
        while not endpoint.exists():
            if self._serve.poll() is not None:
                sys.exit("foretoken serve did not start")
            time.sleep(0.1)
        where = json.loads(endpoint.read_text())
        self._client = Client(where["endpoint"], where["key_file"], silence_timeout=600)

    def measure(self, prompt, steps):
        stream = self._client.stream(prompt, max_tokens=steps + 1, temperature=0, ignore_eos=True)
        times, last = [], None
        while True:
            try:
                next(stream)
            except StopIteration as done:
                return done.value.timing["prefill_ms"] / 1000, times
            now = time.perf_counter()
            if last is not None:
                times.append(now - last)
            last = now

    def close(self):
        self._client.close()
        self._serve.terminate()
        self._serve.wait()


def rates(engine, prompt, steps):
    prefill, times = engine.measure(prompt, steps)
    return {"prefill": len(prompt) / prefill, "decode": 1 / statistics.median(times)}


def best(peers, what):
    return max(peer[what] for peer in peers.values())


def compare(rounds):
    """Median rates of each engine, and of each round's ratio to the best peer."""
    names = rounds[0].keys()
    figures = {
        name: {w: round(statistics.median(r[name][w] for r in rounds), 1) for w in ("prefill", "decode")}
        for name in names
    }
    ratios = {}
    for name, what in itertools.product(("full", "attention-predictor"), ("prefill", "decode")):
        pairs = [r[name][what] / best({n: r[n] for n in names if n.startswith("llama")}, what) for r in rounds]
        ratios[f"{name} {what}"] = {"median": round(statistics.median(pairs), 2), "least": round(min(pairs), 2)}
    return {"tokens_per_s": figures, "ratio_to_best_llama.cpp": ratios}


def make_engines(args):
    longest = max(args.contexts) + args.steps + 8
    engines = {}
    for kind in args.types:
        path = (args.out or args.gguf.parent) / f"{args.gguf.stem}.{kind}.gguf"
        if not path.exists():
            write_unquantized(args.gguf, path, kind)
        for flash in [{"on": True, "off": False}[word] for word in args.flash]:
            name = f"llama.cpp {kind}{' flash' if flash else ''}"
            engines[name] = LlamaCpp(path, flash, longest, args.threads)
    for policy in ("full", "attention-predictor"):
        engines[policy] = Foretoken(args.model, policy, args.threads)
    return engines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 7000])
    parser.add_argument("--types", choices=["f16", "f32"], nargs="+", default=["f16", "f32"])
    parser.add_argument("--flash", choices=["on", "off"], nargs="+", default=["on", "off"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the converted GGUF files")
    args = parser.parse_args()
    engines = make_engines(args)
    random = np.random.default_rng(1)
    for engine in engines.values():
        engine.measure(random.integers(300, 20000, 16).tolist(), 2)  # touches the weights
    for context in args.contexts:
        rounds = []
        for _ in range(args.rounds):
            prompt = random.integers(300, 20000, context).tolist()
            rounds.append({name: rates(engine, prompt, args.steps) for name, engine in engines.items()})
            print(json.dumps({"context": context, **rounds[-1]}), file=sys.stderr, flush=True)
        print(json.dumps({"context": context, "threads": args.threads, **compare(rounds)}), flush=True)
    for name in ("full", "attention-predictor"):
        engines[name].close()


if __name__ == "__main__":
    main()
