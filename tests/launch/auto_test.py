"""--kv-policy auto, as a user meets it: dense while the device has room, predicted after a spill."""

import re

import pytest
from foretoken.client import Client
from service_helper import Service

import make_test_model  # isort: skip (its path is service_helper's)

AUTO = ("--kv-policy=auto", "--kv-budget=1008", "--calibrate-with=none")
SMALL = ("--device=cpu", "--kv-host-gib=0.25")
OPTIONS = {"temperature": 0, "ignore_eos": True}
# Two sequences: their prompts and greatest lengths, and those in blocks. Spilled, the first one has
# sink, local window and 55 blocks that are chosen.
LONG, SHORT = 900, 100
LONG_MOST, SHORT_MOST = 2000, 600
LONG_BLOCKS, SPILLED_BLOCKS, SHORT_BLOCKS = 125, 4 + 5 + 55, 38


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three KV heads, so that two ranks' shares differ, and 2,048 tokens of context."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    spec = {**make_test_model.SPECS["qwen3-v5"], "num_hidden_layers": 8, "max_position": 2048}
    make_test_model.SPECS["deep"] = spec
    make_test_model.make("deep", folder)
    return folder


def prompt(length):
    return [1 + (7 * place + place * place % 11) % 250 for place in range(length)]


def connect(service):
    return Client(service.endpoint, service.key_file)


def whole(client, length, most):
    return client.generate(prompt(length), max_tokens=most - length, **OPTIONS)


def last(pieces):
    """The answer that a stream ends with."""
    try:
        while True:
            next(pieces)
    except StopIteration as end:
        return end.value


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request):
    return f"--tensor-parallel-size={request.param}"


@pytest.fixture(scope="module")
def dense(model, ranks):
    """The two sequences under `full`."""
    with Service(model, "--kv-policy=full", ranks, size=(*SMALL, "--device-memory-gib=1")) as service:
        with connect(service) as client:
            return whole(client, LONG, LONG_MOST).ids, whole(client, SHORT, SHORT_MOST).ids


@pytest.fixture(scope="module")
def plan(model, ranks, dense):
    """MiB of rank 0's memory plan; on the way, that auto is dense where everything fits."""
    with Service(model, *AUTO, ranks, size=(*SMALL, "--device-memory-gib=1")) as service:
        with connect(service) as client:
            answer = whole(client, LONG, LONG_MOST)
            assert answer.ids == dense[0]
            assert not answer.kv["spilled"] and answer.kv["blocks_predicted"] == 0
        rows = re.findall(r"^ +([a-zA-Z0-9, ]+?) +([0-9.]+)$", service.log.read_text(), re.M)
        return {what: float(mib) for what, mib in rows}


def test_the_longest_sequence_spills_for_a_new_one(model, ranks, dense, plan):
    block = plan["KV slots until it spills"] / (2048 // 16)
    both = LONG_BLOCKS + SHORT_BLOCKS
    one_spilled = SPILLED_BLOCKS + SHORT_BLOCKS
    mib = plan["in all"] - plan["free, for sequences"] + 1.5 * (plan["tables"] + plan["attention history"])
    mib += block * (both + one_spilled) / 2
    memory = f"--device-memory-gib={mib / 1024}"
    with Service(model, *AUTO, ranks, size=(*SMALL, memory)) as service:
        with connect(service) as first, connect(service) as second:
            pieces = first.stream(prompt(LONG), max_tokens=LONG_MOST - LONG, **OPTIONS)
            next(pieces)
            new = whole(second, SHORT, SHORT_MOST)
            old = last(pieces)
    assert not new.kv["spilled"] and new.ids == dense[1]
    assert old.kv["spilled"] and old.kv["blocks_predicted"] > 0
    # While the budget holds all blocks, nothing is lost by it.
    assert len(old.ids) == LONG_MOST - LONG
    assert old.ids[: 1008 - LONG] == dense[0][: 1008 - LONG]
