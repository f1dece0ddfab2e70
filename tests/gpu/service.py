"""`foretoken serve`, and what a client asks of it."""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile

from faults import wait_until

# What ends the script, `timeout` above all, ends the service by the way of the block's end.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


class Service:
    """Ended, and waited for, at the end of the block. Its files are in `folder`, which outlives it."""

    def __init__(self, foretoken, folder, flags):
        self.foretoken = foretoken
        self.endpoint_file = pathlib.Path(folder) / "endpoint.json"
        command = [foretoken, "serve", *flags, f"--runtime-dir={folder}/run"]
        command += [f"--endpoint-file={self.endpoint_file}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: self.endpoint_file.exists() or self.process.poll() is not None, 90)
            if not self.endpoint_file.exists():
                sys.exit(f"the service did not start within 90 s; exit code: {self.process.poll()}")
            endpoint = json.loads(self.endpoint_file.read_text())
        except BaseException:
            self.end()
            raise
        self.connect = ["--connect", endpoint["endpoint"], "--key-file", endpoint["key_file"]]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.endpoint_file.unlink(missing_ok=True)

    def run(self, *words):
        """The JSON that a command of the client prints."""
        command = [self.foretoken, *words, *self.connect, "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout)

    def ask(self, ids, *flags):
        """The greedy answer to a prompt of these ids."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as prompt:
            json.dump(ids, prompt)
            prompt.flush()
            greedy = ("--temperature=0", "--ignore-eos")
            answer = self.run("generate", "--prompt-ids", prompt.name, *greedy, *flags)
        timing = answer["timing_ms"]
        answer["first_token_ms"] = timing["total"] - timing["decode"]
        return answer
