"""`foretoken bench`: what it measures, and the form it says it in. Figures are not judged."""

import json
import xml.etree.ElementTree

import pytest
from service_helper import make_model, run


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


def test_the_workers_exit_code_is_ours(model):
    done = run("bench", "gather", "--model", model, "--churn=some")
    assert done.returncode == 2
    assert "--churn" in done.stderr and done.stdout == ""
