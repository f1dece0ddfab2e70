"""Speed of llama.cpp on this machine, as the bar for the CPU device: prefill and decode tokens/s.

    pip install gguf llama-cpp-python        (with CMAKE_ARGS=-DGGML_NATIVE=ON: a few minutes)
    python3 tests/bench/llama_cpp_peer.py SmolLM2-135M-Instruct.Q4_1.gguf --type f16 --json

Writes the GGUF file's weights as F16 or F32 beside it once, then times prompts of random tokens.
"""

import argparse
import json
import pathlib
import time

import gguf
import numpy as np
from llama_cpp import Llama

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


def measure(path, context, threads, flash, steps):
    model = Llama(str(path), n_ctx=context + steps + 8, n_batch=512, n_threads=threads,
                  n_threads_batch=threads, flash_attn=flash, verbose=False)
    tokens = np.random.default_rng(1).integers(100, 40000, context).tolist()
    model.eval(tokens[:16])  # touches the weights
    model.reset()
    start = time.perf_counter()
    model.eval(tokens)
    prefill = time.perf_counter() - start
    times = []
    for token in tokens[:steps]:
        start = time.perf_counter()
        model.eval([token])
        times.append(time.perf_counter() - start)
    return {"context": context, "threads": threads, "flash_attn": flash,
            "prefill_tokens_per_s": round(context / prefill, 1),
            "decode_tokens_per_s": round(1 / float(np.median(times)), 1),
            "decode_best_tokens_per_s": round(1 / min(times), 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--type", choices=_TYPES, default="f16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 7000])
    parser.add_argument("--flash", choices=["on", "off", "both"], default="both")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the converted file")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    path = (args.out or args.gguf.parent) / f"{args.gguf.stem}.{args.type}.gguf"
    if not path.exists():
        write_unquantized(args.gguf, path, args.type)
    for context in args.contexts:
        for flash in {"on": [True], "off": [False], "both": [True, False]}[args.flash]:
            result = measure(path, context, args.threads, flash, args.steps)
            print(json.dumps(result) if args.json else result, flush=True)


if __name__ == "__main__":
    main()
