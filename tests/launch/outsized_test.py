"""A context that is larger than host memory runs from NVMe, and its tokens are those that it has with
all of its KV in host memory."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from foretoken.client import Client, ServiceError
from service_helper import Service, faulty_disk, make_model, run

LENGTH = 5000  # 20 segments
ANSWER = 200  # past the end of one
PREDICTED = ("--kv-policy=attention-predictor", "--kv-budget=512")
FULL = ("--kv-policy=full", "--kv-resident=never")
OPTIONS = {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
DEVICE = ("--device=cpu", "--device-memory-gib=1", "--max-model-len=5376")
ROOMY = (*DEVICE, "--kv-host-gib=0.25")
QUARTER = (*DEVICE, "--kv-host-gib=0.0079")  # five slabs a head, of 21
HALF = (*DEVICE, "--kv-host-gib=0.0157")  # ten; a sequence must have five


def make_deep_model(folder, heads, kv_heads):
    """Twelve layers, so that a layer is a small part of the KV; heads of 32."""
    return make_model(
        folder,
        hidden_size=32 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=96,
        num_hidden_layers=12,
        max_position=8192,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_deep_model(tmp_path_factory.mktemp("models") / "deep", heads=2, kv_heads=2)


def prompt(number=0):
    return [1 + (7 * number + 3 * place + place * place % 101) % 250 for place in range(LENGTH)]


def connect(service):
    return Client(service.endpoint, service.key_file, silence_timeout=300)


def ask(service, ids, **options):
    with connect(service) as client:
        return client.generate(ids, **{**OPTIONS, **options})


def answer(model, *flags, size):
    with Service(model, *flags, size=size) as service:
        return ask(service, prompt())


@pytest.fixture(scope="module")
def in_memory(model):
    return answer(model, *PREDICTED, "--calibrate-with=none", size=ROOMY)


def nvme(folder, *flags, reuse="always"):
    """However slow the disk is beside the machine's other work, its prefixes are reused."""
    return (f"--kv-nvme-path={folder}", "--kv-nvme-gib=0.1", f"--kv-nvme-reuse={reuse}", *flags)


@pytest.mark.parametrize(
    "more", [(), ("--tensor-parallel-size=2",), ("--guard-arena",), ("--kv-encrypt",)]
)
def test_tokens_are_those_of_a_context_in_memory(model, in_memory, tmp_path, more):
    flags = (*PREDICTED, "--calibrate-with=none", *more)
    own = more and more != ("--kv-encrypt",)  # sums over ranks round otherwise
    kept = answer(model, *flags, size=ROOMY) if own else in_memory
    outsized = answer(model, *flags, *nvme(tmp_path / "kv"), size=QUARTER)
    assert outsized.ids == kept.ids
    assert outsized.kv["bytes_nvme"] > 0 and outsized.kv["late"] >= 0
    assert in_memory.kv["bytes_nvme"] == 0


def test_attention_over_all_blocks_reads_all_of_them(model, tmp_path):
    """Exact calibration, an audit, and dense decode with few slots: a layer at a time."""
    for policy in (
        (*PREDICTED, "--calibrate-every=5", "--audit-every=7"),
        FULL,
        ("--kv-policy=oracle", "--kv-budget=512"),
    ):
        kept = answer(model, *policy, size=ROOMY)
        folder = tmp_path / policy[1]
        outsized = answer(model, *policy, *nvme(folder), size=QUARTER)
        assert outsized.ids == kept.ids, policy
        assert outsized.kv["recall_count"] == kept.kv["recall_count"]
        assert outsized.kv["recall_sum"] == pytest.approx(kept.kv["recall_sum"])


def test_skip_keeps_nearly_all_that_waiting_keeps(model, tmp_path):
    flags = (*PREDICTED, "--calibrate-with=none", "--audit-every=4", *nvme(tmp_path / "kv"))
    recalls = []
    for on_late in ("wait", "skip"):
        kv = answer(model, *flags, f"--on-late={on_late}", size=QUARTER).kv
        recalls.append(kv["recall_sum"] / kv["recall_count"])
        assert 0 < kv["late"] < kv["blocks_fetched"]
    assert recalls[1] == pytest.approx(recalls[0], abs=0.01)


CACHED = 19 * 256  # of a prompt of 20 segments' length: the last 64 queries are always computed


def tier(service):
    with connect(service) as client:
        return client.status()["kv_nvme"]


def settled(service):
    """What the service has published is in the file."""
    before, deadline = tier(service)["slabs_held"], time.monotonic() + 10
    while time.monotonic() < deadline:
        time.sleep(0.3)
        now = tier(service)["slabs_held"]
        if now == before > 0:
            return
        before = now


