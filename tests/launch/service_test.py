"""The whole service, as a user meets it, on a random model: processes, clients, faults."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import threading
import time

import pytest
import service_helper
from foretoken import wire
from foretoken.client import Client, ServiceError
from service_helper import BIN, SMALL, Service, make_model, run, wait_until, with_old_gpu_libraries

FULL = "--kv-policy=full"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def service(model):
    with Service(model, FULL, "--tensor-parallel-size=2") as running:
        yield running


@pytest.fixture
def client(service):
    with Client(service.endpoint, service.key_file) as connected:
        yield connected


def generate(model, *flags):
    done = run("generate", "--model", model, *SMALL, "--json", "--temperature=0", "--ignore-eos", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_generate_prints_the_fields_of_the_contract(model):
    answer = generate(model, FULL, "--prompt=Once upon a time", "--max-tokens=5", "--logprobs=3")
    assert len(answer["token_ids"]) == 5
    assert answer["finish_reason"] == "length"
    assert len(answer["logprobs"]) == 5 and len(answer["logprobs"][0]["top"]) == 3
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_ids"])
    assert answer["kv"]["policy"] == "full"
    assert {"recall", "kl", "blocks_fetched", "bytes_host", "bytes_nvme", "late"} <= set(answer["kv"])
    assert answer["kv"]["predictor_fallbacks"] == 0
    assert answer["timing_ms"]["total"] > 0


def test_ranks_agree_with_one_rank(model):
    """Margins of this random model are wide: rounding doesn't turn a token."""
    flags = (FULL, "--prompt=Once upon a time", "--max-tokens=24")
    one = generate(model, *flags)["token_ids"]
    assert generate(model, *flags, "--tensor-parallel-size=2")["token_ids"] == one


def test_a_budget_as_large_as_the_context_is_full_attention(model):
    flags = ("--prompt=" + "abc " * 60, "--max-tokens=24", "--kv-budget=512")
    full = generate(model, FULL, *flags)["token_ids"]
    assert generate(model, "--kv-policy=attention-predictor", *flags)["token_ids"] == full


@pytest.mark.parametrize("ranks", [1, 2])
def test_heads_that_keep_too_little_attend_all_blocks(model, ranks):
    flags = ("--prompt=" + "abc defg hi " * 36, "--max-tokens=40")
    full = generate(model, FULL, *flags)["token_ids"]
    flags += ("--kv-budget=144", "--audit-every=1", f"--tensor-parallel-size={ranks}")
    free = generate(model, *flags)
    bound = generate(model, *flags, "--min-recall=0.999")
    assert free["kv"]["dense_fallbacks"] == 0 and free["kv"]["recall"] < 0.98
    assert bound["kv"]["dense_fallbacks"] > 0 and bound["kv"]["dense_capped"] == 0
    assert bound["kv"]["recall"] > 0.98
    assert bound["token_ids"] == full
    capped = generate(model, *flags, "--min-recall=0.999", "--max-dense-heads=0")
    assert capped["kv"]["dense_fallbacks"] == 0 and capped["kv"]["dense_capped"] > 0
    assert capped["token_ids"] == free["token_ids"]


def test_stream_and_whole_answer_are_the_same(client):
    pieces = client.stream("Once upon a time", max_tokens=20, temperature=0, ignore_eos=True)
    ids, text = [], ""
    for piece in pieces:
        ids += piece.ids
        text += piece.text
    whole = client.generate("Once upon a time", max_tokens=20, temperature=0, ignore_eos=True)
    assert whole.ids == ids
    assert whole.text.startswith(text)  # the stream holds back what may begin a character


