"""The `foretoken` command without a service: flags, exit codes, model folders, tokens."""

import json
import os
import shutil

import pytest
from service_helper import SMALL, make_model, run, with_old_gpu_libraries

COMMANDS = ["serve", "generate", "tokenize", "detokenize", "bench", "model", "doctor", "config"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def test_help_goes_to_stdout():
    for command in [[], *([name] for name in COMMANDS)]:
        done = run(*command, "--help")
        assert done.returncode == 0
        assert "--help" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "words, near",
    [
        (["serve", "m", "--kv-bugdet", "512"], "--kv-budget"),
        (["serve", "m", "--kv-bugdet=512"], "--kv-budget"),
        (["generate", "--model", "m", "--promt", "x"], "--prompt"),
        (["bench", "decode", "--contxt", "5"], "--context"),
        (["srve"], "serve"),
    ],
)
def test_unknown_words_are_usage_with_a_did_you_mean(words, near):
    done = run(*words)
    assert done.returncode == 2
    assert f"did you mean {near}?" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["generate", "--prompt", "x"],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--connect", "e", "--prompt", "x"],
        ["generate", "--connect", "e", "--prompt", "x", "--kv-budget=512"],
        ["generate", "--connect", "e", "--prompt", "x", "--config=f.toml"],
        ["generate", "--model", "m", "--key-file=k", "--prompt", "x"],
        ["generate", "--model", "m", "--prompt", "x", "--prompt-file", "y"],
        ["tokenize", "m"],
        ["serve", "m", "--kv-budget", "many"],
        ["bench", "decode", "--model", "m", "--tokens", "0"],
    ],
)
def test_wrong_usage_exits_with_2(words):
    assert run(*words).returncode == 2


def test_a_missing_model_exits_with_4(tmp_path):
    for words in (["serve", tmp_path / "absent"], ["generate", "--model", "absent", "--prompt", "x"]):
        done = run(*words, env={**os.environ, "FORETOKEN_MODELS": str(tmp_path)})
        assert done.returncode == 4
        assert "absent" in done.stderr and done.stderr.count("\n") == 1


def test_what_the_configuration_refuses_exits_with_3(model):
    for flags in (
        ["--kv-budget=128"],
        ["--tensor-parallel-size=4"],
        ["--kv-policy=magic"],
        ["--config=/nowhere.toml"],
        ["--kv-nvme-path=/nowhere", "--kv-persist"],  # without --runtime-dir
    ):
        done = run("serve", model, *SMALL, *flags)
        assert done.returncode == 3, flags
        assert done.stderr.count("\n") == 1


