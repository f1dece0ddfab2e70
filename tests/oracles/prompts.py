"""The prompts that the model oracle and the end-to-end tests share."""

import pathlib

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nExplain in two sentences why the sky is blue.<|im_end|>\n"
    "<|im_start|>assistant\n"
)

CODE = '''def merge_sorted(left, right):
    """Merges two sorted lists into one sorted list."""
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
'''

MIXED = (
    "Translate: «Où est la bibliothèque ?» — Где находится библиотека? 图书馆在哪里?"
    " 図書館はどこですか。 المكتبة أين؟ पुस्तकालय कहाँ है? 🏛️📚 1234567890 ½ ≠ π\n\nEnglish:"
)

LONG_TOKENS = 7000


def texts():
    """Name to text; `long` is to be cut to LONG_TOKENS tokens."""
    return {
        "short": "The capital of France is",
        "chat": CHAT,
        "code": CODE,
        "mixed": MIXED,
        "long": pathlib.Path("/usr/share/common-licenses/GPL-3").read_text(encoding="utf-8"),
    }
