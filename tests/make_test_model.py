"""Small random models, one of each family and layout, the same bytes on every machine.

    python3 tests/make_test_model.py NAME FOLDER      (NAME: a key of SPECS, or `all`)

Only numpy is needed, and of numpy only Philox's raw 64-bit words, whose sequence is defined by the
algorithm. Sizes are odd on purpose. What each model must answer: tests/oracles/data/families.json.
"""

import hashlib
import json
import pathlib
import struct
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "client" / "python"))
from foretoken.safetensors_writer import TensorPlan, write_safetensors  # noqa: E402

_SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
_NUM_MERGES = 256
VOCAB_SIZE = 256 + _NUM_MERGES + len(_SPECIAL)  # 515
# Standard deviations that make the models look sharply at single tokens, and not repeat themselves.
_SCALES = {
    "q_proj": 0.2, "k_proj": 0.2, "v_proj": 0.1, "o_proj": 0.1,
    "gate_proj": 0.15, "up_proj": 0.15, "down_proj": 0.1,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _spec(architecture, hidden, heads, kv_heads, head_dim, inner, layers, dtype, tied, **more):
    return {
        "architecture": architecture,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "dtype": dtype,
        "tied": tied,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position": 512,
        "shards": 1,
        "layout": "classic",
        **more,
    }


SPECS = {
    "llama": _spec("Llama", 192, 3, 1, 64, 343, 2, "F32", tied=True),
    "llama3": _spec(
        "Llama",
        272,
        2,
        1,
        128,
        400,
        2,
        "F16",
        tied=False,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3,
    ),
    "llama3-v5": _spec(
        "Llama",
        128,
        8,
        2,
        64,
        257,
        3,
        "BF16",
        tied=False,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3,
        layout="transformers5",
        shards=3,
    ),
    "llama-biased": _spec(
        "Llama",
        160,
        4,
        2,
        64,
        301,
        2,
        "F32",
        tied=True,
        attention_bias=True,
        mlp_bias=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
    "mistral": _spec("Mistral", 256, 4, 4, 64, 333, 2, "F16", tied=False),
    "qwen2": _spec("Qwen2", 448, 7, 1, 64, 311, 2, "BF16", tied=True, rope_theta=1000000.0),
    "qwen2-yarn": _spec(
        "Qwen2",
        128,
        2,
        1,
        64,
        255,
        2,
        "F32",
        tied=False,
        max_position=32,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen3": _spec(
        "Qwen3",
        192,
        4,
        2,
        128,
        391,
        2,
        "BF16",
        tied=True,
        rope_theta=1000000.0,
        shards=2,
    ),
    "qwen3-v5": _spec(
        "Qwen3",
        128,
        6,
        3,
        64,
        129,
        3,
        "F32",
        tied=False,
        layout="transformers5",
    ),
}


def make(name, folder, layout=None, **changes):
    """Writes the model folder; `layout` and changes override the spec's."""
    spec = {**SPECS[name], **changes}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(spec)
    if (layout or spec["layout"]) == "transformers5":
        config = _as_transformers5(config)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json", {"bos_token_id": 512, "eos_token_id": [513, 514]}
    )
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _SPECIAL[1]},
    )
    _write_weights(folder, name, spec)


def prompt_ids(name, length=40):
    """A prompt of ordinary tokens."""
    return [int(word % (VOCAB_SIZE - len(_SPECIAL))) for word in _words(f"{name}/prompt", length)]


def read_weights(folder):
    """Tensor name to float32 array, of every file in the folder. For oracles."""
    weights = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            weights[name] = _decode(data[begin:end], entry["dtype"]).reshape(entry["shape"])
    return weights