def test_the_command_connects_to_a_running_service(service, client):
    done = run("generate", *service.connect, "--prompt=Hello", "--max-tokens=8", "--temperature=0",
               "--ignore-eos", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = client.generate("Hello", max_tokens=8, temperature=0, ignore_eos=True)
    assert json.loads(done.stdout)["token_ids"] == answer.ids


def test_prefill_takes_as_many_tokens_a_step_as_suit_a_cpu(service):
    assert "context 512, 512 prefill tokens a step" in service.log.read_text()


def test_status_and_models(service, client, model):
    assert client.status()["state"] == "ready"
    assert client.status()["tensor_parallel_size"] == 2
    assert client.models() == [model.name]
    assert json.loads(run("status", *service.connect, "--json").stdout)["state"] == "ready"


@pytest.mark.parametrize(
    "prompt, options",
    [
        ("", {}),
        ([], {}),
        ([1] * 600, {}),
        ([100000], {}),
        ("x", {"max_tokens": 0}),
        ("x", {"temperature": -1.0}),
        ("x", {"num_logprobs": 1000}),
    ],
)
def test_a_bad_request_fails_alone(client, prompt, options):
    with pytest.raises(ServiceError) as error:
        client.generate(prompt, **options)
    assert error.value.code == "invalid_argument"
    assert client.generate("x", max_tokens=2).usage["completion_tokens"] == 2


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt=" + "abc " * 600], "the context has 512"),
        (["--prompt=x", "--max-tokens=5000"], "the context has 512"),
    ],
)
def test_the_command_tells_of_a_bad_request_and_exits_with_2(service, flags, reason):
    done = run("generate", *service.connect, *flags)
    assert done.returncode == 2
    assert reason in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_cancelled_request_frees_its_kv(client):
    before = client.status()["kv_slabs_used"]
    stream = client.stream("Once upon a time", max_tokens=400, ignore_eos=True)
    next(stream)
    stream.close()
    wait_until(lambda: client.status()["requests_running"] == 0, 5)
    wait_until(lambda: client.status()["kv_slabs_used"] == before, 5)


def test_what_a_lost_connection_asked_for_is_cancelled(service, client):
    def cancelled():
        return service.log.read_text().count("cancelled: its client is gone")

    before = cancelled()
    ranks = service.pids("foretoken-worker")
    with Client(service.endpoint, service.key_file) as other:
        whole = other._submit("Once", stream=False, max_tokens=400, ignore_eos=True)
        stream = other.stream("Once", max_tokens=400, ignore_eos=True)
        next(stream)
        assert whole in other._running
        for rank in ranks:  # else both may come to their ends before anybody notices
            os.kill(rank, signal.SIGSTOP)
    try:
        wait_until(lambda: cancelled() == before + 2, 2)
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
    wait_until(lambda: client.status()["requests_running"] == 0, 5)


def test_clients_at_once_get_what_they_get_alone(service, client):
    prompts = [f"{number} " * (10 * number + 1) for number in range(8)]
    options = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    alone = [client.generate(prompt, **options).ids for prompt in prompts]
    together = [None] * len(prompts)

    def ask(index):
        with Client(service.endpoint, service.key_file) as mine:
            together[index] = mine.generate(prompts[index], **options).ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def anonymous_kib(service):
    """Memory of the service's processes that is theirs alone: what a leak would grow."""
    programs = ("foretoken-kvstore", "foretoken-coordinator", "foretoken-worker")
    pids = [pid for program in programs for pid in service.pids(program)]
    lines = [line for pid in pids for line in open(f"/proc/{pid}/status", encoding="ascii")]
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_memory_returns_to_its_baseline(service, client):
    def round_of_requests():
        for number in range(8):
            client.generate(f"{number} " * 100, max_tokens=32, ignore_eos=True)

    slabs = client.status()["kv_slabs_used"]
    round_of_requests()
    after_one = anonymous_kib(service)
    for _ in range(5):
        round_of_requests()
    assert after_one > 0 and anonymous_kib(service) - after_one < 1024
    wait_until(lambda: client.status()["kv_slabs_used"] == slabs, 5)


MALFORMED = {
    "empty": b"",
    "text": b"nonsense",
    "reserved byte": b"\xc1",
    "cut off": wire.encode(wire.generate("cut", "x", stream=False))[:-1],
    "more after it": wire.encode(wire.message("status")) + b"\x00",
    "a list": b"\x90",
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "deep": b"\x91" * 100_000,
    "other version": wire.encode({"v": 99, "type": "status"}),
    "no version": wire.encode({"type": "status"}),
    "unknown type": wire.encode(wire.message("fly")),
    "wrong field": wire.encode(wire.message("cancel", request_id=5)),
}


def test_malformed_frames_are_answered_and_harm_nobody_else(service, client):
    options = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}
    undisturbed = client.generate("Once upon a time", **options).ids
    stream = client.stream("Once upon a time", **options)
    ids = list(next(stream).ids)
    with Client(service.endpoint, service.key_file) as peer:
        for name, frame in MALFORMED.items():
            peer._socket.send(frame)
            assert peer._socket.poll(10_000), name
            assert wire.decode(peer._socket.recv())["type"] == "error", name
        assert peer.status()["state"] == "ready"
    for piece in stream:
        ids += piece.ids
    assert ids == undisturbed


