"""What a service does when its GPU is too small or shared, a rank is killed, and it is told to end.

    python3 tests/gpu/faults.py --bin FOLDER --model FOLDER [--device cuda|cpu] [--gpus N] [--json FILE]

Takes the machine's N GPUs, a rank each (default 1), and about a minute; --device cpu checks the same on any machine with a small model,
but for the sharing. Exit code 1 where something isn't as promised.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

RANK = "foretoken-worker"


class Checks:
    def __init__(self):
        self.results = []

    def expect(self, name, ok, found):
        self.results.append({"check": name, "ok": bool(ok), "found": found})
        print(json.dumps(self.results[-1]), flush=True)


def wait_until(condition, timeout):
    """The seconds that it took; None past the timeout."""
    begin = time.monotonic()
    while time.monotonic() - begin < timeout:
        if condition():
            return round(time.monotonic() - begin, 2)
        time.sleep(0.05)
    return None


def processes_of(folder, program=""):
    """Ids of the processes whose command line names the folder, and whose program this is."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        named = any(str(folder).encode() in word for word in words)
        if named and program.encode() in words[0] and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def gpu_mib_in_use():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) for line in subprocess.check_output(query, text=True).split())


class Setup:
    """How to call the programs here."""

    def __init__(self, arguments):
        self.foretoken = f"{arguments.bin}/foretoken"
        self.cuda = arguments.device == "cuda"
        self.flags = [
            arguments.model, f"--device={arguments.device}", "--load-format=dummy",
            "--kv-policy=full", "--port=0",
        ]  # fmt: skip
        if self.cuda:
            self.flags += ["--kv-host-gib=4", "--max-model-len=2048"]
            self.flags += [f"--tensor-parallel-size={arguments.gpus}"]
        else:
            self.flags += ["--kv-host-gib=0.25"]
        self.gpus = arguments.gpus
        self.tokens = 1000 if self.cuda else 400
        self.too_little = "--gpu-memory-utilization=0.05" if self.cuda else "--device-memory-gib=0.0001"

    def serve(self, *flags, preload=""):
        """To its end, which must come soon."""
        command = [self.foretoken, "serve", *self.flags, *flags]
        environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def check_refusal(checks, name, done, *words):
    """Exit code 5, and a last line that names the rank, the cause and what to do."""
    lines = done.stderr.strip().splitlines() or [""]
    ok = done.returncode == 5 and all(word in lines[-1] for word in ("rank ", *words))
    checks.expect(name, ok, {"exit": done.returncode, "line": lines[-1]})


def status_of(setup, connect):
    done = subprocess.run([setup.foretoken, "status", *connect, "--json"], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def check_killed_rank(checks, setup, connect, folder):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as prompt:
        json.dump(list(range(300, 400)), prompt)
        prompt.flush()
        command = [
            setup.foretoken, "generate", *connect, "--prompt-ids", prompt.name, "--json",
            f"--max-tokens={setup.tokens}", "--temperature=0", "--ignore-eos",
        ]  # fmt: skip
        asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_until(lambda: status_of(setup, connect).get("requests_running") == 1, 10)
        time.sleep(1.5 if setup.cuda else 0.1)
        os.kill(processes_of(folder, RANK)[0], signal.SIGKILL)
        killed = time.monotonic()
        ready = wait_until(
            lambda: processes_of(folder, RANK) and status_of(setup, connect).get("state") == "ready", 40
        )
        output, _ = asking.communicate(timeout=60)
    answer = json.loads(output) if asking.returncode == 0 else {}
    found = {
        "tokens": len(answer.get("token_ids", [])),
        "ready_again_s": ready,
        "answer_after_s": round(time.monotonic() - killed, 2),
        "restarts": status_of(setup, connect).get("worker_restarts"),
    }
    ok = found["tokens"] == setup.tokens and found["restarts"] == 1
    checks.expect("a stream goes on after its rank was killed", ok, found)


def check_end(checks, setup, serving, folder, memory_before):
    serving.send_signal(signal.SIGTERM)
    took = wait_until(lambda: not processes_of(folder), 20)
    ok = took is not None and took <= 10 and serving.wait(10) == 0
    checks.expect("SIGTERM ends all processes within 10 s", ok, {"seconds": took})
    if not setup.cuda:
        return
    slack_mib = 16  # of the driver's own
    took = wait_until(lambda: gpu_mib_in_use() <= memory_before + slack_mib, 5)
    checks.expect(
        "no GPU memory stays in use", took is not None,
        {"MiB before": memory_before, "MiB now": gpu_mib_in_use()},
    )  # fmt: skip


def check_service(checks, setup, memory_before):
    with tempfile.TemporaryDirectory(prefix="ft-faults-") as folder:
        endpoint_file = pathlib.Path(folder) / "endpoint.json"
        command = [setup.foretoken, "serve", *setup.flags, f"--runtime-dir={folder}/run"]
        command += [f"--endpoint-file={endpoint_file}"]
        serving = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            took = wait_until(lambda: endpoint_file.exists() or serving.poll() is not None, 60)
            checks.expect("the service starts", endpoint_file.exists(), {"seconds": took})
            if not endpoint_file.exists():
                return
            endpoint = json.loads(endpoint_file.read_text())
            connect = ["--connect", endpoint["endpoint"], "--key-file", endpoint["key_file"]]
            check_killed_rank(checks, setup, connect, folder)
            check_end(checks, setup, serving, folder, memory_before)
        finally:
            serving.kill()
            serving.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    setup = Setup(arguments)
    checks = Checks()
    memory_before = gpu_mib_in_use() if setup.cuda else 0
    check_refusal(checks, "too little device memory", setup.serve(setup.too_little), "memory is full", "raise")
    if setup.cuda:
        setup.flags[-1] = f"--tensor-parallel-size={setup.gpus + 1}"
        check_refusal(
            checks, "more ranks than GPUs", setup.serve(), f"{setup.gpus + 1} ranks", "--tensor-parallel-size"
        )
        setup.flags[-1] = f"--tensor-parallel-size={setup.gpus}"
        if setup.gpus > 1:
            old = setup.serve(preload=pathlib.Path(__file__).with_name("libold_nccl.so"))
            check_refusal(checks, "an NCCL that is too old", old, "NCCL 2.27.5 is loaded", "LD_LIBRARY_PATH")
    check_service(checks, setup, memory_before)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(checks.results, indent=1))
    sys.exit(0 if all(result["ok"] for result in checks.results) else 1)


if __name__ == "__main__":
    main()