def _config(spec):
    family = spec["architecture"]
    config = {
        "architectures": [family + "ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": spec["max_position"],
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": spec["tied"],
        "bos_token_id": 512,
        "eos_token_id": 513,
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[spec["dtype"]],
    }
    for key in (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "num_hidden_layers",
        "rope_theta",
        "rope_scaling",
    ):
        config[key] = spec[key]
    if family == "Llama":
        config["attention_bias"] = spec["attention_bias"]
        config["mlp_bias"] = spec["mlp_bias"]
    if family == "Mistral":
        config["sliding_window"] = None
    if family == "Qwen2":
        config["use_sliding_window"] = False
        config["sliding_window"] = 128
    return config


def _as_transformers5(config):
    config = dict(config)
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    return config


def _tensors(spec):
    """Name, shape and kind of every tensor: kind says how its values are drawn."""
    hidden, inner, head_dim = spec["hidden_size"], spec["intermediate_size"], spec["head_dim"]
    queries = spec["num_attention_heads"] * head_dim
    keys = spec["num_key_value_heads"] * head_dim
    family = spec["architecture"]
    qkv_bias = spec["attention_bias"] or family == "Qwen2"
    yield "model.embed_tokens.weight", (VOCAB_SIZE, hidden), 0.2
    for i in range(spec["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,), "norm"
        for part, rows, columns, bias in (
            ("self_attn.q_proj", queries, hidden, qkv_bias),
            ("self_attn.k_proj", keys, hidden, qkv_bias),
            ("self_attn.v_proj", keys, hidden, qkv_bias),
            ("self_attn.o_proj", hidden, queries, spec["attention_bias"]),
            ("mlp.gate_proj", inner, hidden, spec["mlp_bias"]),
            ("mlp.up_proj", inner, hidden, spec["mlp_bias"]),
            ("mlp.down_proj", hidden, inner, spec["mlp_bias"]),
        ):
            yield f"{layer}{part}.weight", (rows, columns), _SCALES[part.split(".")[1]]
            if bias:
                yield f"{layer}{part}.bias", (rows,), 0.2
        if family == "Qwen3":
            yield layer + "self_attn.q_norm.weight", (head_dim,), "head norm"
            yield layer + "self_attn.k_norm.weight", (head_dim,), "head norm"
        yield layer + "post_attention_layernorm.weight", (hidden,), "norm"
    yield "model.norm.weight", (hidden,), "norm"
    if not spec["tied"]:
        yield "lm_head.weight", (VOCAB_SIZE, hidden), 0.2


def _write_weights(folder, name, spec):
    def plan(tensor, shape, kind):
        return TensorPlan(
            tensor,
            spec["dtype"],
            shape,
            lambda: _encode(_draw(f"{name}/{tensor}", shape, kind), spec["dtype"]),
        )

    plans = [plan(*tensor) for tensor in _tensors(spec)]
    shards = spec["shards"]
    if shards == 1:
        write_safetensors(folder / "model.safetensors", plans, {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = plans[i::shards]
        write_safetensors(folder / file, part, {"format": "pt"})
        weight_map.update({tensor.name: file for tensor in part})
    total = sum(tensor.num_bytes for tensor in plans)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _words(label, count):
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    return np.random.Philox(key=key).random_raw(count)


def _draw(label, shape, kind):
    """Uniform values: of the standard deviation that kind gives, or about 1 for a norm."""
    count = int(np.prod(shape))
    unit = (_words(label, count) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - 1
    if kind == "norm":
        return np.float32(1) + np.float32(0.2) * unit
    if kind == "head norm":  # scores of standard deviation 4, so that attention is sharp
        return np.float32(2) + np.float32(0.4) * unit
    return np.float32(kind * 3**0.5) * unit


def _encode(values, dtype):
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    bits = values.astype("<f4").view("<u4")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def _decode(data, dtype):
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _tokenizer():
    """A byte-level BPE of 256 bytes, merges of letter pairs, and the special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    letters = "etaoinshrdlucmfw"
    merges = [[first, second] for first in letters for second in letters][:_NUM_MERGES]
    tokens = [symbols[byte] for byte in range(256)] + ["".join(pair) for pair in merges]
    added = [
        {
            "id": len(tokens) + i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, text in enumerate(_SPECIAL)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens + _SPECIAL)},
            "merges": merges,
        },
    }


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in (*SPECS, "all"):
        raise SystemExit(__doc__)
    if sys.argv[1] != "all":
        return make(sys.argv[1], sys.argv[2])
    for name in SPECS:
        make(name, pathlib.Path(sys.argv[2]) / name)


if __name__ == "__main__":
    main()
