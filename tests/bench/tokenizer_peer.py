"""Encoding speed beside PyPI's `tokenizers`, on one thread: CPU time for 1.1 MB in one text.

    python3 tests/bench/tokenizer_peer.py TOKENIZER_BENCH FOLDER...
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import Tokenizer  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "common"))
import tokenizer_corpus as corpus  # noqa: E402

NUM_BYTES = 1_100_000
ROUNDS = 4


def texts():
    code = corpus.repository_code(500_000) + corpus.debian_prose(40_000)
    return {"mixed": corpus.mixed_text(1, NUM_BYTES), "code and English": code * 2}


def theirs(folder, text):
    tokenizer = Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
    best = 1e9
    for _ in range(ROUNDS):
        start = time.process_time()
        tokenizer.encode(text)
        best = min(best, time.process_time() - start)
    return best


def main(bench, folders):
    for folder in folders:
        for name, text in texts().items():
            with tempfile.NamedTemporaryFile() as file:
                file.write(text.encode())
                file.flush()
                done = subprocess.run([bench, folder, file.name], stdout=subprocess.PIPE, check=True)
            ours = json.loads(done.stdout)
            megabytes, peer_s = ours["bytes"] / 1e6, theirs(folder, text)
            print(f"{folder}, {name}: {megabytes / ours['encode_s']:.1f} MB/s, tokenizers "
                  f"{megabytes / peer_s:.2f} MB/s, {peer_s / ours['encode_s']:.1f} times; "
                  f"load {ours['load_s']:.2f} s")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
