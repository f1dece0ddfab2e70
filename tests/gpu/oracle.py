"""The CUDA device's answers against transformers and against the CPU device, for random models of
the shapes that people serve, cut to a few layers.

    python3 tests/gpu/oracle.py --bin FOLDER --tokenizer FOLDER [--tensor-parallel 1,2] [--json FILE]

Needs a GPU, torch and transformers. Greedy tokens must be equal wherever the margin between the two
best logits exceeds 0.1, and the KL divergence of the first token's distribution (over the 20 best
and the rest together) must stay under 1e-3. Exit code 1 where they don't.
"""

import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
import transformers

CLEAR = 0.1
MAX_KL = 1e-3
TOKENS = 32
PROMPTS = (17, 300, 2000)
DENSE = ("--kv-policy", "full", "--max-tokens", str(TOKENS), "--logprobs", "20", "--max-batched-tokens", "8192")


def shapes():
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }  # fmt: skip
    common = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 49152}
    llama = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, **common,
    }  # fmt: skip
    small = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "num_hidden_layers": 12, "tie_word_embeddings": True, **common,
    }  # fmt: skip
    qwen = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "num_hidden_layers": 2, **common,
    }  # fmt: skip
    return {
        "llama-3.1-8b x 4": transformers.LlamaConfig(
            num_hidden_layers=4, rope_theta=5e5, rope_scaling=llama3, **llama
        ),
        "mistral-7b x 2": transformers.MistralConfig(
            num_hidden_layers=2, sliding_window=None, **llama
        ),
        "qwen2.5-7b x 2": transformers.Qwen2Config(rope_theta=1e6, **qwen),
        "qwen3-8b x 2": transformers.Qwen3Config(num_hidden_layers=2, rope_theta=1e6, **llama),
        "smollm2-135m x 12": transformers.LlamaConfig(**small),
    }


def make_model(config, folder, tokenizer):
    torch.manual_seed(1)
    config.torch_dtype = torch.bfloat16
    config.initializer_range = 1.2 / math.sqrt(config.hidden_size)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pathlib.Path(tokenizer) / name, folder)
    return model


def prompt(length):
    return torch.randint(300, 40000, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.no_grad()
def reference(model, ids, count):
    """Log-probabilities of the first token, then greedy tokens and their margins."""
    cache = None
    step = torch.tensor([ids], device=model.device)
    first, tokens, margins = None, [], []
    for _ in range(count):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[0, -1].float()
        if first is None:
            first = torch.log_softmax(logits, 0)
        best = torch.topk(logits, 2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        step = best.indices[:1].reshape(1, 1)
    return first, tokens, margins


def generate(bin_folder, model, ids, device, *flags):
    """The answer of `foretoken generate --json` to a prompt of ids, greedy."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ids, file)
        file.flush()
        command = [
            f"{bin_folder}/foretoken", "generate", "--model", str(model), "--device", device,
            "--prompt-ids", file.name, "--temperature", "0", "--ignore-eos", "--kv-host-gib", "1",
            "--json", *flags,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"foretoken generate failed:\n{done.stderr}")
    return json.loads(done.stdout)


def kl_of_best(expected, top):
    """KL(expected || ours) over the tokens that `top` names, and all others as one."""
    ours = torch.tensor([logprob for _, logprob in top]).exp()
    theirs = expected[[token for token, _ in top]].exp().cpu()
    rest_ours = max(1e-12, 1 - float(ours.sum()))
    rest = max(1e-12, 1 - float(theirs.sum()))
    return float((theirs * (theirs / ours).log()).sum()) + rest * math.log(rest / rest_ours)


def first_wrong(tokens, margins, ours):
    for place, (token, margin) in enumerate(zip(tokens, margins, strict=True)):
        if ours[place] != token:
            return None if margin <= CLEAR else place  # from here on another text
    return None


def devices(arguments, length):
    """(device, ranks) to ask; the CPU at one length only, as it is slow."""
    ranks = [("cuda", count) for count in arguments.tensor_parallel]
    return ranks + [("cpu", 1)] if length == 300 and 1 in arguments.tensor_parallel else ranks


def check(arguments, name, config, results):
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(config, folder, arguments.tokenizer)
        half = model.cuda().eval()
        cases = []
        for length in PROMPTS:
            ids = prompt(length)
            cases.append((length, ids, reference(half, ids, TOKENS)))
        exact = half.float()
        for length, ids, (rounded, _, _) in cases:
            first, tokens, margins = reference(exact, ids, TOKENS)
            for device, ranks in devices(arguments, length):
                answer = generate(
                    arguments.bin, folder, ids, device, *DENSE, f"--tensor-parallel-size={ranks}"
                )
                top = answer["logprobs"][0]["top"]
                top_ids = [t for t, _ in top]
                wrong = first_wrong(tokens, margins, answer["token_ids"])
                result = {
                    "model": name, "prompt": length, "device": device, "ranks": ranks,
                    "kl": kl_of_best(first, top),
                    "kl_of_transformers_bf16": kl_of_best(
                        first, list(zip(top_ids, rounded[top_ids].tolist(), strict=True))),
                    "equal_tokens": sum(a == b for a, b in zip(tokens, answer["token_ids"], strict=True)),
                    "first_wrong": wrong,
                }  # fmt: skip
                result["ok"] = wrong is None and result["kl"] < MAX_KL
                results.append(result)
                print(json.dumps(result), flush=True)
        del exact, half, model
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--json")
    parser.add_argument(
        "--tensor-parallel", type=lambda text: [int(part) for part in text.split(",")], default=[1],
        help="numbers of GPUs to share a model, as 1,2",
    )  # fmt: skip
    parser.add_argument("--only", help="models whose name has this in it")
    arguments = parser.parse_args()
    results = []
    for name, config in shapes().items():
        if arguments.only is None or arguments.only in name:
            check(arguments, name, config, results)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(result["ok"] for result in results) else 1)


if __name__ == "__main__":
    main()
