"""The KV store's NVMe tier, as a user meets it: prefixes that the arena gave up, or that a restart
lost, come back from the disk, and the tokens are those of a service that never had them."""

import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import urllib.request

import pytest
from foretoken.client import Client
from service_helper import Service, faulty_disk, make_model, processes_of, run, wait_until

FULL = "--kv-policy=full"
ALWAYS = "--kv-nvme-reuse=always"  # however slow the disk is beside the machine's other work
# Some 30 slabs: a dozen requests of two segments push a prefix out.
TINY_ARENA = ("--device=cpu", "--kv-host-gib=0.004", "--device-memory-gib=1")
OPTIONS = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def prompt(number):
    """400 tokens: one segment of them is reusable."""
    return [1 + (7 * number + 3 * place + place * place % 11) % 250 for place in range(400)]


def connect(service):
    return Client(service.endpoint, service.key_file)


def nvme(client):
    return client.status()["kv_nvme"]


def push_out(client):
    for number in range(100, 130):
        client.generate(prompt(number), max_tokens=1, ignore_eos=True)


def slabs_written(client):
    """Counts come with a step: one that needs them."""
    client.generate(prompt(99), max_tokens=1, ignore_eos=True)
    return nvme(client)["slabs_written"]


@pytest.fixture(scope="module")
def answers(model):
    """What a service without the tier says to prompts that it has never seen."""
    with Service(model, FULL) as plain, connect(plain) as client:
        assert nvme(client)["state"] == "off"
        return [client.generate(prompt(number), **OPTIONS).ids for number in range(3)]


