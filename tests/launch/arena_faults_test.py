"""KV that goes bad in host memory under a running service costs time and no token: the request is
computed anew, and what was bad serves nobody again. Faults are made in the store's memory itself.

FORETOKEN_FAULTS sets how many test_every_kind_of_fault makes (20)."""

import contextlib
import os
import pathlib
import random
import re
import socket
import threading
import time
import urllib.request

import pytest
from foretoken.client import Client, ServiceError
from service_helper import Service, make_model

LAYERS, HEADS, HEAD_DIM = 4, 2, 64
BLOCK = 64 * HEAD_DIM
RUN = 16 * BLOCK
SLAB = (LAYERS * RUN + LAYERS * 16 * 8 + 4095) // 4096 * 4096  # docs/formats.md
SEGMENTS = 3  # whole ones of a prompt
LENGTH = SEGMENTS * 256 + 132
ANSWER = 400
OPTIONS = {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
STREAMED = ("--kv-policy=full", "--kv-resident=never")  # a step reads every block
PREDICTED = ("--kv-policy=attention-predictor", "--kv-budget=256", "--calibrate-with=none")
FAULTS = int(os.environ.get("FORETOKEN_FAULTS", "20"))


def small_model(folder):
    return make_model(
        folder,
        hidden_size=64,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        max_position=2048,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("models") / "small")


def prompt(number=0):
    return [1 + (7 * number + 3 * place + place * place % 101) % 250 for place in range(LENGTH)]


class Arena:
    """The memory of the one store process of a service, behind everybody's back."""

    def __init__(self, service):
        (store,) = service.pids("foretoken-kvstore")
        links = pathlib.Path(f"/proc/{store}/fd").iterdir()
        (memory,) = [link for link in links if os.readlink(link).startswith("/memfd:")]
        self._file = os.open(memory, os.O_RDWR)
        self._stripe = os.fstat(self._file).st_size // HEADS
        self.num_slabs = self._stripe // SLAB

    def close(self):
        os.close(self._file)

    def block(self, layer, head, block, slab=None):
        """Where a block lies; of a service's first sequence, if the slab is not named."""
        slab = block // 16 if slab is None else slab
        return head * self._stripe + slab * SLAB + layer * RUN + block % 16 * BLOCK

    def checksum(self, layer, head, block, slab):
        return head * self._stripe + slab * SLAB + LAYERS * RUN + (layer * 16 + block % 16) * 8

    def read(self, at, size=BLOCK):
        return os.pread(self._file, size, at)

    def write(self, at, data):
        os.pwrite(self._file, data, at)

    def flip(self, at, bit=3):
        (byte,) = self.read(at, 1)
        self.write(at, bytes([byte ^ 1 << bit]))


@contextlib.contextmanager
def running(model, *flags):
    """A service, a client of it, its arena, and a function that reads a metric."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def count(metric):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            found = re.search(rf"^{metric}{{[^}}]*}} (\d+)", page.read().decode(), re.M)
        return int(found[1]) if found else 0

    with Service(model, f"--metrics-port={port}", "--max-model-len=2048", *flags) as service:
        with Client(service.endpoint, service.key_file, silence_timeout=60) as client:
            arena = Arena(service)
            yield service, client, arena, count
            arena.close()


def failures(count):
    return count("foretoken_kv_checksum_failures_total")


def answer(model, *flags, ids=None):
    with running(model, *flags) as (_, client, _, _):
        return client.generate(ids or prompt(), **OPTIONS).ids


@pytest.fixture(scope="module")
def clean(model):
    return answer(model, *STREAMED)


def stream_with(client, fault, ids=None):
    """The tokens of a request under which something happens after its first ones."""
    pieces = client.stream(ids or prompt(), **OPTIONS)
    tokens = list(next(pieces).ids)
    fault()
    for piece in pieces:
        tokens += piece.ids
    return tokens


@pytest.mark.parametrize("more", [(), ("--tensor-parallel-size=2",)])
def test_a_bit_of_a_running_sequence(model, more):
    kept = answer(model, *STREAMED, *more)
    with running(model, *STREAMED, *more) as (service, client, arena, count):
        tokens = stream_with(client, lambda: arena.flip(arena.block(2, 1, 20) + 99))
        assert tokens == kept
        assert "1 KV blocks failed their check; it is computed anew" in service.log.read_text()
        assert count("foretoken_kv_losses_total") == 1
        assert failures(count) == 1
        assert client.status()["kv_slabs_used"] == 0


def test_a_predicted_sequence_goes_on_as_a_fresh_one_would(model):
    def spoil(arena):
        for head in range(HEADS):
            for block in range(16 * SEGMENTS):
                arena.flip(arena.block(1, head, block) + 99)

    kept = answer(model, *PREDICTED)
    with running(model, *PREDICTED) as (service, client, arena, count):
        tokens = stream_with(client, lambda: spoil(arena))
        assert count("foretoken_kv_losses_total") == 1
        assert failures(count) >= 1
        delivered = int(re.search(r"after (\d+) tokens: .* anew", service.log.read_text())[1])
    assert tokens[:delivered] == kept[:delivered]
    with running(model, *PREDICTED) as (_, client, _, _):
        rest = {**OPTIONS, "max_tokens": ANSWER - delivered}
        fresh = client.generate(prompt() + kept[:delivered], **rest)
    assert tokens[delivered:] == fresh.ids


def test_a_cached_prefix(model):
    """Each bad block is read once, when the prefix is loaded; the request after finds a good one."""
    with running(model) as (_, client, arena, count):
        kept = client.generate(prompt(), **OPTIONS).ids
        for layer, head, block in ((0, 0, 3), (3, 1, 17), (2, 0, 47)):
            arena.flip(arena.block(layer, head, block) + 1000)
        answers = [client.generate(prompt(), **OPTIONS) for _ in range(2)]
        assert [again.ids for again in answers] == [kept, kept]
        assert [again.kv["losses"] for again in answers] == [1, 0]
        assert [again.usage["cached_tokens"] for again in answers] == [0, 256 * SEGMENTS]
        assert failures(count) == 3


class StuckBit:
    """A place in memory that keeps its value whatever is written."""

    def __init__(self, arena, places):
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(arena, places))

    def _hold(self, arena, places):
        while not self._ended.is_set():
            for at in places:
                arena.write(at, b"\x5a\xa5\x5a\xa5")
            time.sleep(0.001)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


def test_memory_that_stays_bad_is_left_alone(model, clean):
    with running(model, *STREAMED) as (_, client, arena, count):
        with StuckBit(arena, [arena.block(1, 1, 20) + 96]):
            assert client.generate(prompt(), **OPTIONS).ids == clean
            assert client.generate(prompt(1), **OPTIONS).kv["losses"] == 0
        assert count("foretoken_kv_losses_total") == 1


def test_where_all_memory_is_bad_the_request_ends(model):
    with running(model, *STREAMED) as (_, client, arena, count):
        everywhere = [arena.block(1, 1, 4, slab) + 96 for slab in range(arena.num_slabs)]
        with StuckBit(arena, everywhere), pytest.raises(ServiceError) as failure:
            client.generate(prompt(), **OPTIONS)
        assert failure.value.code == "corrupt"
        assert count("foretoken_kv_losses_total") == 3
        assert len(client.generate(prompt(1), **OPTIONS).ids) == ANSWER


# Behind the sink, whose blocks a first decode step may read twice: for their slots, and when they
# have failed there as any other block. So each is read once a step.
PLACES = [(layer, head, block) for layer in range(LAYERS) for head in range(HEADS)
          for block in range(4, 16 * SEGMENTS)]  # fmt: skip


def make_fault(kind, arena, dice, wanted, stale):
    """In a random block that holds what is wanted there: that of a sequence that runs, and those of
    earlier ones that had the same tokens."""
    layer, head, block = place = dice.choice(PLACES)
    other = wanted[dice.choice([(layer, head, b) for b in range(4, 16 * SEGMENTS) if b != block])]
    bits = [(dice.randrange(BLOCK), dice.randrange(8)) for _ in range(dice.randint(1, 64))]
    for slab in range(arena.num_slabs):
        at = arena.block(layer, head, block, slab)
        if arena.read(at) != wanted[place]:
            continue
        if kind == "flipped":
            data = bytearray(wanted[place])
            for byte, bit in bits:
                data[byte] ^= 1 << bit
            arena.write(at, bytes(data))
        elif kind == "swapped":  # the other one of the two is sound, for the count to be exact
            arena.write(at, other)
        elif kind == "torn":
            arena.write(at + BLOCK // 2, other[BLOCK // 2 :])
        elif kind == "truncated":
            arena.write(at + dice.randrange(BLOCK // 64) * 64, bytes(64))
        elif kind == "stale":
            arena.write(at, stale[place])
        elif kind == "foreign":
            arena.write(at, wanted[layer, 1 - head, block])
        else:
            arena.flip(arena.checksum(layer, head, block, slab) + bits[0][0] % 8, bits[0][1])


def test_every_kind_of_fault(model):
    """One at a time, while a request decodes or in the prefix that the next one reuses: found once,
    by the step or the load that reads it first, and no token is other than without it."""
    kinds = ("flipped", "swapped", "torn", "truncated", "stale", "foreign", "checksum")
    dice = random.Random(20261124)
    options = {**OPTIONS, "max_tokens": 60}
    with running(model, *STREAMED) as (_, client, arena, _):
        client.generate(prompt(1), **options)
        stale = {place: arena.read(arena.block(*place)) for place in PLACES}
    with running(model, *STREAMED) as (_, client, arena, count):
        kept = client.generate(prompt(), **options).ids
        wanted = {place: arena.read(arena.block(*place)) for place in PLACES}
        assert not any(wanted[place] == stale[place] for place in PLACES)
        for number in range(FAULTS):
            pieces = client.stream(prompt(), **options)
            tokens = list(next(pieces).ids)
            if number % 2 == 0:
                make_fault(kinds[number // 2 % len(kinds)], arena, dice, wanted, stale)
            tokens += [token for piece in pieces for token in piece.ids]
            assert tokens == kept, number
            if number % 2 == 1:
                make_fault(kinds[number // 2 % len(kinds)], arena, dice, wanted, stale)
        assert client.generate(prompt(), **options).ids == kept
        assert failures(count) == count("foretoken_kv_losses_total") == FAULTS
