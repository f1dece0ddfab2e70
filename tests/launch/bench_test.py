"""`foretoken bench`: what it measures, and the form it says it in. Figures are not judged."""

import json
import xml.etree.ElementTree

import pytest
from service_helper import SMALL, make_model, run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def bench(kind, model, *flags):
    done = run("bench", kind, "--model", model, "--device=cpu", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gather_moves_the_blocks_that_are_new(model):
    flags = ["--context=2048", "--budget=512", "--churn=25,100", "--block-kib=4,8"]
    found = json.loads(bench("gather", model, *flags, "--json"))
    assert found["link_gb_per_s"] > 0 and found["gather_units"] == 1
    sizes = [(row["block_bytes"], row["churn_percent"]) for row in found["rows"]]
    assert sizes == [(4096, 25), (4096, 100), (8192, 25), (8192, 100)]
    for row in found["rows"]:
        whole = 2 * 1 * (512 - 128) // 16  # layers, KV heads, critical blocks
        if row["churn_percent"] == 100:
            assert row["blocks"] == whole
        else:
            assert 0 < row["blocks"] < whole
        assert all(row[name] > 0 for name in ("ms", "gb_per_s", "dense_ms", "dense_beside_ms", "step_ms"))


def test_predictor_takes_every_kind_of_map(model):
    flags = ["--context=1024,2048", "--hot=0,100", "--budget=512", "--batch=2"]
    rows = json.loads(bench("predictor", model, *flags, "--json"))["rows"]
    assert len(rows) == 2 * 2 * 2 * 2
    kinds = {(row["predict_per"], row["maps"]) for row in rows}
    assert kinds == {("kv-head", 2 * 1), ("query-head", 2 * 3)}
    assert {row["history_type"] for row in rows} == {"bf16", "e5m3"}
    assert all(row["append_ms"] > 0 for row in rows)


def test_a_table_for_people_and_a_plot(model, tmp_path):
    plot = tmp_path / "gather.svg"
    lines = bench("gather", model, "--context=256", "--churn=100", "--plot", plot).splitlines()
    assert lines[0] == "bench: gather"
    assert lines[-2].split()[:3] == ["block_bytes", "churn_percent", "blocks"]
    assert lines[-1].split()[:2] == ["4096", "100"]
    root = xml.etree.ElementTree.parse(plot).getroot()
    assert "block_bytes 4096" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_decode_beside_its_baselines(model, tmp_path):
    text, plot = tmp_path / "text", tmp_path / "decode.svg"
    text.write_text("To be, or not to be, that is the question. ")
    flags = [*SMALL, "--context=400", "--tokens=20", "--kv-budget=144", "--calibrate-with=none"]
    flags += ["--prompt-file", text, "--trace=churn=50", "--plot", plot, "--json"]
    baselines = ["--baseline=dense", "--baseline=streamed", "--baseline-tokens=5"]
    done = run("bench", "decode", "--model", model, *flags, *baselines)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["policy"] == "attention-predictor" and found["generated_tokens"] == 20
    assert found["churn"] > 0.3  # blocks that come new into the window are fetched too
    assert 0 < found["worker_step_ms"] <= found["ms_per_token"]["p95"]
    dense, streamed = found["baselines"]
    assert [dense["baseline"], streamed["baseline"]] == ["dense", "streamed"]
    assert dense["churn"] is None and dense["generated_tokens"] == 5 and dense["ratio"] > 0
    assert streamed["device_share"] < found["device_share"] < 1 <= dense["device_share"]
    names = [text.text for text in xml.etree.ElementTree.parse(plot).getroot().iter() if text.text]
    assert {"decode", "dense", "streamed"} <= set(names)


def test_decode_from_a_kept_and_encrypted_disk_beside_memory(model, tmp_path):
    text, key = tmp_path / "text", tmp_path / "key"
    text.write_text("To be, or not to be, that is the question. ")
    key.touch(mode=0o600)
    key.write_text("5a" * 32)
    tier = [f"--kv-nvme-path={tmp_path}/kv", "--kv-nvme-gib=0.1", "--kv-persist", "--kv-encrypt"]
    flags = [*SMALL, *tier, f"--kv-key-file={key}", "--prompt-file", text, "--context=300", "--tokens=5"]
    done = run("bench", "decode", "--model", model, *flags, "--baseline=memory", "--json")
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["baselines"][0]
    assert memory["generated_tokens"] == memory["equal_tokens"] == 5
    assert memory["kv"]["late"] == 0


def test_a_baseline_needs_a_service_of_its_own():
    done = run("bench", "decode", "--connect=ipc:///nowhere", "--baseline=dense")
    assert done.returncode == 2 and "--model" in done.stderr


def test_the_workers_exit_code_is_ours(model):
    done = run("bench", "gather", "--model", model, "--churn=some")
    assert done.returncode == 2
    assert "--churn" in done.stderr and done.stdout == ""
