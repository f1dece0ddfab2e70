"""How fast weights come from files to the GPU: from the page cache, and from the disk.

    python3 tests/gpu/load.py --bin FOLDER --model FOLDER [--folder FOLDER] [--device cuda|cpu]
                              [--json FILE]

--model has a config.json of Llama's kind and a tokenizer. Random weights of its shape are written to a
folder in --folder, which is removed at the end (16 GB for Llama-3.1-8B), and a service is started with
them, in turns with the files in the page cache and without. Beside its own figures (the log's line
"weights:") stand those of plain reads of the files, several at a time, into memory. Exit code 1 where the
service does not start.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

from faults import wait_until

SHARD_BYTES = 4 << 30
READ_BYTES = 16 << 20
READERS = 8
LOADED = re.compile(r"weights: ([\d.]+) GB in ([\d.]+) s \(([\d.]+) GB/s\) from the files")


def tensors_of(config):
    """Names and shapes, as Hugging Face has them."""
    hidden, inner, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    tensors = {"model.embed_tokens.weight": [vocab, hidden]}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = [rows, hidden]
        tensors[f"{layer}self_attn.o_proj.weight"] = [hidden, queries]
        tensors[f"{layer}mlp.gate_proj.weight"] = [inner, hidden]
        tensors[f"{layer}mlp.up_proj.weight"] = [inner, hidden]
        tensors[f"{layer}mlp.down_proj.weight"] = [hidden, inner]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = [hidden]
    tensors["model.norm.weight"] = [hidden]
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = [vocab, hidden]
    return tensors


def bytes_of(shape):
    size = 2  # bf16
    for extent in shape:
        size *= extent
    return size


def random_values(count):
    """bf16 of either sign, from 1/128 to 1/32."""
    values = bytearray(2 * count)
    values[0::2] = random.randbytes(count)
    values[1::2] = random.randbytes(count).translate(bytes(0x3C | byte & 0x80 for byte in range(256)))
    return memoryview(values)


def write_shard(path, tensors, values):
    header, at = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + bytes_of(shape)]}
        at += bytes_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left = bytes_of(shape)
            while left > 0:
                left -= file.write(values[: min(left, len(values))])
        file.flush()
        os.fsync(file.fileno())


def write_model(source, folder):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    shards = [{}]
    for name, shape in tensors_of(json.loads((source / "config.json").read_text())).items():
        if sum(map(bytes_of, shards[-1].values())) + bytes_of(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    values = random_values(32 << 20)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        write_shard(folder / name, shard, values)
    index = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


def drop_from_page_cache(folder):
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(folder):
    """GB/s of all files; and so they are in the page cache."""

    def read(part):
        path, offset = part
        with open(path, "rb", buffering=0) as file:
            return os.preadv(file.fileno(), [bytearray(READ_BYTES)], offset)

    parts = [(path, at) for path in files_of(folder) for at in range(0, path.stat().st_size, READ_BYTES)]
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        done = sum(pool.map(read, parts))
    return done * 1e-9 / (time.monotonic() - begin)


def load(arguments, folder):
    """Starts a service and ends it."""
    with tempfile.TemporaryDirectory(prefix="ft-load-") as run:
        endpoint_file, log = pathlib.Path(run) / "endpoint.json", pathlib.Path(run) / "log"
        host_gib = 4 if arguments.device == "cuda" else 0.25
        command = [
            f"{arguments.bin}/foretoken", "serve", folder, f"--device={arguments.device}", "--port=0",
            "--kv-policy=full", "--max-model-len=512", f"--kv-host-gib={host_gib}",
            f"--runtime-dir={run}/run", f"--endpoint-file={endpoint_file}",
        ]  # fmt: skip
        begin = time.monotonic()
        with open(log, "w") as stderr:
            serving = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            wait_until(lambda: endpoint_file.exists() or serving.poll() is not None, 200)
            ready = time.monotonic() - begin
            found = LOADED.search(log.read_text())
            if not endpoint_file.exists() or found is None:
                sys.exit(f"the service did not start:\n{log.read_text()}")
        finally:
            serving.terminate()
            serving.wait(60)
    return {
        "gb": float(found[1]),
        "seconds": float(found[2]),
        "gb_per_s": float(found[3]),
        "ready_after_s": round(ready, 2),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--folder", default=tempfile.gettempdir(), type=pathlib.Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results = {"page_cache": [], "disk": []}
    with tempfile.TemporaryDirectory(prefix="ft-weights-", dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        write_model(arguments.model, folder)
        drop_from_page_cache(folder)
        results["read_gb_per_s"] = {"disk": read_rate(folder), "page_cache": read_rate(folder)}
        for _ in range(arguments.repeat):
            results["page_cache"].append(load(arguments, folder))
            drop_from_page_cache(folder)
            results["disk"].append(load(arguments, folder))
            read_rate(folder)  # all of it is in the page cache again
    print(json.dumps(results))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
