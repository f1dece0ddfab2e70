"""What an independent implementation says: log-probabilities and greedy tokens of transformers.

    python3 tests/oracles/model_oracle.py smollm2 MODEL_FOLDER > tests/oracles/data/smollm2.json
    python3 tests/oracles/model_oracle.py families > tests/oracles/data/families.json

Weights are the folder's, upcast to float32, so all arithmetic is float32. `smollm2` runs the
prompts of prompts.py through the converted SmolLM2-135M-Instruct; `families` runs the small random
models of make_test_model.py, one of each family and layout. A prompt's entry:
  ids       the prompt
  top       the 10 best first tokens, [[id, log-probability], ...]
  greedy    the tokens that follow when each is the best one, whatever they are (no stop at EOS)
  margins   for each of them, its logit less the runner-up's
A family's has `logits` (of the prompt's last token) instead of `top`.

Needs torch and transformers (made with 1.13 and 4.46.3, numpy < 2, jinja2). Qwen3 came with a later
transformers: its Q and K norms are added to Qwen2 here, as Qwen3Attention has them.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import make_test_model  # noqa: E402
from oracles import prompts  # noqa: E402

_CHUNK = 512  # tokens a forward call: bounds the memory of eager attention


def load(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, torch_dtype=torch.float32
    )
    return model.eval()


@torch.no_grad()
def greedy(model, ids, num_tokens):
    """Logits of the prompt's last token, then tokens and margins."""
    cache = transformers.DynamicCache()
    for start in range(0, len(ids), _CHUNK):
        chunk = torch.tensor([ids[start : start + _CHUNK]])
        logits = model(chunk, past_key_values=cache, use_cache=True).logits[0, -1]
    first = logits
    tokens, margins = [], []
    for _ in range(num_tokens):
        best = torch.topk(logits, 2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 4))
        step = torch.tensor([[tokens[-1]]])
        logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
    return first, tokens, margins


def smollm2(folder):
    model = load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    result = {}
    for name, text in prompts.texts().items():
        ids = tokenizer(text).input_ids[: prompts.LONG_TOKENS]
        logits, tokens, margins = greedy(model, ids, 32)
        best = torch.topk(torch.log_softmax(logits, -1), 10)
        top = [[int(i), round(float(p), 5)] for i, p in zip(best.indices, best.values, strict=True)]
        result[name] = {"ids": ids, "top": top, "greedy": tokens, "margins": margins}
        print(f"{name}: {len(ids)} tokens, {tokenizer.decode(tokens)!r}", file=sys.stderr)
    return result


class _WithHeadNorm(torch.nn.Module):
    """A projection whose output is RMS-normalized a head: Qwen3's q_norm(q_proj(x))."""

    def __init__(self, projection, weight, eps):
        super().__init__()
        self.projection, self.weight, self.eps = projection, weight, eps

    def forward(self, x):
        y = self.projection(x)
        heads = y.view(*y.shape[:-1], -1, self.weight.numel())
        scale = torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + self.eps)
        return (heads * scale * self.weight).view(y.shape)


def load_qwen3(folder):
    """Qwen3 as a Llama (explicit head_dim, no bias) whose projections carry the head norms."""
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["LlamaForCausalLM"], model_type="llama")
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    weights = make_test_model.read_weights(folder)
    for i, layer in enumerate(model.model.layers):
        for part in ("q", "k"):
            weight = torch.tensor(weights[f"model.layers.{i}.self_attn.{part}_norm.weight"])
            projection = getattr(layer.self_attn, f"{part}_proj")
            normed = _WithHeadNorm(projection, weight, config["rms_norm_eps"])
            setattr(layer.self_attn, f"{part}_proj", normed)
    return model


def families():
    result = {}
    for name in make_test_model.SPECS:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder) / name
            make_test_model.make(name, folder, layout="classic")
            model = load_qwen3(folder) if name.startswith("qwen3") else load(folder)
        ids = make_test_model.prompt_ids(name)
        logits, tokens, margins = greedy(model, ids, 16)
        result[name] = {
            "ids": ids,
            "logits": [round(float(x), 4) for x in logits],
            "greedy": tokens,
            "margins": margins,
        }
        print(f"{name}: {tokens}, margins {min(margins)}-{max(margins)}", file=sys.stderr)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["smollm2", "families"])
    parser.add_argument("folder", nargs="?", help="the model folder, for smollm2")
    options = parser.parse_args()
    result = smollm2(options.folder) if options.what == "smollm2" else families()
    # One line a prompt keeps the file small and its diffs readable.
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in result.items()]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
