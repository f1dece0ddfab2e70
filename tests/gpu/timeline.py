#!/usr/bin/env python3
"""The timeline of a decode step, from what kernel_trace.cc wrote.

    timeline.py TRACE.csv [--steps 20] [--json FILE] [--svg FILE]

A step begins with the embedding kernel of its token. Steps whose number of kernels is not the most
frequent one are left out, and so are the slowest. Prints, a kernel: how often a step runs it, its
time, and how long the stream stood idle before it (microseconds, means over the steps).
"""
import argparse
import collections
import csv
import json
import re
import statistics

STEP_BEGINS = "embed"


def short_name(name):
    match = re.search(r"\d([a-z_]+_kernel)", name)
    if match:
        return match.group(1)
    if "nvjet" in name or "cublas" in name or "gemm" in name.lower():
        return "cublas"
    match = re.match(r"_ZN?\w*?(\d+)([A-Za-z_]+)", name)
    return match.group(2)[:40] if match else name[:40]


def read_steps(path):
    with open(path, newline="") as file:
        rows = [(int(b), int(e), s, short_name(",".join(n))) for b, e, s, *n in csv.reader(file)]
    rows.sort()
    starts = [i for i, row in enumerate(rows) if row[3].startswith(STEP_BEGINS)]
    steps = [rows[a:b] for a, b in zip(starts, starts[1:])]
    steps = [step for step in steps if len(step) > 10]  # prompts are embedded in parts
    if not steps:
        raise SystemExit(f"{path}: no step begins with a kernel named {STEP_BEGINS}*")
    size, _ = collections.Counter(map(len, steps)).most_common(1)[0]
    return [step for step in steps if len(step) == size]


def length_us(step, following):
    return (following[0][0] - step[0][0]) / 1000


def summarize(steps):
    """name -> [per step count, us, idle us before]."""
    table = collections.OrderedDict()
    for step in steps:
        busy_until = {}
        for begin, end, stream, name in step:
            entry = table.setdefault((name, stream), [0, 0.0, 0.0])
            entry[0] += 1
            last = busy_until.get(stream, begin)
            entry[1] += (end - max(begin, last)) / 1000 if end > last else 0
            entry[2] += max(0, begin - last) / 1000
            busy_until[stream] = max(last, end)
    return {key: [value / len(steps) for value in entry] for key, entry in table.items()}


def draw(step, path):
    """One step as SVG: a lane a stream, a box a kernel."""
    first = step[0][0]
    span = max(end for _, end, _, _ in step) - first
    streams = sorted({row[2] for row in step}, key=lambda s: min(r[0] for r in step if r[2] == s))
    names = sorted({row[3] for row in step})
    colour = {n: f"hsl({360 * i // len(names)},60%,55%)" for i, n in enumerate(names)}
    width, lane = 1600, 60
    scale = width / span
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 20}" '
           f'height="{lane * len(streams) + 40 + 16 * ((len(names) + 3) // 4)}" '
           'font-family="sans-serif" font-size="11">']
    for begin, end, stream, name in step:
        y = 10 + lane * streams.index(stream)
        out.append(f'<rect x="{10 + (begin - first) * scale:.2f}" y="{y}" '
                   f'width="{max(0.3, (end - begin) * scale):.2f}" height="{lane - 12}" '
                   f'fill="{colour[name]}"><title>{name} {(end - begin) / 1000:.1f} us</title></rect>')
    base = 10 + lane * len(streams)
    for ms in range(int(span / 1e6) + 1):
        x = 10 + ms * 1e6 * scale
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base}" stroke="#999"/>'
                   f'<text x="{x + 2:.1f}" y="{base + 10}">{ms} ms</text>')
    for i, name in enumerate(names):
        x, y = 10 + i % 4 * 400, base + 26 + 16 * (i // 4)
        out.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour[name]}"/>'
                   f'<text x="{x + 14}" y="{y}">{name}</text>')
    with open(path, "w") as file:
        file.write("\n".join(out) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json")
    parser.add_argument("--svg")
    args = parser.parse_args()
    steps = read_steps(args.trace)
    pairs = [(a, b) for a, b in zip(steps, steps[1:])]
    lengths = [length_us(a, b) for a, b in pairs]
    median = statistics.median(lengths)
    near = [a for (a, _), us in zip(pairs, lengths) if abs(us - median) < 0.1 * median]
    steps = near[-args.steps:]
    table = summarize(steps)
    print(f"{len(steps)} steps of {median:.0f} us, {len(steps[0])} kernels each")
    print(f"{'kernel':44} {'stream':>6} {'a step':>7} {'us':>9} {'idle us':>9}")
    for (name, stream), (count, busy, idle) in sorted(table.items(), key=lambda x: -x[1][1]):
        print(f"{name:44} {stream:>6} {count:7.1f} {busy:9.1f} {idle:9.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"step_us": median, "kernels": [
                {"name": n, "stream": s, "count": c, "us": b, "idle_us": i}
                for (n, s), (c, b, i) in table.items()]}, file, indent=1)
    if args.svg:
        draw(steps[-1], args.svg)


if __name__ == "__main__":
    main()