def test_a_prefix_comes_back_after_the_arena_gave_it_up(model, answers, tmp_path):
    flags = (FULL, f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.05", ALWAYS)
    with Service(model, *flags, size=TINY_ARENA) as service, connect(service) as client:
        for number, ids in enumerate(answers):
            first = client.generate(prompt(number), **OPTIONS)
            assert first.ids == ids and first.usage["cached_tokens"] == 0
        push_out(client)
        read = nvme(client)["slabs_read"]
        for number, ids in enumerate(answers):
            again = client.generate(prompt(number), **OPTIONS)
            assert again.ids == ids and again.usage["cached_tokens"] == 256
        tier = nvme(client)
        assert tier["state"] == "online" and tier["slabs_read"] > read
        assert tier["io_errors"] == 0 and tier["checksum_failures"] == 0
        file = tmp_path / "kv" / "kv-slabs"
        assert file.stat().st_mode & 0o777 == 0o600
        assert service.stop() == 0
    assert not file.exists(), "without --kv-persist nothing is left on the disk"


def test_a_killed_serve_leaves_no_kv_on_the_disk(model, tmp_path):
    flags = (FULL, f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.05")
    with Service(model, *flags, size=TINY_ARENA) as service:
        assert (tmp_path / "kv" / "kv-slabs").exists()
        service.process.kill()
        service.process.wait()
        wait_until(lambda: not service.pids("foretoken-kvstore"), 10)
        assert not (tmp_path / "kv" / "kv-slabs").exists()


def lasting(tmp_path):
    """Flags and options of a service whose KV the next one on the same folders finds."""
    (tmp_path / "service").mkdir()
    flags = (FULL, f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.05", ALWAYS, "--kv-persist")
    return flags, {"size": TINY_ARENA, "folder": tmp_path / "service"}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_prefix_survives_a_restart_of_the_service(model, answers, tmp_path, end):
    flags, options = lasting(tmp_path)
    with Service(model, *flags, **options) as service, connect(service) as client:
        for number, ids in enumerate(answers):
            assert client.generate(prompt(number), **OPTIONS).ids == ids
        wait_until(lambda: slabs_written(client) >= 3)
        service.process.send_signal(end)
        service.process.wait(60)
    with Service(model, *flags, **options) as service, connect(service) as client:
        for number, ids in enumerate(answers):
            again = client.generate(prompt(number), **OPTIONS)
            assert again.ids == ids and again.usage["cached_tokens"] == 256
        assert nvme(client)["slabs_read"] >= 3


def test_a_service_that_was_killed_starts_again_at_once(model, answers, tmp_path):
    """Nothing is waited for: a killed store has its socket and its file until it is gone."""
    flags, options = lasting(tmp_path)
    with Service(model, *flags, **options) as killed:
        with connect(killed) as client:
            assert client.generate(prompt(0), **OPTIONS).ids == answers[0]
            wait_until(lambda: slabs_written(client) >= 1)
        for pid in processes_of(killed.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with Service(model, *flags, **options) as service, connect(service) as client:
            again = client.generate(prompt(0), **OPTIONS)
            assert again.ids == answers[0] and again.usage["cached_tokens"] == 256


def test_damage_on_the_disk_costs_a_prefix_and_no_token(model, answers, tmp_path):
    flags, options = lasting(tmp_path)
    with Service(model, *flags, **options) as service, connect(service) as client:
        for number in range(3):
            client.generate(prompt(number), **OPTIONS)
        assert service.stop() == 0
    file = tmp_path / "kv" / "kv-slabs"
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 4096):
        if data[at : at + 4] != b"FTKV":  # all but superblocks and headers
            data[at] ^= 1
    file.write_bytes(data)
    with Service(model, *flags, **options) as service, connect(service) as client:
        for number, ids in enumerate(answers):
            again = client.generate(prompt(number), **OPTIONS)
            assert again.ids == ids and again.usage["cached_tokens"] == 0
        tier = nvme(client)
        assert tier["checksum_failures"] >= 3 and tier["slabs_read"] == 0


@pytest.mark.parametrize("share", [1, 100])
@pytest.mark.parametrize("kind", ["eio", "short", "stall"])
def test_a_disk_that_fails_costs_time_and_no_token(model, answers, tmp_path, kind, share):
    """For a while; the tier is of use again after it. Short moves, where they end in an error."""
    told = tmp_path / "faults"
    told.write_text("")
    flags = (FULL, f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.05", ALWAYS)
    with faulty_disk(told), Service(model, *flags, size=TINY_ARENA) as service:
        assert "threads with pread" in service.log.read_text()
        with Client(service.endpoint, service.key_file, silence_timeout=60) as client:

            def ask():
                """How many of the prompts were found, on the disk or in memory."""
                push_out(client)
                done = [client.generate(prompt(number), **OPTIONS) for number in range(3)]
                assert [one.ids for one in done] == answers
                return sum(one.usage["cached_tokens"] == 256 for one in done)

            wait_until(lambda: ask() == 3, what="a tier that holds the prompts")
            told.write_text(f"{kind} {share}")
            ask()
            assert kind != "eio" or nvme(client)["io_errors"] > 0
            if share == 100:
                assert nvme(client)["state"] == "offline" and nvme(client)["io_errors"] > 0
                assert ask() == 0
            told.write_text("")
            wait_until(lambda: ask() == 3, timeout=120, what="a tier that works again")
            assert nvme(client)["checksum_failures"] == 0


def test_a_prefix_that_takes_longer_to_read_is_computed_anew(model, answers, tmp_path):
    told = tmp_path / "faults"
    told.write_text("")
    flags = (FULL, f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.05")
    with faulty_disk(told), Service(model, *flags, size=TINY_ARENA) as service, connect(service) as client:
        for number in range(3):
            client.generate(prompt(number), **OPTIONS)
        wait_until(lambda: slabs_written(client) >= 3)
        push_out(client)
        told.write_text("slow 100")
        found = [client.generate(prompt(number), **OPTIONS) for number in range(3)]
        told.write_text("")
        assert [one.usage["cached_tokens"] for one in found] == [256, 0, 0]
        assert [one.ids for one in found] == answers
        tier = nvme(client)
        assert tier["tokens_passed_over"] == 512 and tier["slabs_read"] == 1
        assert "computed anew, as reading is slower" in service.log.read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, and a function that gives it more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", folder]
        return subprocess.run(words, capture_output=True, text=True)

    done = mount("size=4m")
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder, lambda size: mount(f"remount,size={size}").check_returncode()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_no_request_and_is_of_use_again(model, answers, small_disk):
    """The file may be larger than its disk, which holds half of what is pushed out."""
    disk, give = small_disk
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (FULL, f"--kv-nvme-path={disk}/kv", "--kv-nvme-gib=0.05", ALWAYS)
    with Service(model, *flags, f"--metrics-port={port}", size=TINY_ARENA) as service:
        with connect(service) as client:

            def states():
                """What status says, and what metrics do."""
                slabs_written(client)
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                    text = page.read().decode()
                on = re.findall(r'^foretoken_kv_nvme_state\{.*state="([^"]+)".*\} 1$', text, re.M)
                return nvme(client)["state"], on

            def ask():
                """How many of the prompts were found."""
                done = [client.generate(prompt(number), **OPTIONS) for number in range(3)]
                assert [one.ids for one in done] == answers
                return sum(one.usage["cached_tokens"] == 256 for one in done)

            ask()
            wait_until(lambda: push_out(client) or states()[0] == "read-only", what="a full disk")
            wait_until(lambda: states() == ("read-only", ["read-only"]), what="its state")
            written = nvme(client)["slabs_written"]
            for _ in range(3):
                push_out(client)
                assert ask() == 3  # what it has is read
            assert nvme(client)["slabs_written"] == written and nvme(client)["io_errors"] == 0
            give("64m")
            wait_until(lambda: push_out(client) or states()[0] == "online", what="room")
            assert states() == ("online", ["online"])
            assert ask() == 3
            assert nvme(client)["slabs_written"] > written
            assert nvme(client)["checksum_failures"] == 0
        assert service.stop() == 0


def test_two_services_do_not_share_a_folder(model, tmp_path):
    flags = (FULL, f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.05", ALWAYS)
    with Service(model, *flags, size=TINY_ARENA):
        with Service(model, *flags, size=TINY_ARENA, ready=False) as second:
            assert second.process.wait(30) == 3
            assert "in use by another store" in second.log.read_text()


def test_a_folder_that_others_can_enter_is_refused(model, tmp_path):
    os.mkdir(tmp_path / "open", 0o755)
    with Service(model, FULL, f"--kv-nvme-path={tmp_path}/open", ready=False) as service:
        assert service.process.wait(30) == 3
        assert "chmod 700" in service.log.read_text()


def tool(*words):
    done = run("kv", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_file_can_be_looked_at_checked_and_cleaned(model, tmp_path):
    folder = tmp_path / "kv"
    flags = (FULL, f"--kv-nvme-path={folder}", "--kv-nvme-gib=0.05", ALWAYS, "--kv-persist")
    with Service(model, *flags, size=TINY_ARENA) as service, connect(service) as client:
        for number in range(3):
            client.generate(prompt(number), **OPTIONS)
        assert service.stop() == 0
    held = tool("stat", folder)
    assert held["slabs_held"] == 3 and held["kv_heads"] == 1 and held["bad_headers"] == 0
    assert tool("verify", folder)["bad_slabs"] == 0

    data = bytearray((folder / "kv-slabs").read_bytes())
    slabs = 2 * 4096 + 4096 * held["slabs_total"]
    data[slabs + 1000] ^= 1  # in the first slot's slab
    (folder / "kv-slabs").write_bytes(data)
    cleaned = tool("gc", folder)
    assert cleaned["bad_slabs"] == 1 and cleaned["slabs_held"] == 2 and cleaned["freed_bytes"] > 0
    after = tool("stat", folder)
    assert after["slabs_held"] == 2 and after["bad_headers"] == 0
    assert after["allocated_bytes"] < held["allocated_bytes"]


def test_a_folder_without_a_file_is_told_so(tmp_path):
    done = run("kv", "stat", tmp_path)
    assert done.returncode == 1 and "holds no KV" in done.stderr and done.stdout == ""


def test_the_bench_measures_a_folder(tmp_path):
    done = run("bench", "store", tmp_path / "kv", "--bytes=64MiB", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["slabs"] == 15 and figures["promote_gb_per_s"] > 0
    assert not (tmp_path / "kv" / "kv-slabs").exists()


def test_the_bench_leaves_kept_kv_alone(tmp_path):
    file = tmp_path / "kv" / "kv-slabs"
    file.parent.mkdir(mode=0o700)
    file.write_bytes(b"kept" * 4096)
    file.chmod(0o600)
    done = run("bench", "store", file.parent, "--bytes=64MiB")
    assert done.returncode == 3 and "holds KV" in done.stderr
    assert file.read_bytes() == b"kept" * 4096


def test_verify_meets_damage_that_the_tiers_own_check_met_first(model, tmp_path):
    """A file of few slots, written over again and again: the oldest slab is not in the first."""
    folder = tmp_path / "kv"
    flags = (FULL, f"--kv-nvme-path={folder}", "--kv-nvme-gib=0.0015", ALWAYS, "--kv-persist")
    with Service(model, *flags, size=TINY_ARENA) as service, connect(service) as client:
        push_out(client)
        assert service.stop() == 0
    held = tool("stat", folder)
    assert 2 < held["slabs_held"] <= held["slabs_total"]
    data = bytearray((folder / "kv-slabs").read_bytes())
    for slot in range(held["slabs_total"]):
        data[4096 * (2 + held["slabs_total"]) + slot * held["slab_bytes"] + 1000] ^= 1
    (folder / "kv-slabs").write_bytes(data)
    assert tool("verify", folder)["bad_slabs"] == held["slabs_held"]


def make_key(path, digit="7"):
    path.write_text(digit * 64 + "\n")
    path.chmod(0o600)
    return path


def core_limits(service):
    """Soft and hard limit of core dumps, of each of the service's programs that see KV or prompts."""
    limits = {}
    for program in ("foretoken-kvstore", "foretoken-coordinator", "foretoken-worker"):
        for pid in service.pids(program):
            rows = pathlib.Path(f"/proc/{pid}/limits").read_text().splitlines()
            row = next(row for row in rows if row.startswith("Max core file size"))
            limits[program] = row.split()[4:6]
    return limits


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="it is 0 here, for good")
def test_processes_of_an_encrypted_tier_dump_no_core(model, tmp_path):
    flags = (FULL, f"--kv-nvme-path={tmp_path / 'kv'}", "--kv-nvme-gib=0.05", "--kv-encrypt")
    with Service(model, *flags, size=TINY_ARENA) as service:
        limits = core_limits(service)
        assert len(limits) == 3 and all(both == ["1", "1"] for both in limits.values()), limits


def test_an_encrypted_tier_answers_the_same_and_shows_nothing(model, answers, tmp_path):
    """Two files of the same KV: nothing of the plain one's slabs is found in the encrypted one."""
    contents = {}
    for kind, more in (
        ("plain", ()),
        ("sealed", ("--kv-encrypt", f"--kv-key-file={make_key(tmp_path / 'key')}")),
    ):
        folder = tmp_path / kind
        flags = (FULL, f"--kv-nvme-path={folder}", "--kv-nvme-gib=0.05", ALWAYS, "--kv-persist", *more)
        with Service(model, *flags, size=TINY_ARENA) as service, connect(service) as client:
            for number, ids in enumerate(answers):
                assert client.generate(prompt(number), **OPTIONS).ids == ids
            push_out(client)
            for number, ids in enumerate(answers):
                again = client.generate(prompt(number), **OPTIONS)
                assert again.ids == ids and again.usage["cached_tokens"] == 256
            tier = nvme(client)
            assert tier["state"] == "online" and tier["slabs_read"] > 0
            assert tier["io_errors"] == 0 and tier["checksum_failures"] == 0
            assert service.stop() == 0
        contents[kind] = (folder / "kv-slabs").read_bytes()
    held = tool("stat", tmp_path / "plain")
    begin = 4096 * (2 + held["slabs_total"])
    places = [begin + slot * held["slab_bytes"] for slot in range(held["slabs_total"])]
    pieces = [contents["plain"][at : at + 64] for at in places]
    written = [piece for piece in pieces if piece.strip(b"\0")]
    assert len(written) >= held["slabs_held"]
    assert not any(piece in contents["sealed"] for piece in written)


def test_a_kept_encrypted_tier_needs_its_key(model, answers, tmp_path):
    folder = tmp_path / "kv"
    (tmp_path / "service").mkdir()
    key, other = make_key(tmp_path / "key"), make_key(tmp_path / "other", "8")
    kept = (FULL, f"--kv-nvme-path={folder}", "--kv-nvme-gib=0.05", ALWAYS, "--kv-persist")
    options = {"size": TINY_ARENA, "folder": tmp_path / "service"}

    def cached(*flags):
        with Service(model, *kept, *flags, **options) as service, connect(service) as client:
            done = client.generate(prompt(0), **OPTIONS)
            assert done.ids == answers[0]
            state = nvme(client)["state"]
            assert service.stop() == 0
            return done.usage["cached_tokens"], state, service.log.read_text()

    ours = ("--kv-encrypt", f"--kv-key-file={key}")
    assert cached(*ours)[:2] == (0, "online")
    before = (folder / "kv-slabs").read_bytes()
    for wrong, line in (
        (("--kv-encrypt", f"--kv-key-file={other}"), "with another key"),
        ((), "it takes --kv-encrypt and its key"),
    ):
        tokens, state, log = cached(*wrong)
        assert (tokens, state) == (0, "offline") and line in log
        assert (folder / "kv-slabs").read_bytes() == before, "it is left as it is"
    assert cached(*ours)[:2] == (256, "online")

    done = run("kv", "stat", folder)
    assert done.returncode == 3 and "its key" in done.stderr
    held = tool("verify", folder, f"--kv-key-file={key}")
    assert held["encrypted"] and held["slabs_held"] >= 1 and held["bad_slabs"] == 0


def test_a_key_that_cannot_do_is_refused_before_the_start(model, tmp_path):
    key = make_key(tmp_path / "key")
    path = f"--kv-nvme-path={tmp_path}/kv"
    with Service(model, FULL, path, "--kv-persist", "--kv-encrypt", ready=False) as service:
        assert service.process.wait(30) == 3
        assert "needs --kv-key-file" in service.log.read_text()
    key.chmod(0o644)
    flags = (path, "--kv-encrypt", f"--kv-key-file={key}")
    with Service(model, FULL, *flags, ready=False) as service:
        assert service.process.wait(30) == 3
        assert "chmod 600" in service.log.read_text()
