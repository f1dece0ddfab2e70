"""Prefill and decode of transformers in the shape of Llama-3.1-8B, random bf16 weights, on one GPU:
the peer of `foretoken bench prefill|decode --load-format dummy`.

    python3 tests/bench/transformers_peer.py [--context 8192 32768] [--attention sdpa ...] [--json FILE]
"""

import argparse
import json
import pathlib
import time

import torch
import transformers


def make_model(attention):
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
        rope_theta=5e5, rms_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = attention
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


@torch.no_grad()
def prefill_seconds(model, context):
    ids = torch.randint(0, 20000, (1, context), device="cuda")
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
        del out
    return best


@torch.no_grad()
def decode_ms(model, context, steps=16):
    ids = torch.randint(0, 20000, (1, context), device="cuda")
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    cache = out.past_key_values
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--attention", nargs="+", default=["sdpa"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results = []
    for attention in arguments.attention:
        model = make_model(attention)
        for context in arguments.context:
            seconds = prefill_seconds(model, context)
            result = {
                "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
                "device": torch.cuda.get_device_name(),
                "attention": attention,
                "context": context,
                "prefill_tokens_per_s": context / seconds,
                "decode_ms": decode_ms(model, context),
            }
            results.append(result)
            print(json.dumps(result), flush=True)
        del model
        torch.cuda.empty_cache()
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
