"""The demo's two runs: one question about one long text, with a prediction map a query head (the
paper's) and then one a KV head. Called by demo.sh; prints the answers and a table of both."""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from foretoken.client import Client

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORETOKEN = ROOT / "build" / "release" / "bin" / "foretoken"
TEXT = pathlib.Path("/usr/share/common-licenses/GPL-3")  # 7,639 tokens, in Debian and Ubuntu
QUESTION = "In a few sentences: what may someone who receives a copy of a covered work do with it?"
CONTEXT = 8192
BUDGET = 1024
RUNS = ("query-head", "kv-head")


def prompt(text):
    """SmolLM2's chat template around text and question."""
    system = "You are a helpful assistant. Answer from the text."
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{text}\n\n{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


class Service:
    """`foretoken serve` of this process; ends with it."""

    def __init__(self, model, predict_per, audit_every):
        self._folder = tempfile.TemporaryDirectory(prefix="foretoken-demo-")
        self._endpoint_file = pathlib.Path(self._folder.name) / "endpoint.json"
        command = [FORETOKEN, "serve", model, "--port", "0", "--device", "cpu"]
        command += ["--tensor-parallel-size", "2", "--max-model-len", str(CONTEXT)]
        command += ["--kv-policy", "attention-predictor", "--kv-budget", str(BUDGET)]
        command += ["--predict-per", predict_per, "--audit-every", str(audit_every)]
        command += ["--kv-host-gib", "1", "--endpoint-file", self._endpoint_file]
        print("demo:", " ".join(str(word) for word in command), file=sys.stderr)
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def __enter__(self):
        while not self._endpoint_file.exists():
            if self._process.poll() is not None:
                sys.exit(f"demo: the service did not start (exit code {self._process.returncode})")
            time.sleep(0.05)
        endpoint = json.loads(self._endpoint_file.read_text())
        return Client(endpoint["endpoint"], endpoint["key_file"] or None)

    def __exit__(self, *_):
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._folder.cleanup()


def ask(client, text, max_tokens):
    """Streams the answer to the terminal; returns it."""
    pieces = client.stream(prompt(text), max_tokens=max_tokens, temperature=0)
    while True:
        try:
            print(next(pieces).text, end="", flush=True)
        except StopIteration as end:
            print("\n")
            return end.value


def mean(total, count):
    return total / count if count else float("nan")


def rows(answer):
    """(label, figure) of one run."""
    kv, usage, timing = answer.kv, answer.usage, answer.timing
    decoded = usage["completion_tokens"] - 1
    return [
        ("prompt tokens", f"{usage['prompt_tokens']:,}"),
        ("answer tokens", f"{usage['completion_tokens']:,}"),
        ("prefill, tokens/s", f"{1000 * usage['prompt_tokens'] / timing['prefill_ms']:,.0f}"),
        ("decode, tokens/s (audits included)", f"{1000 * decoded / timing['decode_ms']:.1f}"),
        ("blocks predicted", f"{kv['blocks_predicted']:,}"),
        ("blocks fetched", f"{kv['blocks_fetched']:,}"),
        ("blocks late", f"{kv['late']:,}"),
        ("MB from host memory", f"{kv['bytes_host'] / 1e6:,.1f}"),
        ("MB from NVMe", f"{kv['bytes_nvme'] / 1e6:,.1f}"),
        ("recall against dense", f"{mean(kv['recall_sum'], kv['recall_count']):.3f}"),
        ("KL to dense, nats", f"{mean(kv['kl_sum'], kv['kl_count']):.4f}"),
        ("device MB of the sequence", f"{kv['device_bytes'] / 1e6:,.1f}"),
        ("full KV, MB", f"{kv['full_kv_bytes'] / 1e6:,.1f}"),
    ]


def print_table(answers):
    print(f"{'one map a ...':<36}" + "".join(f"{name:>14}" for name in answers))
    columns = [rows(answer) for answer in answers.values()]
    for line in zip(*columns):
        print(f"{line[0][0]:<36}" + "".join(f"{figure:>14}" for _, figure in line))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--audit-every", type=int, default=8)
    arguments = parser.parse_args()
    if not TEXT.exists():
        sys.exit(f"demo: there is no {TEXT}, the long text (Debian's package base-files has it)")
    text = TEXT.read_text(encoding="utf-8")
    os.environ.setdefault("FORETOKEN_LOG", "warn")

    answers = {}
    for predict_per in RUNS:
        with Service(arguments.model, predict_per, arguments.audit_every) as client, client:
            print(f"\n--- one prediction map a {predict_per}: {QUESTION}\n", flush=True)
            answers[predict_per] = ask(client, text, arguments.max_tokens)
    print_table(answers)


if __name__ == "__main__":
    main()
