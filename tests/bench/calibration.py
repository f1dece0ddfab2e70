"""What calibration is worth and costs: SmolLM2 on texts, each source and cadence, a row each.

    PYTHONPATH=client/python:tests/launch python3 tests/bench/calibration.py [--budgets 512 1024]
        [--texts licence code maths] [--every 1 5 20] [--tokens 96] [--length 7000] [FLAGS...]

A text's first --length tokens are the prompt, the next --tokens are forced, each one audited: recall
is the attention mass kept, KL that of the logits to dense attention's, `same` the share of tokens
that dense attention would have drawn greedily too. A second service, which audits nothing, gives the
time of a step and the bytes that a token brings from host memory. FLAGS go to every service. A
prompt is prefilled once: its KV stays on disk from service to service.
"""

import argparse
import json
import tempfile

from foretoken.client import Client
from service_helper import LARGE, Service, smollm2
from smollm2_test import TEXTS, tokenize


class Asker:
    """Asks services, one after the other, with one prompt whose KV they hand on."""

    def __init__(self, prompt, forced, folder):
        self.prompt, self.forced, self.folder = prompt, forced, folder

    def ask(self, *flags):
        kept = (f"--kv-nvme-path={self.folder}", "--kv-nvme-gib=1", "--kv-nvme-reuse=always", "--kv-persist")
        with Service(smollm2(), *kept, *flags, size=LARGE, folder=self.folder) as service:
            with Client(service.endpoint, service.key_file, silence_timeout=600) as client:
                answer = client.generate(self.prompt, forced_ids=self.forced, temperature=0,
                                         max_tokens=len(self.forced), ignore_eos=True,
                                         num_logprobs=1)  # fmt: skip
            service.stop()
        return answer


def best(answer):
    return [token["top"][0]["id"] for token in answer.tokens]


def measure(asker, dense, *flags):
    """One row: quality with an audit a token, then cost without."""
    audited = asker.ask("--audit-every=1", *flags)
    plain = asker.ask(*flags)
    kv = audited.kv
    same = [a == b for a, b in zip(best(audited), best(dense), strict=True)]
    return {
        "recall": round(kv["recall_sum"] / kv["recall_count"], 4),
        "kl": round(kv["kl_sum"] / kv["kl_count"], 5),
        "same": round(sum(same) / len(same), 4),
        "step_ms": round(plain.timing["step_ms"], 2),
        "host_kb_a_token": round(plain.kv["bytes_host"] / len(asker.forced) / 1e3, 1),
        "device_mb": round(plain.kv["device_bytes"] / 1e6, 1),
    }


def sources(cadences):
    yield "streaming-llm", ("--kv-policy=streaming-llm",)
    yield "none", ("--calibrate-with=none",)
    for source in ("exact", "sketch"):
        for every in cadences:
            yield f"{source} {every}", (f"--calibrate-with={source}", f"--calibrate-every={every}")
    yield "oracle", ("--kv-policy=oracle",)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--every", nargs="+", type=int, default=[1, 5, 20])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--length", type=int, default=7000)
    options, flags = parser.parse_known_args()
    for text in options.texts:
        ids = tokenize(TEXTS[text]())
        prompt = ids[: options.length]
        forced = ids[options.length : options.length + options.tokens]
        assert len(forced) == options.tokens, f"{text} is too short"
        with tempfile.TemporaryDirectory() as folder:
            asker = Asker(prompt, forced, folder)
            dense = asker.ask("--kv-policy=full", *flags)
            for budget in options.budgets:
                for name, words in sources(options.every):
                    row = measure(asker, dense, f"--kv-budget={budget}", *words, *flags)
                    row = {"text": text, "budget": budget, "calibration": name} | row
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