@pytest.mark.parametrize(
    "more", [(), ("--tensor-parallel-size=2",), ("--guard-arena",), ("--kv-encrypt",)]
)
def test_its_prefix_is_reused(model, in_memory, tmp_path, more):
    flags = (*PREDICTED, "--calibrate-with=none", *more, *nvme(tmp_path / "kv"))
    with Service(model, *flags, size=QUARTER) as service:
        first = ask(service, prompt())
        assert first.usage["cached_tokens"] == 0
        second = ask(service, prompt())
        assert second.usage["cached_tokens"] == CACHED
        assert second.ids == first.ids
        other = ask(service, [*prompt()[:2600], *prompt(3)[2600:]])
        assert other.usage["cached_tokens"] == 10 * 256
        short = ask(service, prompt()[:700])  # one that the arena has room for
        assert short.usage["cached_tokens"] == 2 * 256
        assert tier(service)["checksum_failures"] == 0
    if not more or more == ("--kv-encrypt",):
        assert first.ids == in_memory.ids


@pytest.mark.parametrize("more", [(), ("--kv-encrypt",)], ids=["plain", "encrypted"])
def test_it_reuses_what_was_in_memory(model, in_memory, tmp_path, more):
    flags = (*PREDICTED, "--calibrate-with=none", *more, *nvme(tmp_path / "kv"))
    with Service(model, *flags, size=QUARTER) as service:
        ask(service, prompt()[:600], max_tokens=2)
        settled(service)
        found = ask(service, prompt())
    assert found.usage["cached_tokens"] == 2 * 256
    assert found.ids == in_memory.ids


def test_its_prefix_outlives_a_restart(model, in_memory, tmp_path):
    kept = nvme(tmp_path / "kv", "--kv-persist")
    flags = (*PREDICTED, "--calibrate-with=none", *kept)
    for cached in (0, CACHED):
        with Service(model, *flags, size=QUARTER, folder=tmp_path) as service:
            found = ask(service, prompt())
        assert found.usage["cached_tokens"] == cached
        assert found.ids == in_memory.ids


def make_key(path, digit):
    path.write_text(digit * 64 + "\n")
    path.chmod(0o600)
    return "--kv-encrypt", f"--kv-key-file={path}"


def test_its_encrypted_prefix_outlives_a_restart_for_its_key(model, in_memory, tmp_path):
    ours, other = make_key(tmp_path / "ours", "7"), make_key(tmp_path / "other", "8")
    flags = (*PREDICTED, "--calibrate-with=none", *nvme(tmp_path / "kv", "--kv-persist"))
    for cached in (0, CACHED):
        with Service(model, *flags, *ours, size=QUARTER, folder=tmp_path) as service:
            found = ask(service, prompt())
            assert tier(service)["checksum_failures"] == 0
        assert found.usage["cached_tokens"] == cached
        assert found.ids == in_memory.ids
        with Service(model, *flags, *other, size=QUARTER, folder=tmp_path) as service:
            assert ask(service, prompt()[:700], max_tokens=2).usage["cached_tokens"] == 0
            assert tier(service)["state"] == "offline"
            with pytest.raises(ServiceError, match="NVMe tier is offline"):
                ask(service, prompt())


def test_a_prefix_that_takes_longer_to_read_is_computed_anew(model, in_memory, tmp_path):
    told = tmp_path / "faults"
    told.write_text("")
    flags = (*PREDICTED, "--calibrate-with=none", *nvme(tmp_path / "kv", reuse="auto"))
    with faulty_disk(told), Service(model, *flags, size=QUARTER) as service:
        assert ask(service, prompt()).ids == in_memory.ids
        settled(service)
        told.write_text("slow 100")
        found = [ask(service, prompt(), max_tokens=2) for _ in range(2)]
        told.write_text("")
        assert [one.usage["cached_tokens"] for one in found] == [CACHED, 0]
        assert [one.ids for one in found] == [in_memory.ids[:2]] * 2
        assert tier(service)["tokens_passed_over"] == CACHED


@pytest.mark.parametrize("more", [(), ("--kv-encrypt",)], ids=["plain", "encrypted"])
def test_a_flipped_bit_of_its_prefix_is_computed_anew(model, in_memory, tmp_path, more):
    flags = (*PREDICTED, "--calibrate-with=none", *more, *nvme(tmp_path / "kv"))
    with Service(model, *flags, size=QUARTER) as service:
        ask(service, prompt(), max_tokens=2)
        settled(service)
        damage(tmp_path / "kv" / "kv-slabs")
        found = ask(service, prompt())
        assert found.ids == in_memory.ids
        assert tier(service)["checksum_failures"] > 0


