"""Prefill and decode of transformers in the shape of Llama-3.1-8B, random bf16 weights, on one GPU:
the peer of `foretoken bench prefill|decode --load-format dummy`.

    python3 tests/bench/transformers_peer.py [--context 8192 32768] [--attention NAME ...] [--json FILE]

Every attention that runs here computes the prompts: FlashAttention 3 and 2 where they are installed, and
PyTorch's scaled_dot_product_attention with each of its backends, and with the one that it picks itself.
The result of the fastest, a context, says so, and has decode too; those that don't run say why.
"""

import argparse
import contextlib
import json
import os
import pathlib
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what isn't installed is not to be looked for

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

# What transformers calls it, and the backend that PyTorch may take.
ATTENTIONS = {
    "flash_attention_3": ("flash_attention_3", None),
    "flash_attention_2": ("flash_attention_2", None),
    "sdpa": ("sdpa", None),
    "sdpa cudnn": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": ("sdpa", SDPBackend.FLASH_ATTENTION),
    "sdpa efficient": ("sdpa", SDPBackend.EFFICIENT_ATTENTION),
}


def make_model():
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
        rope_theta=5e5, rms_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
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


def with_attention(model, name):
    """Has the model attend so, within."""
    implementation, backend = ATTENTIONS[name]
    model.set_attn_implementation(implementation)
    return sdpa_kernel(backend) if backend else contextlib.nullcontext()


def measure_prefill(model, context, name):
    result = {
        "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "device": torch.cuda.get_device_name(),
        "attention": name,
        "context": context,
    }
    try:
        with with_attention(model, name):
            return result | {"prefill_tokens_per_s": context / prefill_seconds(model, context)}
    except Exception as error:  # not installed, no kernel for these shapes: each package has its own
        torch.cuda.empty_cache()
        return result | {"why_not": str(error).splitlines()[0][:200]}


def measure(model, context, names):
    results = [measure_prefill(model, context, name) for name in names]
    ran = [result for result in results if "prefill_tokens_per_s" in result]
    if ran:
        fastest = max(ran, key=lambda result: result["prefill_tokens_per_s"])
        with with_attention(model, fastest["attention"]):
            fastest |= {"fastest": True, "decode_ms": decode_ms(model, context)}
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model = make_model()
    results = []
    for context in arguments.context:
        for result in measure(model, context, arguments.attention):
            results.append(result)
            print(json.dumps(result), flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
