"""Foretoken and llama.cpp in turns on one machine: prefill and decode tokens/s, and their ratios.

    pip install gguf llama-cpp-python        (with CMAKE_ARGS=-DGGML_NATIVE=ON: a few minutes)
    PYTHONPATH=client/python python3 tests/bench/llama_cpp_peer.py MODEL_FOLDER MODEL.gguf

MODEL.gguf holds the folder's weights (the one that `foretoken model fetch` got); they are written as
F16 and F32 beside it once. A round measures every engine once, so that whatever else the machine
does meets them alike; a ratio is that of Foretoken's rate to llama.cpp's best in the same round.
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

import gguf
import numpy as np
from foretoken.client import Client
from llama_cpp import Llama

ROOT = pathlib.Path(__file__).resolve().parents[2]
FORETOKEN = pathlib.Path(os.environ.get("FORETOKEN_BIN", ROOT / "build/release/bin")) / "foretoken"
BATCH = 512  # llama.cpp's tokens a prefill step, its default
KINDS = ("prefill", "decode")
POLICIES = ("full", "attention-predictor")
_TYPES = {
    "f16": (np.float16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (np.float32, gguf.LlamaFileType.ALL_F32),
}
_WRITTEN_ANEW = ("general.architecture", "general.file_type")


def write_unquantized(source, target, kind):
    """Copies a GGUF file with its matrices as `kind`; vectors are float32, as llama.cpp wants."""
    dtype, file_type = _TYPES[kind]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in _WRITTEN_ANEW:
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        writer.add_tensor(tensor.name, values.astype(dtype if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    def __init__(self, path, flash, context, threads):
        self._model = Llama(str(path), n_ctx=context, n_batch=BATCH, n_threads=threads,
                            n_threads_batch=threads, flash_attn=flash, verbose=False)  # fmt: skip

    def measure(self, prompt, steps):
        """Tokens a second of prefill and of decode."""
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(prompt)
        middle = time.perf_counter()
        for token in prompt[:steps]:
            self._model.eval([token])
        end = time.perf_counter()
        return {"prefill": len(prompt) / (middle - start), "decode": steps / (end - middle)}


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
        answer = self._client.generate(prompt, max_tokens=steps + 1, temperature=0, ignore_eos=True)
        return {"prefill": 1000 * len(prompt) / answer.timing["prefill_ms"],
                "decode": 1000 * steps / answer.timing["decode_ms"]}  # fmt: skip

    def close(self):
        self._client.close()
        self._serve.terminate()
        self._serve.wait()


def ratio(measured, policy, kind):
    """A policy's rate by that of llama.cpp's best variant in the same round."""
    peers = [rates[kind] for name, rates in measured.items() if name not in POLICIES]
    return measured[policy][kind] / max(peers)


def compare(rounds):
    figures = {
        name: {kind: round(statistics.median(r[name][kind] for r in rounds), 1) for kind in KINDS}
        for name in rounds[0]
    }
    ratios = {}
    for policy, kind in itertools.product(POLICIES, KINDS):
        pairs = [ratio(measured, policy, kind) for measured in rounds]
        ratios[f"{policy} {kind}"] = [round(statistics.median(pairs), 2), round(min(pairs), 2)]
    return {"tokens_per_s": figures, "ratio_median_and_least": ratios}


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
    for policy in POLICIES:
        engines[policy] = Foretoken(args.model, policy, args.threads)
    return engines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 7000])
    parser.add_argument("--types", choices=_TYPES, nargs="+", default=list(_TYPES))
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
            rounds.append({name: e.measure(prompt, args.steps) for name, e in engines.items()})
            print(json.dumps({"context": context, **rounds[-1]}), file=sys.stderr, flush=True)
        print(json.dumps({"context": context, "threads": args.threads, **compare(rounds)}), flush=True)
    for name in POLICIES:
        engines[name].close()


if __name__ == "__main__":
    main()