def damage_one_run(file):
    """A bit of a run in the middle of the first slot that has a header."""
    with open(file, "r+b") as data:
        superblock = data.read(64)
        num_slots = int.from_bytes(superblock[12:16], "little")
        slab_bytes = int.from_bytes(superblock[32:40], "little")
        is_sealed = superblock[8] == 3
        num_layers = int.from_bytes(superblock[20:24], "little")
        slot_bytes = slab_bytes + (-(-40 * num_layers // 4096) * 4096 if is_sealed else 0)
        for slot in range(num_slots):
            data.seek(4096 * (2 + slot))
            if data.read(8) != b"FTKVSLAB":
                continue
            at = 4096 * (2 + num_slots) + slot * slot_bytes + slab_bytes // 2
            data.seek(at)
            byte = data.read(1)
            data.seek(at)
            data.write(bytes([byte[0] ^ 1]))
            return
    raise AssertionError("no slot has a header")


@pytest.mark.parametrize("more", [(), ("--kv-encrypt",)], ids=["plain", "encrypted"])
def test_a_flipped_bit_of_one_run_is_computed_anew_once(model, in_memory, tmp_path, more):
    flags = (*PREDICTED, "--calibrate-with=none", *more, *nvme(tmp_path / "kv"))
    with Service(model, *flags, size=QUARTER) as service:
        ask(service, prompt(), max_tokens=2)
        settled(service)
        damage_one_run(tmp_path / "kv" / "kv-slabs")
        for _ in range(2):
            assert ask(service, prompt()).ids == in_memory.ids
        assert service.log.read_text().count("computed anew") <= 1  # a check of the idle disk may see it first
        assert tier(service)["checksum_failures"] > 0
        assert ask(service, prompt()).usage["cached_tokens"] == CACHED


def test_without_nvme_it_is_refused(model):
    with Service(model, *PREDICTED, size=QUARTER) as service:
        with pytest.raises(ServiceError, match="can never fit"):
            ask(service, prompt())


def damage(file):
    """A bit of every sector, as the store's file is at this moment."""
    with open(file, "r+b") as data:
        for at in range(0, file.stat().st_size, 4096):
            data.seek(at)
            byte = data.read(1)
            data.seek(at)
            data.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("more", [(), ("--kv-encrypt",)], ids=["plain", "encrypted"])
def test_a_flipped_bit_costs_time_and_no_token(model, in_memory, tmp_path, more):
    flags = (*PREDICTED, "--calibrate-with=none", *more, *nvme(tmp_path / "kv"))
    with Service(model, *flags, size=QUARTER) as service, connect(service) as client:
        pieces = client.stream(prompt(), **OPTIONS)
        ids = list(next(pieces).ids)
        damage(tmp_path / "kv" / "kv-slabs")
        for piece in pieces:
            ids += piece.ids
        assert "computed anew" in service.log.read_text()
        assert client.status()["kv_nvme"]["checksum_failures"] > 0
    assert len(ids) == ANSWER


# ---- ranks that share a KV head ---------------------------------------------------------------


SHARED = ("--tensor-parallel-size=2",)  # of one head
ROOM_FOR_ONE_MORE = (*DEVICE, "--kv-host-gib=0.0118")  # 15 slabs of one head: each rank has five


@pytest.fixture(scope="module")
def one_head(tmp_path_factory):
    """One KV head: a quarter of host memory is ten slabs, of which each of two ranks must have five."""
    return make_deep_model(tmp_path_factory.mktemp("models") / "one-head", heads=2, kv_heads=1)


def released(service):
    with connect(service) as client:
        return client.status()["kv_slabs_used"] == 0


@pytest.mark.parametrize(
    "policy",
    [(*PREDICTED, "--calibrate-with=none"), (*PREDICTED, "--calibrate-every=5", "--audit-every=7"), FULL],
    ids=["predicted", "calibrated", "full"],
)
def test_each_of_the_ranks_that_share_a_head_keeps_it(one_head, tmp_path, policy):
    kept = answer(one_head, *policy, *SHARED, size=ROOMY)
    with Service(one_head, *policy, *SHARED, *nvme(tmp_path / "kv"), size=QUARTER) as service:
        outsized = ask(service, prompt())
        assert released(service)
    assert outsized.ids == kept.ids
    assert outsized.kv["bytes_nvme"] > 0


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_than_heads(tmp_path, ranks):
    """Two heads: of three ranks one has its head alone."""
    model = make_deep_model(tmp_path / "two-heads", heads=4, kv_heads=2)
    flags = (*PREDICTED, "--calibrate-with=none", f"--tensor-parallel-size={ranks}")
    kept = answer(model, *flags, size=ROOMY)
    with Service(model, *flags, *nvme(tmp_path / "kv"), size=HALF) as service:
        outsized = ask(service, prompt())
        assert released(service)
    assert outsized.ids == kept.ids
    assert outsized.kv["bytes_nvme"] > 0


@pytest.mark.parametrize("is_encrypted", [False, True], ids=["plain", "encrypted"])
def test_ranks_that_share_a_head_reuse_its_prefix(one_head, tmp_path, is_encrypted):
    key = make_key(tmp_path / "key", "7") if is_encrypted else ()
    flags = (*PREDICTED, "--calibrate-with=none", *SHARED, *nvme(tmp_path / "kv", "--kv-persist"), *key)
    with Service(one_head, *flags, size=QUARTER, folder=tmp_path) as service:
        first = ask(service, prompt(), max_tokens=40)
        second = ask(service, prompt(), max_tokens=40)
        other = ask(service, [*prompt()[:2600], *prompt(3)[2600:]], max_tokens=2)
        short = ask(service, prompt()[:700], max_tokens=2)
        assert tier(service)["checksum_failures"] == 0
    with Service(one_head, *flags, size=QUARTER, folder=tmp_path) as service:
        third = ask(service, prompt(), max_tokens=40)
        assert released(service)
    found = [one.usage["cached_tokens"] for one in (first, second, other, short, third)]
    assert found == [0, CACHED, 10 * 256, 2 * 256, CACHED]
    assert first.ids == second.ids == third.ids


def test_a_batch_may_hold_what_one_rank_writes_and_what_each_does(one_head, tmp_path):
    """The other one fits the arena, where one rank writes its KV for both."""
    flags = (*PREDICTED, "--calibrate-with=none", *SHARED)
    other = prompt(3)[:1000]
    with Service(one_head, *flags, size=ROOMY) as service:
        kept = [ask(service, ids) for ids in (prompt(), other)]
    with Service(one_head, *flags, *nvme(tmp_path / "kv"), size=ROOM_FOR_ONE_MORE) as service:
        (one, one_began, one_ended), (two, two_began, two_ended) = stream_both(service, prompt(), other)
        assert released(service)
    assert [one, two] == [kept[0].ids, kept[1].ids]
    assert max(one_began, two_began) < min(one_ended, two_ended)


def test_a_killed_rank_of_those_that_share_a_head(one_head, tmp_path):
    options = {**OPTIONS, "max_tokens": 100}
    flags = (*FULL, *SHARED, *nvme(tmp_path / "kv"))
    with Service(one_head, *flags, size=QUARTER) as service, connect(service) as client:
        undisturbed = ask(service, prompt(5), max_tokens=100).ids
        for victim in (0, 1):
            pieces = client.stream(prompt(5), **options)
            ids = list(next(pieces).ids)
            os.kill(service.pids("foretoken-worker")[victim], signal.SIGKILL)
            for piece in pieces:
                ids += piece.ids
            assert ids == undisturbed
            assert client.status()["worker_restarts"] == victim + 1
            assert released(service)


def stream_both(service, *prompts):
    """At once: their tokens, and when the first and the last piece of each came."""

    def stream(ids):
        with connect(service) as client:
            pieces = [(time.monotonic(), piece.ids) for piece in client.stream(ids, **OPTIONS)]
        came = [at for at, ids in pieces if ids]
        return [token for _, ids in pieces for token in ids], came[0], came[-1]

    with ThreadPoolExecutor() as pool:
        return list(pool.map(stream, prompts))


def test_others_run_beside_it(model, in_memory, tmp_path):
    flags = (*PREDICTED, "--calibrate-with=none", *nvme(tmp_path / "kv"))
    with Service(model, *flags, size=QUARTER) as service:
        outsized, other = stream_both(service, prompt(), prompt()[:100])
    assert outsized[0] == in_memory.ids
    assert len(other[0]) == ANSWER


def test_two_run_at_once(model, in_memory, tmp_path):
    flags = (*PREDICTED, "--calibrate-with=none", *nvme(tmp_path / "kv"))
    with Service(model, *flags, size=HALF) as service:
        (one, one_began, one_ended), (two, two_began, two_ended) = stream_both(service, prompt(), prompt())
        with connect(service) as client:
            assert client.status()["kv_slabs_used"] == 0
    assert one == two == in_memory.ids
    assert max(one_began, two_began) < min(one_ended, two_ended), "each began before the other had ended"


def test_the_bench_compares_it_with_all_in_memory(model, tmp_path):
    flags = (*PREDICTED, "--calibrate-with=none", *nvme(tmp_path / "kv"), "--on-late=skip", *QUARTER)
    (tmp_path / "text").write_text("To be, or not to be, that is the question. ")
    text = f"--prompt-file={tmp_path / 'text'}"
    load = ("--context=5000", text, "--tokens=20", "--trace=churn=8", "--baseline=memory", "--json")
    done = run("bench", "decode", "--model", model, *flags, *load)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (memory,) = found["baselines"]
    assert found["late"] > 0 and found["nvme_bytes"] > 0
    assert memory["baseline"] == "memory" and memory["ratio"] > 0
    assert memory["nvme_bytes"] == 0
