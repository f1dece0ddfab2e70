"""Our tokenizer against PyPI's `tokenizers`: the same ids and texts, over 1 MB of mixed text.

    python3 tests/common/tokenizer_parity_test.py TOKENIZER_CLI [FOLDER...]

Compares the rules of SmolLM2, Llama 3 and Qwen2.5 (tests/common/data/tokenizer), variants of them
that use every supported component, and the tokenizer of each model FOLDER. Without `tokenizers` it
is skipped (exit code 77), except where CI is set.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import tokenizer_corpus as corpus

try:
    from tokenizers import Tokenizer
except ModuleNotFoundError:
    print("skipped: needs `tokenizers` (tests/requirements.txt), which tests/check.sh installs")
    sys.exit(1 if os.environ.get("CI") else 77)

DATA = pathlib.Path(__file__).resolve().parent / "data/tokenizer"
RULES = ("smollm2", "llama3", "qwen2.5")
SEED = 20261122


class Question:
    """A text, and how to encode it."""

    def __init__(self, text, add_special=True, allow_special=True):
        self.text, self.add_special, self.allow_special = text, add_special, allow_special

    def json(self):
        return json.dumps({"text": self.text, "add_special": self.add_special,
                           "allow_special": self.allow_special})

    def expected(self, tokenizer):
        tokenizer.encode_special_tokens = not self.allow_special
        ids = tokenizer.encode(self.text, add_special_tokens=self.add_special).ids
        kept = tokenizer.decode(ids, skip_special_tokens=False)
        return {"ids": ids, "kept": kept, "skipped": tokenizer.decode(ids), "streamed": kept}


def compare(cli, folder, questions):
    """How many questions were answered in another way; prints the first."""
    asked = "".join(question.json() + "\n" for question in questions)
    done = subprocess.run([cli, folder], input=asked.encode(), capture_output=True, check=False)
    answers = done.stdout.split(b"\n")[:-1]
    if done.returncode != 0 or len(answers) != len(questions):
        print(f"{folder}: {cli} gave {len(answers)} of {len(questions)} answers;",
              done.stderr.decode())
        return 1
    tokenizer = Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
    num_bad = 0
    for question, answer in zip(questions, answers):
        answer, expected = json.loads(answer), question.expected(tokenizer)
        if answer != expected:
            num_bad += 1
            if num_bad <= 3:
                report(folder, question, answer, expected)
    return num_bad


def report(folder, question, answer, expected):
    key = next(key for key in expected if answer.get(key) != expected[key])
    ours, theirs = answer.get(key, answer), expected[key]
    at = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), -1)
    print(f"{folder}: {key} differ at {at}: {ours[at:at + 12]!r} instead of {theirs[at:at + 12]!r}")
    print(f"  {question.json()[:600]}")


def basic_questions(num_bytes, seed):
    text = corpus.mixed_text(seed, num_bytes)
    step = 20_000
    blocks = [text[i:i + step] for i in range(0, len(text), step)]
    questions = [Question(block) for block in blocks]
    questions += [Question(block, add_special=False, allow_special=False) for block in blocks[:3]]
    singles = corpus.SPECIAL_TEXTS + corpus.SPACES + corpus.MARKS + corpus.CONTRACTIONS
    return questions + [Question(text) for text in ["", *singles, *corpus.EMOJI, *corpus.NUMBERS]]


def unicode_questions():
    """Every character, among letters, digits, spaces or marks."""
    characters = corpus.every_character()
    surroundings = ("{0}", "a{0}b ", "1{0}2 ", " {0} ", "e\u0301{0}\u0323")
    questions = []
    for i in range(0, len(characters), 512):
        form = surroundings[i // 512 % len(surroundings)]
        questions.append(Question("".join(form.format(c) for c in characters[i:i + 512])))
    return questions


def variants():
    """(name, tokenizer.json) that use the components that the three rules don't."""
    base = {rule: json.loads((DATA / rule / "tokenizer.json").read_text()) for rule in RULES}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}

    def changed(rule, **fields):
        tokenizer = copy.deepcopy(base[rule])
        tokenizer.update(fields)
        return tokenizer

    behaviors = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
    patterns = ({"Regex": r"\s+"}, {"Regex": r"\p{Lu}?\p{Ll}*"}, {"String": "a."},
                {"Regex": "(?=[aeiou])"}, {"Regex": r"^.|[\p{M}\p{P}]|$"})
    for behavior in behaviors:
        for pattern in patterns:
            for invert in (False, True):
                stage = {"type": "Split", "pattern": pattern, "behavior": behavior,
                         "invert": invert}
                stages = {"type": "Sequence", "pretokenizers": [stage, byte_level]}
                name = f"Split {pattern} {behavior} invert={invert}"
                yield name, changed("llama3", pre_tokenizer=stages)
    digits = {"type": "Digits", "individual_digits": False}
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True}
    yield "runs of digits, prefix space", changed(
        "qwen2.5", pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, prefixed]})
    yield "prefix space", changed("smollm2", pre_tokenizer=prefixed)
    for fuse in (False, True):
        yield f"unknown token, fused={fuse}", changed("smollm2", model={
            **base["smollm2"]["model"], "unk_token": "<|endoftext|>", "fuse_unk": fuse})
    nfc = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    yield "nested normalizers", changed(
        "llama3", normalizer={"type": "Sequence", "normalizers": [nfc]})
    yield "a template on both sides", changed("smollm2", post_processor={
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "y", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {"x": {"id": "x", "ids": [1, 2], "tokens": ["a", "b"]},
                           "y": {"id": "y", "ids": [2], "tokens": ["b"]}}})
    for rule in ("llama3", "qwen2.5"):
        yield f"added tokens of every kind, {rule}", with_added_tokens(copy.deepcopy(base[rule]))


def with_added_tokens(tokenizer):
    """Adds tokens with each flag, some within others, some that normalize."""
    contents = ["aa", "aaa", "é", "e\u0301t", "\u212b", "  ", "\n\n", "Mensch", "ll", "中", "自由",
                "<|", "im_end|>x", "das", "<s>", "[MASK]", "1", "\u00a0"]
    vocab = tokenizer["model"]["vocab"]
    next_id = 1 + max([*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])])
    for i, content in enumerate(contents):
        known = vocab.get(content)
        tokenizer["added_tokens"].append({
            "id": next_id if known is None else known, "content": content,
            "single_word": i % 5 == 2, "lstrip": i % 3 == 1, "rstrip": i % 4 == 1, "normalized": i % 2 == 0,
            "special": i % 7 == 3})
        next_id += known is None
    return tokenizer


def main(cli, folders):
    started = time.monotonic()
    num_bad, num_asked = 0, 0

    def check(name, folder, questions):
        nonlocal num_bad, num_asked
        bad = compare(cli, folder, questions)
        num_bad += bad
        num_asked += len(questions)
        if bad:
            print(f"FAIL {name}: {bad} of {len(questions)}")

    print(f"seed {SEED}")
    questions = basic_questions(1_100_000, SEED) + unicode_questions()
    for rule in RULES:
        check(rule, str(DATA / rule), questions)
    for folder in folders:
        check(folder, folder, questions)
    questions = basic_questions(10_000, SEED + 1)
    for name, tokenizer in variants():
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "tokenizer.json").write_text(json.dumps(tokenizer))
            check(name, folder, questions)
    print(f"{num_asked - num_bad} of {num_asked} texts agree ({time.monotonic() - started:.1f} s)")
    return 1 if num_bad else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
