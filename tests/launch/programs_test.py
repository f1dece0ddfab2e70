"""The service's programs, started by hand as docs/operations.md has it."""

import subprocess

import pytest
from service_helper import BIN

PROGRAMS = ("foretoken-kvstore", "foretoken-coordinator", "foretoken-worker")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_command_line_exits_with_2(program):
    for words in (["--no-such-flag"], []):
        done = subprocess.run([BIN / program, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_exits_with_0(program):
    done = subprocess.run([BIN / program, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert program in done.stdout


def test_what_the_configuration_refuses_exits_with_3(tmp_path):
    words = ["--config", "/nowhere", "--runtime-dir", tmp_path, "--store-socket", "none"]
    done = subprocess.run([BIN / "foretoken-coordinator", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
