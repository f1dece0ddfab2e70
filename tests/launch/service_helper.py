"""What the tests of the command and the service share."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("FORETOKEN_BIN", ROOT / "build" / "release" / "bin"))
FORETOKEN = BIN / "foretoken"
SMALL = ("--device=cpu", "--kv-host-gib=0.25", "--device-memory-gib=1")
LARGE = ("--device=cpu", "--kv-host-gib=2", "--device-memory-gib=4")  # for SmolLM2

sys.path.insert(0, str(ROOT / "tests"))
import make_test_model  # noqa: E402


def make_model(folder, name="llama", **changes):
    """A random model of tests/make_test_model.py, with changes to its spec; context 512."""
    make_test_model.make(name, folder, **changes)
    return pathlib.Path(folder)


def smollm2():
    """The embedded default's folder; fetched once."""
    done = subprocess.run(
        [FORETOKEN, "model", "fetch", "smollm2-135m"], stdout=subprocess.PIPE, check=True, text=True
    )
    return pathlib.Path(done.stdout.strip())


def run(*words, **options):
    """Runs `foretoken WORDS`; the result has returncode, stdout and stderr."""
    command = [str(word) for word in (FORETOKEN, *words)]
    options.setdefault("timeout", 120)
    return subprocess.run(command, capture_output=True, text=True, **options)


def wait_until(condition, timeout=60.0, what="the condition"):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true within {timeout} s")


@contextlib.contextmanager
def faulty_disk(told):
    """Services that start meanwhile have an NVMe tier that fails as the file `told` says: see
    tests/launch/faulty_disk.cc."""
    library = BIN.parent / "lib" / "libfaulty_disk.so"
    assert library.exists(), f"{library} is not built"
    before = dict(os.environ)
    os.environ |= {"LD_PRELOAD": str(library), "FAULTY_DISK": str(told)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def with_old_gpu_libraries():
    """An environment with tests/launch/old_driver.cc and old_nccl.cc."""
    old = BIN.parent / "lib" / "old"
    libraries = [old / "libcuda.so.1", old / "libold_nccl.so"]
    if not all(library.exists() for library in libraries):
        pytest.skip("this is a build without CUDA")
    return os.environ | {"LD_PRELOAD": ":".join(map(str, libraries))}


def processes_of(folder):
    """Ids of the processes whose command line names this folder."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


class Service:
    """`foretoken serve` on a free port, in a folder of its own, or in one that outlives it. `under`:
    the words of a command that runs it."""

    def __init__(self, model, *flags, ready=True, size=SMALL, folder=None, under=()):
        self._temporary = tempfile.TemporaryDirectory(prefix="ft-test-")
        self.folder = pathlib.Path(folder or self._temporary.name)
        self.endpoint_file = self.folder / "endpoint.json"
        self.endpoint_file.unlink(missing_ok=True)
        self.log = self.folder / "log"
        words = [*under, FORETOKEN, "serve", model, "--port=0", f"--runtime-dir={self.folder}/run"]
        words += [f"--endpoint-file={self.endpoint_file}", *size, *flags]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdout=subprocess.PIPE, stderr=log, text=True
            )
        if ready:
            wait_until(self._is_ready, timeout=180, what="readiness")

    def _is_ready(self):
        code = self.process.poll()
        assert code is None, f"serve exited with {code}:\n{self.log.read_text()}"
        return self.endpoint_file.exists()

    @property
    def endpoint(self):
        return json.loads(self.endpoint_file.read_text())["endpoint"]

    @property
    def key_file(self):
        return json.loads(self.endpoint_file.read_text())["key_file"]

    @property
    def connect(self):
        return ("--connect", self.endpoint, "--key-file", self.key_file)

    def pids(self, program):
        """Ids of the service's processes that run this program."""
        pids = processes_of(self.folder)
        return [pid for pid in pids if _program(pid) == program]

    def stop(self):
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        wait_until(lambda: not processes_of(self.folder), what="the end of all children")
        self._temporary.cleanup()


def _program(pid):
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return None
