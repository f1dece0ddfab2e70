"""Two worker groups of one node, a GPU each: a prefix that one computed is a hit for the other.

    python3 tests/gpu/groups.py --bin FOLDER --model FOLDER [--device cuda|cpu] [--json FILE]

Takes two GPUs and half a minute; --device cpu checks the same with a small model. Exit code 1 where
it isn't so.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from faults import Checks, Setup, status_of, wait_until
from service import Service

SEGMENT = 256
TAIL = 64  # always computed
CLEAR = 0.1  # a margin of logits that rounding does not turn


def ask(setup, connect, prompt):
    command = [
        setup.foretoken, "generate", *connect, "--prompt-ids", prompt, "--json", "--temperature=0",
        "--max-tokens=180", "--ignore-eos", "--logprobs=2",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer_of(asking):
    output, _ = asking.communicate(timeout=120)
    return json.loads(output)


def agrees(answer, first):
    """Equal tokens up to the first where the choice was not clear: what comes behind a prefix is
    computed in other shapes than the whole prompt, and so rounded otherwise."""
    if len(answer["token_ids"]) != len(first["token_ids"]):
        return False
    for place, (ours, theirs) in enumerate(zip(answer["token_ids"], first["token_ids"])):
        if ours != theirs:
            (best, best_logprob), (second, second_logprob) = first["logprobs"][place]["top"][:2]
            return ours in (best, second) and best_logprob - second_logprob <= CLEAR
    return True


def check_shared_prefix(checks, setup, connect, folder):
    prompt = pathlib.Path(folder) / "prompt.json"
    length = 1800 if setup.cuda else 330
    prompt.write_text(json.dumps([1 + place * place % 241 for place in range(length)]))
    first = answer_of(ask(setup, connect, prompt))
    both = [ask(setup, connect, prompt) for _ in range(2)]  # a group takes one at a time
    beside = wait_until(lambda: status_of(setup, connect).get("requests_running") == 2, 20)
    again = [answer_of(asking) for asking in both]
    found = {
        "cached first": first["usage"]["cached_tokens"],
        "cached in each group": [answer["usage"]["cached_tokens"] for answer in again],
        "both at once": beside is not None,
        "both alike": again[0]["token_ids"] == again[1]["token_ids"],
        "equal tokens where clear": all(agrees(answer, first) for answer in again),
    }
    ok = (
        found["cached first"] == 0
        and found["cached in each group"] == [(length - TAIL) // SEGMENT * SEGMENT] * 2
        and (found["both at once"] or not setup.cuda)  # a small model is done too soon to be seen
        and found["both alike"]
        and found["equal tokens where clear"]
    )
    checks.expect("a prefix of one group is a hit in the other", ok, found)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    arguments.gpus = 1  # a group
    setup = Setup(arguments)
    checks = Checks()
    try:
        with tempfile.TemporaryDirectory(prefix="ft-groups-") as folder:
            flags = [*setup.flags, "--num-groups=2", "--max-num-seqs=1"]
            with Service(setup.foretoken, folder, flags) as service:
                check_shared_prefix(checks, setup, service.connect, folder)
    finally:  # also where the service doesn't start
        if arguments.json:
            pathlib.Path(arguments.json).write_text(json.dumps(checks.results, indent=1))
    sys.exit(0 if all(result["ok"] for result in checks.results) else 1)


if __name__ == "__main__":
    main()
