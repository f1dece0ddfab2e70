"""tokenizer.json and tokenizer_config.json from the vocabulary inside a GGUF file."""

from foretoken.gguf_file import GgufError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

# The rules that GGUF only names, as the models' own tokenizer.json write them.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _sequence(first, use_regex):
    return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex)]}


def _split(pattern):
    return _sequence(
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        use_regex=False,
    )


# tokenizer.ggml.pre: normalizer, pre-tokenizer, ignore_merges, adds a BOS token by default
_RULES = {
    "smollm": (
        None,
        _sequence({"type": "Digits", "individual_digits": True}, use_regex=True),
        False,
        False,
    ),
    "gpt-2": (None, _byte_level(use_regex=True), False, False),
    "llama-bpe": (None, _split(_LLAMA3_SPLIT), True, True),
    "qwen2": ({"type": "NFC"}, _split(_QWEN2_SPLIT), False, False),
}


def tokenizer_files(fields):
    """File name to content. Raises GgufError for a vocabulary that isn't byte-level BPE."""
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise GgufError(f"tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') is read")
    rule = fields.get("tokenizer.ggml.pre")
    if rule not in _RULES:
        raise GgufError(
            f"tokenizer.ggml.pre is {rule!r}; these are known: {', '.join(sorted(_RULES))}"
        )
    tokens, kinds, merges = _vocabulary(fields)
    normalizer, pre_tokenizer, ignore_merges, adds_bos = _RULES[rule]
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", adds_bos)
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(tokens, kinds),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": _bos_template(fields, tokens) if adds_bos else None,
            "decoder": _byte_level(use_regex=True),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": ignore_merges,
                "vocab": {t: i for i, t in enumerate(tokens) if kinds[i] != _UNUSED},
                "merges": [merge.split(" ") for merge in merges],
            },
        },
        "tokenizer_config.json": _tokenizer_config(fields, tokens),
    }


def _vocabulary(fields):
    tokens = fields.get("tokenizer.ggml.tokens")
    kinds = fields.get("tokenizer.ggml.token_type")
    merges = fields.get("tokenizer.ggml.merges")
    for name, value in (("tokens", tokens), ("token_type", kinds), ("merges", merges)):
        if not isinstance(value, list) or not value:
            raise GgufError(f"field tokenizer.ggml.{name} is missing or empty")
    if len(kinds) != len(tokens):
        raise GgufError(
            f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens"
        )
    if len(set(tokens)) != len(tokens):
        raise GgufError("tokenizer.ggml.tokens holds a token twice")
    for index, merge in enumerate(merges):
        if merge.count(" ") != 1:
            raise GgufError(f"tokenizer.ggml.merges[{index}] is {merge!r}, not two parts")
    return tokens, kinds, merges


def _added_tokens(tokens, kinds):
    return [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[i] == _CONTROL,
        }
        for i in range(len(tokens))
        if kinds[i] in (_CONTROL, _USER_DEFINED)
    ]


def _special(fields, name, tokens):
    token = fields.get(f"tokenizer.ggml.{name}_token_id")
    if token is None:
        return None
    if not isinstance(token, int) or not 0 <= token < len(tokens):
        raise GgufError(f"tokenizer.ggml.{name}_token_id is {token!r}, beyond the vocabulary")
    return tokens[token]


def _bos_template(fields, tokens):
    bos = _special(fields, "bos", tokens)
    if bos is None:
        raise GgufError("tokenizer.ggml.bos_token_id is missing, yet a BOS token is to be added")
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {
            bos: {"id": bos, "ids": [fields["tokenizer.ggml.bos_token_id"]], "tokens": [bos]}
        },
    }


def _tokenizer_config(fields, tokens):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": _special(fields, "bos", tokens),
        "eos_token": _special(fields, "eos", tokens),
        "pad_token": _special(fields, "padding", tokens),
        "unk_token": _special(fields, "unknown", tokens),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    return {name: value for name, value in config.items() if value is not None}