def test_a_port_in_use_exits_with_6(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", model, *SMALL, f"--port={taken.getsockname()[1]}")
    assert done.returncode == 6
    assert "in use" in done.stderr


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.mark.skipif(pathlib.Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_a_missing_gpu_exits_with_5_and_names_rank_and_cause(model):
    size = [flag for flag in SMALL if flag != "--device=cpu"]
    served = run("serve", model, *size, "--device=cuda", "--port=0")
    asked = run("generate", "--model", model, *size, "--device=cuda", "--prompt=x")
    assert (served.returncode, asked.returncode) == (5, 5)
    assert "rank 0 (pid" in last_line(served.stderr) and "--device cpu" in last_line(served.stderr)
    assert "--device cpu" in asked.stderr


def test_a_driver_that_is_too_old_exits_with_5_and_names_rank_and_cause(model):
    size = [flag for flag in SMALL if flag != "--device=cpu"]
    done = run("serve", model, *size, "--device=cuda", "--port=0", env=with_old_gpu_libraries())
    assert done.returncode == 5
    assert "rank 0 (pid" in last_line(done.stderr)
    assert "driver is too old: it takes CUDA up to 12.4" in last_line(done.stderr)


def test_too_little_device_memory_exits_with_5_and_says_what_to_do(model):
    done = run("serve", model, "--device=cpu", "--kv-host-gib=0.25", "--port=0",
               "--device-memory-gib=0.001")  # fmt: skip
    assert done.returncode == 5
    assert "rank 0 (pid" in last_line(done.stderr)
    assert "wanted for weights" in last_line(done.stderr)
    assert "raise --device-memory-gib" in last_line(done.stderr)
    assert "--max-batched-tokens (now 512)" in last_line(done.stderr)


def test_a_client_without_the_key_gets_nothing(service):
    with Client(service.endpoint, None, silence_timeout=1.0) as stranger:
        with pytest.raises(ServiceError) as error:
            stranger.status()
    assert error.value.code == "unavailable"


# A terminal that goes may send several hang-ups, some time apart.
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP] * 2])
def test_a_signal_drains_and_exits_with_0(model, signals):
    with Service(model, FULL) as running:
        with Client(running.endpoint, running.key_file) as client:
            stream = client.stream("Once", max_tokens=300, ignore_eos=True)
            ids = list(next(stream).ids)
            for number in signals:
                running.process.send_signal(number)
                wait_until(lambda: "draining" in running.log.read_text(), what="the drain")
            for piece in stream:
                ids += piece.ids
        assert len(ids) == 300
        assert running.process.wait(30) == 0


def test_a_hang_up_under_nohup_is_ignored(model):
    with Service(model, FULL, under=("nohup",)) as running:
        running.process.send_signal(signal.SIGHUP)
        with Client(running.endpoint, running.key_file) as client:
            assert len(client.generate("Once", max_tokens=8, ignore_eos=True).ids) == 8
        assert "draining" not in running.log.read_text()
        assert running.stop() == 0


def test_a_second_signal_stops_at_once_whatever_runs(model):
    with Service(model, FULL) as running:
        with Client(running.endpoint, running.key_file) as client:
            stream = client.stream("Once", max_tokens=400, ignore_eos=True)
            next(stream)
            os.kill(running.pids("foretoken-worker")[0], signal.SIGSTOP)  # it doesn't come to its end
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "draining: 1 requests" in running.log.read_text(), what="the drain")
            begin = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(30) == 0
            assert time.monotonic() - begin < 4  # children are given 5 s where they are waited for


def test_a_coordinator_that_starves_drains_all_the_same(model):
    with Service(model, FULL) as running:
        with Client(running.endpoint, running.key_file) as client:
            stream = client.stream("Once", max_tokens=400, ignore_eos=True)
            ids = list(next(stream).ids)
            coordinator = running.pids("foretoken-coordinator")[0]
            os.kill(coordinator, signal.SIGSTOP)
            running.process.send_signal(signal.SIGTERM)
            time.sleep(7)
            os.kill(coordinator, signal.SIGCONT)
            for piece in stream:
                ids += piece.ids
        assert len(ids) == 400
        assert running.process.wait(30) == 0


@pytest.fixture
def set_coordinator(tmp_path, monkeypatch):
    """Takes a shell script: services that start from then on have it in the coordinator's place."""

    def set_to(script):
        shutil.copy(BIN / "foretoken", tmp_path)
        for program in ("foretoken-kvstore", "foretoken-worker"):
            (tmp_path / program).symlink_to(BIN / program)
        coordinator = tmp_path / "foretoken-coordinator"
        coordinator.write_text(f"#!/bin/sh\n{script}")
        coordinator.chmod(0o755)
        monkeypatch.setattr(service_helper, "FORETOKEN", tmp_path / "foretoken")

    return set_to


