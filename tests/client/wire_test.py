"""The Python client's messages: what goes out, and what may not come in."""

import msgpack
import pytest
from foretoken import wire


def test_a_request_has_only_what_was_set():
    made = wire.generate("r1", "Hello", stream=True, max_tokens=5, temperature=0.0, stop=["x"])
    assert made == {
        "v": wire.VERSION,
        "type": "generate",
        "request_id": "r1",
        "stream": True,
        "prompt": "Hello",
        "sampling": {"temperature": 0.0},
        "max_tokens": 5,
        "stop": ["x"],
    }


def test_one_stop_string_needs_no_list_and_none_is_unset():
    made = wire.generate("r1", "Hello", stream=True, stop="END", temperature=None)
    assert made["stop"] == ["END"] and made["sampling"] == {}


def test_token_ids_are_a_prompt_too():
    assert wire.generate("r", (1, 2), stream=False)["prompt_ids"] == [1, 2]


def test_a_mistyped_option_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        wire.generate("r", "x", stream=False, temprature=1.0)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb({"type": "done"}),
        msgpack.packb({"v": wire.VERSION + 1, "type": "done"}),
        msgpack.packb({"v": wire.VERSION}),
        msgpack.packb({"v": wire.VERSION, "type": 3}),
        msgpack.packb({"v": wire.VERSION, "type": "done"}) + b"\x00",
        msgpack.packb({"v": wire.VERSION, "type": msgpack.ExtType(5, b"x")}),
        msgpack.packb({1: 2}),
    ],
)
def test_what_is_no_message_is_refused(frame):
    with pytest.raises(wire.WireError):
        wire.decode(frame)


def test_a_message_comes_back():
    made = wire.message("cancel", request_id="r")
    assert wire.decode(wire.encode(made)) == made
