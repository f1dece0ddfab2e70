#!/usr/bin/env python3
"""The files that comments and pages name exist, as do the pages' links and what these point at.

    python3 tests/paths_test.py

Reads every tracked source and page. Exits 1 and names each broken line.
"""

import os
import re
import sys

from tracked import ROOT, report, tracked

FOLDERS = "client|cmake|common|coordinator|docs|kernels|kvstore|launch|predictor|tests|worker"
NAMED = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w/.-]*\.(?:cc|cuh|cu|h|cmake|md|py|sh|sbatch))\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ANCHOR = re.compile(r'<a id="([^"]+)">|^#+ +(.*)$', re.MULTILINE)


def text_of(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def anchors_of(page):
    """What a link's #part may be: <a id="...">, and headings as web pages number them."""
    found = set()
    for given, heading in ANCHOR.findall(text_of(page)):
        found.add(given or re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    return found


def link_problem(page, link):
    if re.match(r"[a-z]+:", link):  # of the web
        return None
    file, _, part = link.partition("#")
    target = os.path.normpath(os.path.join(os.path.dirname(page), file)) if file else page
    if not os.path.exists(os.path.join(ROOT, target)):
        return f"link to {link}, which is not there"
    if part and target.endswith(".md") and part not in anchors_of(target):
        return f"link to {link}: {target} has no such part"
    return None


def problems_of(path):
    for number, line in enumerate(text_of(path).splitlines(), start=1):
        for named in NAMED.findall(line):
            if not os.path.exists(os.path.join(ROOT, named)):
                yield f"{path}:{number}: names {named}, which is not there"
        for link in LINK.findall(line) if path.endswith(".md") else ():
            problem = link_problem(path, link)
            if problem:
                yield f"{path}:{number}: {problem}"


def main():
    sources = tracked("*.h", "*.cc", "*.cu", "*.cuh", "*.md", "*.py", "*.sh", "*CMakeLists.txt")
    problems = [problem for path in sources for problem in problems_of(path)]
    return report("paths", f"{len(sources)} files", problems)


if __name__ == "__main__":
    sys.exit(main())
