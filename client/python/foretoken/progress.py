"""Progress of a long step on stderr: a bar on a terminal, otherwise a line now and then."""

import sys
import time


class Progress:
    """Counts bytes towards a total. Use as a context manager; `advance(n)` after each piece."""

    _TERMINAL_SECONDS = 0.1
    _PLAIN_SECONDS = 5.0

    def __init__(self, label, total_bytes, stream=None):
        self._label = label
        self._total = max(total_bytes, 1)
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._done = 0
        self._start = time.monotonic()
        self._printed = self._start

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, trace):
        if error_type is None:
            self._print()
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, num_bytes):
        self._done += num_bytes
        pause = self._TERMINAL_SECONDS if self._terminal else self._PLAIN_SECONDS
        if time.monotonic() - self._printed >= pause:
            self._print()

    def _print(self):
        self._printed = time.monotonic()
        seconds = self._printed - self._start
        share = min(self._done / self._total, 1.0)
        left = seconds * (1 - share) / share if share > 0 else 0.0
        text = (
            f"{self._label}: {share:4.0%} of {self._total / 1e6:.0f} MB, "
            f"{self._done / 1e6 / max(seconds, 1e-3):.0f} MB/s, {left:.0f} s left"
        )
        if self._terminal:
            bar = "#" * round(24 * share)
            self._stream.write(f"\r[{bar:<24}] {text}\x1b[K")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
