"""What the tests of the tree itself share: its tracked files, and how they end."""

import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def tracked(*patterns):
    """The tracked files that are there, as paths from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    return sorted(path for path in listed if path and os.path.exists(os.path.join(ROOT, path)))


def report(name, counted, problems):
    """Prints the problems and a line of what was counted; the exit code."""
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{name}: {counted}, {len(problems)} problems")
    return 1 if problems else 0
