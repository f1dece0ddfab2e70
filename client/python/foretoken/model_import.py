"""GGUF file to Hugging Face folder, in float16: what Foretoken serves.

    python3 -m foretoken.model_import FILE.gguf FOLDER

Llama (and Mistral, which GGUF calls llama), Qwen2 and Qwen3 with a byte-level BPE vocabulary.
The folder appears whole or not at all. Exit codes: 0 ok, 2 usage, 4 model file.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile

import numpy as np

from foretoken.gguf_file import GgufError, GgufFile
from foretoken.gguf_tokenizer import tokenizer_files
from foretoken.progress import Progress
from foretoken.safetensors_writer import TensorPlan, write_safetensors

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"


def import_gguf(gguf_path, out_folder, progress=Progress):
    """Converts one file. Raises GgufError for a file that can't be converted, OSError."""
    source = GgufFile(gguf_path)
    config = model_config(source)
    plans = [_plan(source, name, config) for name in source.tensors if name != _ROPE_FREQS]
    files = tokenizer_files(source.fields)
    files["config.json"] = config
    files["generation_config.json"] = generation_config(source.fields)

    out_folder = os.path.abspath(out_folder)
    if os.path.exists(out_folder):
        raise GgufError(f"{out_folder} exists already; remove it, or name another folder")
    parent = os.path.dirname(out_folder)
    os.makedirs(parent, exist_ok=True)
    made = tempfile.mkdtemp(prefix=".import-", dir=parent)
    try:
        for name, content in files.items():
            with open(os.path.join(made, name), "w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=2)
                file.write("\n")
        with progress("converting", sum(plan.num_bytes for plan in plans)) as bar:
            path = os.path.join(made, "model.safetensors")
            write_safetensors(path, plans, {"format": "pt"}, bar.advance)
        os.chmod(made, 0o755)
        os.rename(made, out_folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def model_config(source):
    """config.json, from the file's fields and the shapes of its tensors."""
    fields = _Fields(source.fields)
    architecture = fields.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise GgufError(
            f"architecture {architecture!r} isn't supported; these are: {', '.join(_ARCHITECTURES)}"
        )
    class_name, model_type = _ARCHITECTURES[architecture]
    key = architecture + "."
    hidden_size = fields.size(key + "embedding_length", 1 << 20)
    num_heads = fields.size(key + "attention.head_count", 1 << 14)
    num_kv_heads = fields.size(key + "attention.head_count_kv", 1 << 14, num_heads)
    head_dim = fields.size(key + "attention.key_length", 1 << 12, hidden_size // num_heads)
    max_position = fields.size(key + "context_length", 1 << 30)
    window = source.fields.get(key + "attention.sliding_window")
    if window is not None and 0 < window < max_position:
        raise GgufError(f"field {key}attention.sliding_window is {window}: not supported")
    if "token_embd.weight" not in source.tensors:
        raise GgufError("there is no tensor 'token_embd.weight'")
    bias = "blk.0.attn_q.bias" in source.tensors
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.size(key + "block_count", 1 << 14),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.size(key + "feed_forward_length", 1 << 24),
        "vocab_size": source.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": max_position,
        "rms_norm_eps": round(fields.number(key + "attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": fields.number(key + "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(source, fields, key, head_dim),
        "hidden_act": "silu",
        "attention_bias": bias if architecture != "qwen2" else True,
        "mlp_bias": "blk.0.ffn_gate.bias" in source.tensors,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": source.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": source.fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float16",
    }
    rotated = source.fields.get(key + "rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise GgufError(f"{key}rope.dimension_count is {rotated}, head_dim {head_dim}")
    return config


def generation_config(fields):
    ends = []
    for name in ("eos", "eot", "eom"):
        token = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and token not in ends:
            ends.append(token)
    return {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


class _Fields:
    """Typed access to the file's fields."""

    def __init__(self, fields):
        self._fields = fields

    def text(self, name):
        value = self._fields.get(name)
        if not isinstance(value, str):
            raise GgufError(f"field {name} is missing or isn't text")
        return value

    def size(self, name, limit, default=None):
        value = self._fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise GgufError(f"field {name} is {value!r}; it must be from 1 to {limit}")
        return value

    def number(self, name, default=None):
        value = self._fields.get(name, default)
        if not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise GgufError(f"field {name} is {value!r}; it must be a positive number")
        # GGUF keeps float32: 1e-05 comes back as 9.999999747378752e-06.
        return float(f"{value:.7g}")


def _rope_scaling(source, fields, key, head_dim):
    kind = source.fields.get(key + "rope.scaling.type", "none")
    if _ROPE_FREQS in source.tensors:
        return _llama3_scaling(source, fields, key, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": fields.number(key + "rope.scaling.factor")}
    if kind == "yarn":
        original = fields.size(key + "rope.scaling.original_context_length", 1 << 30)
        return {
            "rope_type": "yarn",
            "factor": fields.number(key + "rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }
    raise GgufError(f"field {key}rope.scaling.type is {kind!r}: not supported")


def _llama3_scaling(source, fields, key, head_dim):
    """Llama 3's scaling, which GGUF holds as factors a frequency: accepted when they are Meta's."""
    given = source.read_float32(_ROPE_FREQS)
    theta = fields.number(key + "rope.freq_base", 10000.0)
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(given.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-3):
        raise GgufError(f"tensor {_ROPE_FREQS} isn't the scaling of Llama 3.1 or 3.2")
    return scaling


def _plan(source, name, config):
    target = _TOP.get(name)
    heads = None
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER and int(match[1]) < config["num_hidden_layers"]:
        target = f"model.layers.{int(match[1])}.{_LAYER[match[2]]}.{match[3]}"
        if config["model_type"] == "llama" and match[2] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    if target is None:
        raise GgufError(f"tensor {name!r} has no place in a {config['model_type']} model")

    def make():
        data = source.read_float32(name)
        if heads is not None:
            data = _unpermute(data, heads)
        with np.errstate(over="ignore"):
            half = data.astype("<f2")
        if not np.isfinite(half).all():
            raise GgufError(f"tensor {name!r} has values that float16 can't hold")
        return np.ascontiguousarray(half)

    return TensorPlan(target, "F16", source.tensors[name].shape, make)


def _unpermute(data, num_heads):
    """Undoes GGUF's reordering of Llama's Q and K rows (pairs side by side, HF wants halves)."""
    if data.shape[0] % (2 * num_heads):
        raise GgufError(f"{data.shape[0]} rows of Q or K don't divide into {num_heads} heads")
    pairs = data.reshape(num_heads, data.shape[0] // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(data.shape)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="foretoken model import", description=__doc__.split("\n")[0]
    )
    parser.add_argument("gguf", help="the GGUF file")
    parser.add_argument("folder", help="the model folder to make")
    options = parser.parse_args(arguments)
    try:
        import_gguf(options.gguf, options.folder)
    except (GgufError, OSError) as error:
        print(f"foretoken: {error}", file=sys.stderr)
        return 4
    print(os.path.abspath(options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