def test_a_runtime_folder_that_others_can_enter_is_refused_and_kept(model, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    done = run("serve", model, *SMALL, f"--runtime-dir={shared}/")
    assert done.returncode == 3 and "can be entered by others" in done.stderr
    assert shared.stat().st_mode & 0o7777 == 0o1777 and not list(shared.iterdir())


@pytest.mark.parametrize(
    "mpirun, code, line",
    [
        (None, 5, "exited with code 127 (its program can't be run) while it loaded the model; see above"),
        ("kill -9 $$", 5, "was ended by signal 9 (Killed) while it loaded the model; see above"),
        ("exit 137", 5, "exited with code 137 (signal 9, Killed) while it loaded the model; see above"),
        ("exit 134", 1, "exited with code 134 (signal 6, Aborted) while it loaded the model"),
        ("exit 3", 3, "exited with code 3 while it loaded the model"),
        ("exit 1", 1, "exited with code 1 while it loaded the model"),
    ],
)
def test_a_group_that_does_not_start_says_why(model, tmp_path, mpirun, code, line):
    if mpirun:
        (tmp_path / "mpirun").write_text(f"#!/bin/sh\n{mpirun}\n")
        (tmp_path / "mpirun").chmod(0o755)
    done = run("serve", model, *SMALL, "--port=0", env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == code, done.stderr
    assert line in done.stderr.splitlines()[-1]


HARM = {
    "config.json": lambda path: path.write_text("{"),
    "tokenizer.json": lambda path: path.write_text("[]"),
    "model.safetensors": lambda path: os.truncate(path, path.stat().st_size - 1),
    "model.safetensors absent": lambda path: path.unlink(),
    "model.safetensors header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
}


@pytest.mark.parametrize("name", HARM)
def test_a_broken_model_folder_exits_with_4_and_names_the_file(model, tmp_path, name):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = name.split()[0]
    HARM[name](broken / file)
    for words in (["model", "verify", broken], ["serve", broken, *SMALL, "--port=0"],
                  ["generate", "--model", broken, *SMALL, "--prompt=x"]):  # fmt: skip
        done = run(*words)
        assert done.returncode == 4, words
        assert file in done.stderr, words
        assert done.stdout == "" and "MPI" not in done.stderr  # nothing was started for it


def test_an_unknown_architecture_exits_with_4(model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (other / "config.json").write_text(json.dumps(config))
    done = run("serve", other, *SMALL)
    assert done.returncode == 4
    assert "MambaForCausalLM" in done.stderr


def test_tokens_come_back_as_the_text(model, tmp_path):
    text = "Grüße, 世界! \U0001f600 \n\ttab"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    ids = run("tokenize", model, "--file", tmp_path / "text", "--no-special").stdout
    assert all(isinstance(token, int) for token in json.loads(ids))
    (tmp_path / "ids.json").write_text(ids)
    assert run("detokenize", model, "--ids", tmp_path / "ids.json").stdout == text
    assert run("detokenize", model, "--ids", "-", input=ids).stdout == text


def test_config_show_says_where_a_value_comes_from(tmp_path):
    (tmp_path / "f.toml").write_text("max-waiting = 7\n")
    done = run(
        "config", "show", "--origin", "--config", tmp_path / "f.toml", "--kv-budget", "512",
        env={**os.environ, "FORETOKEN_PORT": "9000"},
    )  # fmt: skip
    origins = dict(line.split("#") for line in done.stdout.splitlines())
    origins = {key.split("=")[0].strip(): value.strip() for key, value in origins.items()}
    assert origins["kv_budget"] == "flag"
    assert origins["port"] == "environment"
    assert origins["max_waiting"].startswith("file")
    assert origins["kv_policy"] == "default"


def test_doctor_has_a_fix_for_all_that_is_not_well():
    done = run("doctor", "--json")
    findings = json.loads(done.stdout)
    assert {finding["health"] for finding in findings} <= {"ok", "warn", "fail"}
    for finding in findings:
        assert bool(finding["fix"]) == (finding["health"] != "ok")


def test_doctor_tells_of_a_temporary_folder_that_is_not_there():
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    done = run("doctor", "--json", env={**environment, "TMPDIR": "/nonexistent"})
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert findings["runtime folder"]["health"] == "fail"
    assert findings["direct I/O"]["health"] == "warn"
    assert findings["disk"]["health"] == "warn" and "no temporary" in findings["disk"]["found"]


def test_doctor_names_a_driver_and_an_nccl_that_are_too_old():
    done = run("doctor", "--json", env=with_old_gpu_libraries())
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert findings["GPU driver"]["health"] == "fail"
    assert "CUDA up to 12.4" in findings["GPU driver"]["found"]
    assert findings["NCCL"]["health"] == "warn"  # no GPU needs it
    assert "2.27.5 is loaded" in findings["NCCL"]["found"]


def test_model_list_and_show(model):
    environment = {**os.environ, "FORETOKEN_MODELS": str(model.parent)}
    assert run("model", "list", env=environment).stdout.split("\t")[0] == "tiny"
    shown = json.loads(run("model", "show", "tiny", env=environment).stdout)
    assert shown["num_heads"] == 3