def test_ranks_that_end_before_their_coordinator_are_not_restarted(model, set_coordinator):
    """As where it still has words for a client that reads nothing."""
    set_coordinator(f'{BIN}/foretoken-coordinator "$@"\ncode=$?\nsleep 2\nexit $code\n')
    with Service(model, FULL) as running:
        assert run("drain", *running.connect).returncode == 0
        assert running.process.wait(30) == 0
        assert "restarting" not in running.log.read_text()


def test_the_coordinator_opens_as_many_files_as_it_may(model):
    with Service(model, FULL, under=["prlimit", "--nofile=512:4096"]) as running:
        (pid,) = running.pids("foretoken-coordinator")
        (line,) = re.findall("Max open files.*", pathlib.Path(f"/proc/{pid}/limits").read_text())
        assert line.split()[3:5] == ["4096", "4096"]


def test_everything_dies_with_a_killed_serve(model):
    with Service(model, FULL, "--tensor-parallel-size=2") as running:
        assert len(running.pids("foretoken-worker")) == 2
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not running.pids("foretoken-worker"), 10)
        wait_until(lambda: not running.pids("foretoken-coordinator"), 10)
        wait_until(lambda: not running.pids("foretoken-kvstore"), 10)


STORY = "Once upon a time"
LONG = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}


def stream_through_a_death(running, client, prompt=STORY):
    """The tokens of a request, a rank being killed after the first of them."""
    stream = client.stream(prompt, **LONG)
    ids = list(next(stream).ids)
    os.kill(running.pids("foretoken-worker")[0], signal.SIGKILL)
    for piece in stream:
        ids += piece.ids
    return ids


def test_a_killed_rank_is_replaced_and_the_stream_goes_on(model):
    with Service(model, FULL, "--tensor-parallel-size=2") as running:
        with Client(running.endpoint, running.key_file) as client:
            undisturbed = client.generate(STORY, **LONG).ids
            assert stream_through_a_death(running, client) == undisturbed
            assert client.status()["worker_restarts"] == 1
        assert "worker group 0 exited with code 137 (signal 9" in running.log.read_text()


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "long", max_position=2048)


def long_prompt(length):
    return [1 + (7 * length + 3 * place + place * place % 101) % 250 for place in range(length)]


def continued(running):
    """Of each request that went on: tokens delivered before, computed again, all that it had."""
    line = r"goes on after (\d+) tokens: (\d+) of (\d+) tokens are computed again"
    return [tuple(map(int, found)) for found in re.findall(line, running.log.read_text())]


def test_a_rank_that_dies_in_a_drain_is_replaced(long_model):
    long = {**LONG, "max_tokens": 1800}  # it lasts until the rank is dead
    with Service(long_model, FULL, "--max-model-len=2048", "--tensor-parallel-size=2") as running:
        with Client(running.endpoint, running.key_file) as client:
            undisturbed = client.generate(STORY, **long).ids
            stream = client.stream(STORY, **long)
            ids = list(next(stream).ids)
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.status()["state"] == "draining", what="a drain")
            os.kill(running.pids("foretoken-worker")[0], signal.SIGKILL)
            for piece in stream:
                ids += piece.ids
            assert ids == undisturbed
        assert running.process.wait(30) == 0


def test_a_continued_request_computes_its_last_tokens_again(long_model):
    """The last 64 queries, and what fills no whole segment before them: 64 to 319 tokens."""
    with Service(long_model, FULL, "--max-model-len=2048") as running:
        with Client(running.endpoint, running.key_file) as client:
            for length in (300, 700, 1100):
                undisturbed = client.generate(long_prompt(length), **LONG).ids
                assert stream_through_a_death(running, client, long_prompt(length)) == undisturbed
        lives = continued(running)
        assert len(lives) == 3
        for delivered, again, length in lives:
            assert 0 < delivered < 300 and 64 <= again <= 319
            assert (length - again) % 256 == 0


def test_a_predicted_request_goes_on_as_a_fresh_one_would(long_model):
    """Its prompt's segments are reused; what it has generated was computed with a choice, and is
    computed again: so its tokens are those of a request whose prompt ends with them."""
    flags = ("--kv-policy=attention-predictor", "--kv-budget=256", "--calibrate-with=none")
    flags += ("--max-model-len=2048",)
    prompt = long_prompt(1100)
    with Service(long_model, *flags) as running:
        with Client(running.endpoint, running.key_file) as client:
            kept = client.generate(prompt, **LONG).ids
            tokens = stream_through_a_death(running, client, prompt)
        ((delivered, again, length),) = continued(running)
    assert len(tokens) == 300 and tokens[:delivered] == kept[:delivered]
    assert length == 1100 + delivered and again == 76 + delivered
    with Service(long_model, *flags) as fresh, Client(fresh.endpoint, fresh.key_file) as client:
        rest = {**LONG, "max_tokens": 300 - delivered}
        assert client.generate(prompt + kept[:delivered], **rest).ids == tokens[delivered:]


