"""What `tokenizers` says: makes the tokenizers and golden ids of tests/common/data/tokenizer.

    python3 tests/oracles/tokenizer_oracle.py train            the tokenizer.json files
    python3 tests/oracles/tokenizer_oracle.py golden           golden.json, from those files
    python3 tests/oracles/tokenizer_oracle.py unicode-table    the rows of kNewerRanges in
                                                               common/internal/tokenizer_unicode.cc

Needs tests/requirements.txt; unicode-table also Python 3.11, whose unicodedata is Unicode 14.
The trained vocabularies are small; their rules are those of SmolLM2, Llama 3 and Qwen2.5.
"""

import json
import pathlib
import sys
import unicodedata

from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "common"))
import tokenizer_corpus as corpus  # noqa: E402

DATA = TESTS / "common/data/tokenizer"
VOCAB_SIZE = 3000

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex, trim_offsets=True):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets,
            "use_regex": use_regex}


def sequence(first, use_regex):
    return {"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]}


def split(numbers):
    pattern = {"Regex": SPLIT.replace("NUMBERS", numbers)}
    return sequence({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
                    use_regex=False)


def bos_template(token, token_id):
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [begin, text],
                "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}
    return {"type": "Sequence", "processors": [byte_level(True, trim_offsets=False), template]}


DIGITS = {"type": "Digits", "individual_digits": True}

# name: normalizer, pre-tokenizer, ignore_merges, special tokens, other added tokens
RULES = {
    "smollm2": (None, sequence(DIGITS, use_regex=True), False,
                ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []),
    "llama3": (None, split(r"\p{N}{1,3}"), True,
               ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eot_id|>"], []),
    "qwen2.5": ({"type": "NFC"}, split(r"\p{N}"), False,
                ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"]),
}


def training_texts():
    return corpus.PROSE * 4 + corpus.CODE * 4 + [corpus.repository_code(200_000),
                                                 corpus.debian_prose(40_000)]


def train(name):
    normalizer, pre_tokenizer, ignore_merges, special, other = RULES[name]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": ignore_merges, "vocab": {}, "merges": []}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
                 "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None,
                 "decoder": byte_level(True), "model": model}
    trained = Tokenizer.from_str(json.dumps(tokenizer))
    # SmolLM2's vocabulary lacks some bytes; the others start from all 256.
    alphabet = [] if name == "smollm2" else pre_tokenizers.ByteLevel.alphabet()
    first = special if name == "smollm2" else []  # SmolLM2's special tokens stand in the vocabulary
    trained.train_from_iterator(training_texts(), trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=first, initial_alphabet=alphabet,
        show_progress=False))
    tokenizer["model"] = json.loads(trained.to_str())["model"]
    model = tokenizer["model"]
    model["ignore_merges"] = ignore_merges
    if ignore_merges:  # some words are reached without their merge only
        model["merges"] = [merge for i, merge in enumerate(model["merges"]) if i % 16 != 9]
    ids = dict(model["vocab"])
    for token in special + other:
        ids.setdefault(token, len(ids))
    tokenizer["added_tokens"] = [
        {"id": ids[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": token in special}
        for token in special + other]
    if name == "llama3":
        tokenizer["post_processor"] = bos_template(special[0], ids[special[0]])
        model["merges"] = [" ".join(merge) for merge in model["merges"]]  # the older form
    config = {"bos_token": special[0] if name == "llama3" else None,
              "eos_token": {"content": special[-1], "lstrip": False}}
    return tokenizer, config


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def golden_texts():
    singles = corpus.PROSE + corpus.CODE + corpus.SPECIAL_TEXTS + corpus.CONTRACTIONS
    joined = ["".join(texts) for texts in (corpus.EMOJI, corpus.SPACES, corpus.MARKS)]
    return ["", "a", " ", "\0", "a" * 300] + singles + joined + [" ".join(corpus.NUMBERS)]


def golden():
    cases = []
    for name in RULES:
        tokenizer = Tokenizer.from_file(str(DATA / name / "tokenizer.json"))
        for text in golden_texts():
            for allow_special in (True, False) if "<" in text else (True,):
                tokenizer.encode_special_tokens = not allow_special
                ids = tokenizer.encode(text).ids
                cases.append({"rule": name, "text": text, "allow_special": allow_special,
                              "ids": ids, "kept": tokenizer.decode(ids, skip_special_tokens=False),
                              "skipped": tokenizer.decode(ids)})
    return cases


def members(pattern, characters):
    """The characters that a one-character pattern matches."""
    remove = pre_tokenizers.Split(Regex(pattern), "removed")
    found = set()
    for i in range(0, len(characters), 20_000):
        block = characters[i:i + 20_000]
        kept = set("".join(piece for piece, _ in remove.pre_tokenize_str("".join(block))))
        found |= set(block) - kept
    return found


def unicode_table():
    assert unicodedata.unidata_version == "14.0.0", "run this with Python 3.11"
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    newer = {"\u180e": "Cf"}
    for category in sorted({unicodedata.category(c) for c in characters} - {"Cn", "Co", "Cc"}):
        for c in members(rf"\p{{{category}}}", characters):
            if unicodedata.category(c) != category:
                newer[c] = category

    def stand_in(category, size):
        cased = {"Lu": (0x1E00, 0x10400), "Ll": (0x1E01, 0x10428)}
        if category in cased:
            return cased[category][size - 3]
        return next(ord(c) for c in characters if ord(c) >= 0x900 and c not in newer and
                    unicodedata.category(c) == category and len(c.encode()) == size)

    rows = []
    for c in sorted(newer):
        kind = newer[c], len(c.encode())
        if rows and rows[-1][1] == ord(c) - 1 and rows[-1][2] == kind:
            rows[-1][1] = ord(c)
        else:
            rows.append([ord(c), ord(c), kind])
    return [f"{{0x{first:X}, 0x{last:X}, 0x{stand_in(*kind):X}}}," for first, last, kind in rows]


def main(command):
    if command == "train":
        for name in RULES:
            tokenizer, config = train(name)
            write_json(DATA / name / "tokenizer.json", tokenizer)
            write_json(DATA / name / "tokenizer_config.json", config)
    elif command == "golden":
        write_json(DATA / "golden.json", golden())
    elif command == "unicode-table":
        print("\n".join(unicode_table()))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
