"""A model folder of Llama-3.1-8B's shape without weights, for `--load-format dummy`: its config.json,
and SmolLM2's tokenizer (`foretoken model fetch smollm2-135m`), since any will do.

    python3 tests/gpu/make_bench_model.py FOLDER
"""

import json
import os
import pathlib
import shutil
import sys

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    data = pathlib.Path(os.environ.get("XDG_DATA_HOME", pathlib.Path.home() / ".local" / "share"))
    source = data / "foretoken" / "models" / "smollm2-135m"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)


if __name__ == "__main__":
    main()
