"""How long a stream waits for its next token while long prompts of others are computed.

    python3 tests/gpu/interleaved.py --bin FOLDER --model FOLDER [--bounds 20 50 200] [--length TOKENS]
                                     [--device cuda|cpu] [--json FILE]

For each bound (--max-inter-token-ms) a service is started. A stream decodes alone, and then beside
prompts of --length tokens, one after another. A row says the time from token to token of both, ms, and
how fast the prompts were computed. Takes half a minute a bound on a GPU. Exit code 1 where a token
beside prompts took more than the bound and a tenth.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import sys
import tempfile
import threading

from service import Service

NAMES = ("median", "p95", "max")


def stream(service, arguments):
    """A stream's times from token to token."""
    flags = (f"--context={arguments.stream_context}", f"--tokens={arguments.tokens}")
    text = ("--prompt-file", __file__, "--tokenizer", arguments.model)
    figures = service.run("bench", "decode", *flags, *text)["ms_per_token"]
    return {name: round(figures[name], 2) for name in NAMES}


def prompts_until(over, service, length):
    """Asks for one token after each of new prompts, until it is over: the rates, tokens/s."""
    pick = random.Random(20261129)
    rates = []
    while not over.is_set():
        answer = service.ask([pick.randrange(1, 250) for _ in range(length)], "--max-tokens=1")
        rates.append(round(1000 * length / answer["timing_ms"]["prefill"]))
    return rates


def measure(arguments, bound, folder):
    flags = [
        arguments.model, f"--device={arguments.device}", "--load-format=dummy", "--kv-policy=full", "--port=0",
        f"--max-model-len={arguments.length + 256}", f"--kv-host-gib={arguments.host_gib}",
        f"--max-inter-token-ms={bound}",
    ]  # fmt: skip
    with Service(f"{arguments.bin}/foretoken", folder, flags) as service:
        stream(service, arguments)  # what first requests pay once
        service.ask(list(range(1, 250)) * (arguments.length // 249), "--max-tokens=1")
        alone = stream(service, arguments)
        over = threading.Event()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asking = pool.submit(prompts_until, over, service, arguments.length)
            try:
                beside = stream(service, arguments)
            finally:
                over.set()
        rates = asking.result()
    return {"bound_ms": bound, "alone": alone, "beside": beside, "prompt_tokens_per_s": rates}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bounds", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--length", type=int, default=32000)
    parser.add_argument("--stream-context", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--host-gib", type=float, default=24)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = []
    for bound in arguments.bounds:
        with tempfile.TemporaryDirectory(prefix="ft-interleaved-") as folder:
            rows.append(measure(arguments, bound, folder))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1))
    ok = all(row["prompt_tokens_per_s"] and row["beside"]["max"] <= 1.1 * row["bound_ms"] for row in rows)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
