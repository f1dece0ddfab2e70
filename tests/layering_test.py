#!/usr/bin/env python3
"""The folders' doors: who may include whom, and that each public header compiles alone.

    python3 tests/layering_test.py [--no-compile]

Reads the #include lines of every tracked C++ file. Exits 1 and names each broken line.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys

from tracked import ROOT, report, tracked

# A folder may include itself and these (docs/architecture.md, "Folders").
MAY_USE = {
    "common": set(),
    "kernels": {"common"},
    "kvstore": {"common", "kernels"},
    "predictor": {"common", "kernels"},
    "worker": {"common", "kernels", "kvstore", "predictor"},
    "coordinator": {"common"},
    "client": {"common"},
    "launch": {"common", "client"},
}
# What a folder may not reach even through the system's headers.
FORBIDDEN_SYSTEM = {
    "common": r"(mpi|nccl|cuda\w*)\.h",
    "kernels": r"(mpi|nccl|zmq)\.h(pp)?",
    "coordinator": r"(mpi|nccl|cuda\w*)\.h",
    "client": r"(mpi|nccl|cuda\w*)\.h",
    "launch": r"(mpi|nccl|cuda\w*)\.h",
}
INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)')


def includes(path):
    """Yields (line number, quoted path or None, system header or None)."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            match = INCLUDE.match(line)
            if match:
                yield number, match[1], match[2]


def include_problems(path):
    folder = path.split("/")[0]
    problems = []
    for number, quoted, system in includes(path):
        where = f"{path}:{number}"
        if quoted is not None:
            problems += quoted_problems(where, folder, quoted)
        elif folder in FORBIDDEN_SYSTEM and re.fullmatch(FORBIDDEN_SYSTEM[folder], system):
            problems.append(f"{where}: {folder} may not use <{system}>")
    return problems


def quoted_problems(where, folder, target):
    if not os.path.exists(os.path.join(ROOT, target)):
        return [f'{where}: "{target}" isn\'t a path from the repository\'s root']
    target_folder = target.split("/")[0]
    if folder == "tests" or target_folder == folder:
        return []
    if folder not in MAY_USE:
        return [f"{where}: folder {folder} isn't in the table of this test"]
    if target_folder not in MAY_USE[folder]:
        return [f"{where}: {folder} may not use {target_folder}"]
    if "/internal/" in target:
        return [f'{where}: "{target}" is internal to {target_folder}']
    return []


def is_public_header(path):
    # A *-inl.h is text that its .cc compiles once for each SIMD target (kernels/cpu/simd).
    door = path.split("/")[0] in MAY_USE and path.endswith(".h") and "/internal/" not in path
    return door and not path.endswith("-inl.h")


def compile_problem(path):
    compiler = os.environ.get("CXX", "g++")
    # As a source that includes it: "#pragma once in main file" is a warning otherwise.
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-fsyntax-only", "-I", ROOT]
    done = subprocess.run(
        command + ["-x", "c++", "-"],
        input=f'#include "{path}"\n#include "{path}"\n',
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    return f"{path} does not compile alone:\n{done.stderr.strip()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-compile", action="store_true", help="only read the #include lines")
    arguments = parser.parse_args()

    sources = tracked("*.h", "*.cc", "*.cuh", "*.cu")
    problems = [problem for path in sources for problem in include_problems(path)]
    headers = [path for path in sources if is_public_header(path)]
    if not arguments.no_compile:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            problems += [problem for problem in pool.map(compile_problem, headers) if problem]
    return report("layering", f"{len(sources)} files, {len(headers)} public headers", problems)


if __name__ == "__main__":
    sys.exit(main())
