"""Prediction, tiering and batching on a real model and real texts."""

import json
import pathlib
import tempfile
import threading
import time

import pytest
from foretoken.client import Client
from service_helper import LARGE, ROOT, Service, run, smollm2, wait_until

LENGTH = 7000
CACHED = 27 * 256  # of it, where it was seen before: the last 64 queries are always computed
ANSWER = 48
BUDGET = 1024


def tokenize(text):
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text)
        file.flush()
        return json.loads(run("tokenize", smollm2(), "--file", file.name).stdout)


def licence():
    return pathlib.Path("/usr/share/common-licenses/GPL-3").read_text()


def source_code():
    files = sorted((ROOT / "kernels" / "cpu").glob("*.cc"))
    return "\n".join(file.read_text() for file in files)


def maths():
    """Grade-school maths, worked out: the first problems of GSM8K (data/README.md)."""
    lines = (pathlib.Path(__file__).parent / "data" / "gsm8k.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    return "\n\n".join(f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems)


TEXTS = {"licence": licence, "code": source_code, "maths": maths}


@pytest.fixture(params=TEXTS)
def text(request):
    ids = tokenize(TEXTS[request.param]())
    assert len(ids) >= LENGTH + ANSWER, request.param
    return ids[:LENGTH], ids[LENGTH : LENGTH + ANSWER]


def recall(policy, prompt, forced, *flags, cached=0, folder=None):
    with Service(smollm2(), f"--kv-policy={policy}", f"--kv-budget={BUDGET}", "--audit-every=1",
                 *flags, size=LARGE, folder=folder) as service:  # fmt: skip
        with Client(service.endpoint, service.key_file, silence_timeout=300) as client:
            answer = client.generate(prompt, forced_ids=forced, max_tokens=len(forced),
                                     ignore_eos=True, temperature=0)  # fmt: skip
    assert answer.usage["cached_tokens"] == cached
    assert answer.kv["recall_count"] > 0
    return answer.kv["recall_sum"] / answer.kv["recall_count"]


def test_predictor_closes_most_of_the_gap_to_the_oracle(text, tmp_path):
    """The first service computes the prompt, the others have it from NVMe: its folder, its key."""
    kept = (f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.3", "--kv-persist",
            "--kv-nvme-reuse=always")  # fmt: skip
    window = recall("streaming-llm", *text, *kept, folder=tmp_path)
    best = recall("oracle", *text, *kept, folder=tmp_path, cached=CACHED)
    predicted = recall("attention-predictor", *text, *kept, folder=tmp_path, cached=CACHED)
    closed = (predicted - window) / (best - window)
    print(f"recall: window {window:.3f}, predicted {predicted:.3f}, oracle {best:.3f}: {closed:.0%}")
    assert closed >= 0.6


def test_a_quarter_of_the_kv_in_host_memory_is_enough(tmp_path):
    """The rest is on NVMe: the same tokens where a step waits for it, nearly the same attention
    where it does not."""
    prompt = tokenize(licence())[:LENGTH]
    quarter = ("--device=cpu", "--kv-host-gib=0.0411", "--device-memory-gib=4")  # 7 slabs of 28
    flags = ("--kv-policy=attention-predictor", f"--kv-budget={BUDGET}", "--audit-every=1",
             "--calibrate-with=none")  # fmt: skip
    answers = []
    for on_late, size in (("wait", LARGE), ("wait", quarter), ("skip", quarter)):
        folder = f"--kv-nvme-path={tmp_path}/{len(answers)}"
        with Service(smollm2(), *flags, folder, "--kv-nvme-gib=0.3", f"--on-late={on_late}",
                     size=size) as service:  # fmt: skip
            with Client(service.endpoint, service.key_file, silence_timeout=300) as client:
                answers.append(client.generate(prompt, max_tokens=ANSWER, ignore_eos=True,
                                               temperature=0))  # fmt: skip
    kept, waited, skipped = answers
    recalls = [a.kv["recall_sum"] / a.kv["recall_count"] for a in answers]
    print(f"recall: memory {recalls[0]:.4f}, wait {recalls[1]:.4f}, skip {recalls[2]:.4f}")
    print(f"late: wait {waited.kv['late']}, skip {skipped.kv['late']}")
    assert waited.ids == kept.ids and recalls[1] == pytest.approx(recalls[0])
    assert recalls[2] == pytest.approx(recalls[1], abs=0.01)
    assert kept.kv["bytes_nvme"] == 0 and waited.kv["bytes_nvme"] > 0


def test_sketches_calibrate_as_keys_do_on_any_number_of_ranks():
    """3 KV heads on 1, 2 (2 + 1) and 4 ranks (a head's query heads are split)."""
    ids = tokenize(licence())
    prompt, forced = ids[:2500], ids[2500:2524]
    every = "--calibrate-every=1"
    by_keys = recall("attention-predictor", prompt, forced, "--calibrate-with=exact", every)
    for ranks in (1, 2, 4):
        flags = ("--calibrate-with=sketch", every, f"--tensor-parallel-size={ranks}")
        by_sketches = recall("attention-predictor", prompt, forced, *flags)
        print(f"recall: keys {by_keys:.4f}, sketches on {ranks} ranks {by_sketches:.4f}")
        assert abs(by_sketches - by_keys) < 0.01


def lengths_of(service):
    with Client(service.endpoint, service.key_file) as client:
        return client.status()


def assert_same_where_clear(alone, other, what):
    """The same tokens, up to the first place where the two best were nearly even."""
    for place, (a, b) in enumerate(zip(alone.ids, other.ids, strict=True)):
        if a != b:
            top = alone.tokens[place]["top"]
            assert top[0]["logprob"] - top[1]["logprob"] <= 0.1, f"{what}, token {place}"
            return


def test_a_budget_as_large_as_the_context_gives_the_tokens_of_full():
    prompt = tokenize(licence())[:900]
    answers = []
    for policy in ("full", "attention-predictor"):
        flags = (f"--kv-policy={policy}", f"--kv-budget={BUDGET}", "--tensor-parallel-size=2")
        with Service(smollm2(), *flags, size=LARGE) as service:
            with Client(service.endpoint, service.key_file, silence_timeout=300) as client:
                answers.append(client.generate(prompt, max_tokens=64, temperature=0,
                                               ignore_eos=True, num_logprobs=2))  # fmt: skip
    assert_same_where_clear(*answers, "budget")


def test_eight_clients_get_what_they_get_alone():
    ids = tokenize(licence())
    prompts = [ids[37 * i : 37 * i + length] for i, length in
               enumerate((100, 350, 700, 1100, 1700, 2400, 3200, 4000))]  # fmt: skip
    with Service(smollm2(), "--kv-policy=full", "--tensor-parallel-size=2", size=LARGE) as service:
        before = lengths_of(service)
        answers = [None] * len(prompts)

        def ask(i):
            with Client(service.endpoint, service.key_file, silence_timeout=600) as client:
                answers[i] = client.generate(prompts[i], max_tokens=12, temperature=0,
                                             ignore_eos=True, num_logprobs=2)  # fmt: skip

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(len(prompts)):
            together = answers[i]
            ask(i)
            assert_same_where_clear(answers[i], together, f"prompt {i}")
        wait_until(lambda: lengths_of(service)["kv_slabs_used"] == before["kv_slabs_used"],
                   what="the store's baseline")  # fmt: skip


def test_a_cancelled_request_frees_its_kv_within_a_second():
    ids = tokenize(licence())[:2000]
    with Service(smollm2(), "--kv-policy=attention-predictor", size=LARGE) as service:
        with Client(service.endpoint, service.key_file, silence_timeout=300) as client:
            pieces = client.stream(ids, max_tokens=2000, temperature=0, ignore_eos=True)
            next(pieces)
            assert lengths_of(service)["kv_slabs_used"] > 0
            pieces.close()
            cancelled = time.monotonic()
            wait_until(lambda: lengths_of(service)["kv_slabs_used"] == 0, timeout=5)
            assert time.monotonic() - cancelled < 1.0