def test_a_death_is_not_told_with_the_reason_of_the_one_before(model):
    """A coordinator that starves tells of a death when the group has been started anew already."""
    with Service(model, FULL) as running:
        coordinator = running.pids("foretoken-coordinator")[0]

        def deaths():
            lines = running.log.read_text().splitlines()
            return [line for line in lines if line.startswith("foretoken: worker group 0 exited")]

        def kill_unseen(number):
            os.kill(coordinator, signal.SIGSTOP)
            os.kill(running.pids("foretoken-worker")[0], signal.SIGKILL)
            wait_until(lambda: len(deaths()) == number, what="the restart")
            os.kill(coordinator, signal.SIGCONT)

        kill_unseen(1)
        with Client(running.endpoint, running.key_file, silence_timeout=60) as client:
            wait_until(lambda: client.status()["worker_restarts"] == 1, what="word of the death")
            wait_until(lambda: client.status()["state"] == "ready", what="the second life")
        time.sleep(0.5)  # until serve has read what it was told
        kill_unseen(2)
        assert "(signal 9, Killed); restarting" in deaths()[1]


@pytest.mark.parametrize("source", ["the files", "random values"])
def test_a_replaced_group_loads_from_the_stores_copy(model, source):
    """... and its tokens stay the same; both ranks load from the one copy."""
    dummy = ("--load-format=dummy",) if source == "random values" else ()
    flags = (FULL, "--tensor-parallel-size=2", "--keep-weights", *dummy)
    with Service(model, *flags) as running:
        log = running.log.read_text
        wait_until(lambda: "the store keeps a copy" in log(), what="the copy")
        assert log().count(f"GB/s) from {source}") == 2  # the load and the copy
        with Client(running.endpoint, running.key_file) as client:
            undisturbed = client.generate(STORY, **LONG).ids
            for deaths in (1, 2):  # it is there for every restart
                assert stream_through_a_death(running, client) == undisturbed
                assert client.status()["worker_restarts"] == deaths
                wait_until(lambda n=deaths: log().count("GB/s) from the store") == n, what="the log")
        assert log().count(f"GB/s) from {source}") == 2


def test_a_lost_store_ends_the_service_with_its_reason(model):
    with Service(model, FULL) as running:
        os.kill(running.pids("foretoken-kvstore")[0], signal.SIGKILL)
        assert running.process.wait(30) == 1
        assert "KV store was ended by signal 9" in running.log.read_text()


def test_a_rank_that_stands_still_is_replaced(model):
    with Service(model, FULL, "--tensor-parallel-size=2") as running:
        os.kill(running.pids("foretoken-worker")[0], signal.SIGSTOP)
        with Client(running.endpoint, running.key_file, silence_timeout=60) as client:
            time.sleep(4)
            wait_until(lambda: client.status()["state"] == "ready", 60)
            assert client.generate("x", max_tokens=3, ignore_eos=True).usage["completion_tokens"] == 3
            assert client.status()["worker_restarts"] == 1


def test_a_word_on_a_life_that_is_over_harms_not_the_next_one(model, set_coordinator):
    """As where the group has died by itself, and was started anew, before it was to be killed."""
    set_coordinator(f"""
        setpriv --pdeathsig KILL {BIN}/foretoken-coordinator "$@" | while read -r line; do
        printf '%s\\n' "$line"
        case $line in *restart_group*) (sleep 3; printf '%s\\n' "$line") & ;; esac
        done""")
    with Service(model, FULL) as running:
        os.kill(running.pids("foretoken-worker")[0], signal.SIGSTOP)
        wait_until(lambda: "restarting" in running.log.read_text(), what="the restart")
        time.sleep(4)  # until it has been told again
        with Client(running.endpoint, running.key_file, silence_timeout=60) as client:
            assert len(client.generate("x", max_tokens=3, ignore_eos=True).ids) == 3
            assert client.status()["worker_restarts"] == 1
        assert running.log.read_text().count("restarting") == 1
        assert run("drain", *running.connect).returncode == 0
        assert running.process.wait(30) == 0
