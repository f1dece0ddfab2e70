"""The service's messages in msgpack: maps with "v" and "type" (docs/formats.md)."""

import msgpack

VERSION = 1
MAX_FRAME_BYTES = 4 << 20  # from clients; a longer one closes the connection
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "num_logprobs",
)
_REQUEST = (
    "add_special_tokens",
    "max_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "forced_ids",
)


class WireError(Exception):
    """A frame that is no message of this version."""


def message(kind, **fields):
    return {"v": VERSION, "type": kind, **fields}


def generate(request_id, prompt, stream, **options):
    """A `generate` message. Unset options, and those that are None, are left out: the service's
    defaults hold. `stop` may be one string."""
    unknown = set(options) - set(_SAMPLING) - set(_REQUEST)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    made = message("generate", request_id=request_id, stream=stream)
    made["prompt" if isinstance(prompt, str) else "prompt_ids"] = (
        prompt if isinstance(prompt, str) else list(prompt)
    )
    made["sampling"] = {name: options[name] for name in _SAMPLING if name in options}
    made.update({name: options[name] for name in _REQUEST if name in options})
    return made


def encode(made):
    return msgpack.packb(made)


def decode(frame):
    try:
        decoded = msgpack.unpackb(frame, ext_hook=_no_extensions, strict_map_key=True)
    except ValueError as error:
        raise WireError(f"can't read the frame: {error}") from error
    if not isinstance(decoded, dict) or decoded.get("v") != VERSION:
        raise WireError("not a message of this version")
    if not isinstance(decoded.get("type"), str):
        raise WireError("a message without a type")
    return decoded


def _no_extensions(code, _data):
    raise ValueError(f"extension type {code}")
