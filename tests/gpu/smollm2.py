"""SmolLM2's real weights on the CUDA device, against transformers and against the CPU device.

    python3 tests/gpu/smollm2.py --bin FOLDER --model MODEL... --oracle smollm2.json --text FILE

MODEL is a model folder, or the GGUF file that it is made of, whole or as parts in their order
(converted first; needs numpy and client/python in PYTHONPATH). Needs torch and transformers.

Dense, on the prompts of tests/oracles/data/smollm2.json: greedy tokens equal transformers' (float32,
on the same weights) wherever its margin exceeds 0.1, and the KL divergence of the first token's
distribution stays under 1e-3. Predicted, after --length tokens of the text, with the next ones
forced and every step audited: recall is within 0.005 and KL within 5 % of the CPU device's. Exit
code 1 where it isn't so.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from itertools import product

import torch
import transformers
from oracle import CLEAR, DENSE, MAX_KL, TOKENS, first_wrong, generate, kl_of_best, reference

BUDGET = 1024
FORCED = 48
MAX_RECALL_DIFFERENCE = 0.005
MAX_KL_DIFFERENCE = 0.05  # of the CPU device's


def model_folder(paths, scratch):
    """The folder that was given, or one made of a GGUF file."""
    if pathlib.Path(paths[0]).is_dir():
        return pathlib.Path(paths[0])
    from foretoken.model_import import import_gguf

    whole = scratch / "model.gguf"
    with open(whole, "wb") as out:
        for path in paths:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, out)
    import_gguf(whole, scratch / "model")
    return scratch / "model"


def tokenize(bin_folder, model, text):
    command = [f"{bin_folder}/foretoken", "tokenize", str(model), "--file", str(text)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare_dense(options, model, report):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = transformers.AutoModelForCausalLM.from_pretrained(model).float().to(device).eval()
    for name, case in json.loads(options.oracle.read_text()).items():
        ids = case["ids"][: options.length]
        first, tokens, margins = reference(exact, ids, TOKENS)
        for device in options.devices:
            answer = generate(options.bin, model, ids, device, *DENSE)
            kl = kl_of_best(first, answer["logprobs"][0]["top"])
            wrong = first_wrong(tokens, margins, answer["token_ids"])
            report(
                "dense", kl < MAX_KL and wrong is None, prompt=name, tokens=len(ids), device=device,
                kl=kl, first_wrong=wrong,
                equal_tokens=sum(a == b for a, b in zip(tokens, answer["token_ids"], strict=True)),
                clear_margins=sum(margin > CLEAR for margin in margins),
            )  # fmt: skip


def predicted(options, model, ids, forced, device, per, source):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(forced, file)
        file.flush()
        answer = generate(
            options.bin, model, ids, device, "--kv-policy", "attention-predictor", "--kv-budget",
            str(BUDGET), "--predict-per", per, "--calibrate-with", source, "--audit-every", "1",
            "--forced-ids", file.name, "--max-tokens", str(len(forced)),
        )  # fmt: skip
    assert answer["token_ids"] == forced
    return answer["kv"]


def compare_predicted(options, model, report):
    ids = tokenize(options.bin, model, options.text)
    ids, forced = ids[: options.length], ids[options.length : options.length + FORCED]
    # The devices' own defaults differ.
    for per, source in product(("kv-head", "query-head"), ("exact", "none")):
        expected = predicted(options, model, ids, forced, "cpu", per, source)
        for device in options.devices:
            found = expected
            if device != "cpu":
                found = predicted(options, model, ids, forced, device, per, source)
            recall_is_close = abs(found["recall"] - expected["recall"]) <= MAX_RECALL_DIFFERENCE
            kl_is_close = abs(found["kl"] - expected["kl"]) <= MAX_KL_DIFFERENCE * expected["kl"]
            report(
                "predicted", recall_is_close and kl_is_close, predict_per=per,
                calibrate_with=source, tokens=len(ids), forced=len(forced), budget=BUDGET,
                device=device, recall=found["recall"], recall_of_cpu=expected["recall"], kl=found["kl"], kl_of_cpu=expected["kl"],
                blocks_fetched=found["blocks_fetched"],
                blocks_fetched_of_cpu=expected["blocks_fetched"],
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True, nargs="+")
    parser.add_argument("--oracle", required=True, type=pathlib.Path)
    parser.add_argument("--text", required=True, type=pathlib.Path)
    parser.add_argument("--length", type=int, default=7000, help="longest prompt, in tokens")
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    results = []

    def report(check, ok, **found):
        results.append({"check": check, "ok": ok, **found})
        print(json.dumps(results[-1]), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(options.model, pathlib.Path(scratch))
        compare_dense(options, model, report)
        compare_predicted(options, model, report)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(result["ok"] for result in results) else 1)


if __name__ == "__main__":
    main()
