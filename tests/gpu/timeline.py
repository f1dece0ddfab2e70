#!/usr/bin/env python3
"""The timeline of a decode step, from what kernel_trace.cc wrote.

    timeline.py TRACE.csv [--steps 20] [--json FILE] [--svg FILE]

A step begins with the embedding kernel of its token. Steps whose number of kernels is not the most
frequent one are left out, and so are the slowest. Prints, a kernel: how often a step runs it, its
time from the end of the one before it in its lane (kernels of a lane overlap), and how long the
lane stood idle before it (microseconds, means over the steps). Lanes: the layers and the logits;
the choice beside them; copies to and from host memory.
"""
import argparse
import collections
import csv
import json
import re
import statistics

STEP_BEGINS = "embed"
LANES = {"copies": ("gather", "write_through", "memcpy"),
         "choice": ("append", "slide", "hot", "rebuild", "choose", "select", "resolve")}


def short_name(name):
    match = re.search(r"\d([a-z_]+_kernel)", name)
    if match:
        return match.group(1)
    if "nvjet" in name or "cublas" in name or "gemm" in name.lower():
        return "cublas"
    match = re.match(r"_ZN?\w*?(\d+)([A-Za-z_]+)", name)
    return match.group(2)[:40] if match else name[:40]


def lane_of(name):
    for lane, kernels in LANES.items():
        if name.startswith(kernels):
            return lane
    return "layers"


def read_steps(path):
    with open(path, newline="") as file:
        named = [(int(b), int(e), short_name(",".join(n))) for b, e, _, *n in csv.reader(file)]
    rows = sorted((begin, end, lane_of(name), name) for begin, end, name in named)
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
    """(name, lane) -> [per step count, us, idle us before]."""
    table = collections.OrderedDict()
    for step in steps:
        busy_until = {}
        for begin, end, lane, name in step:
            entry = table.setdefault((name, lane), [0, 0.0, 0.0])
            last = busy_until.get(lane, begin)
            entry[0] += 1
            entry[1] += max(0, end - max(begin, last)) / 1000
            entry[2] += max(0, begin - last) / 1000
            busy_until[lane] = max(last, end)
    return {key: [value / len(steps) for value in entry] for key, entry in table.items()}


def draw(step, path):
    """One step as SVG: a row a lane, a box a kernel; boxes of a lane may overlap."""
    first = step[0][0]
    span = max(end for _, end, _, _ in step) - first
    lanes = ["layers", *LANES]
    names = sorted({row[3] for row in step})
    colour = {n: f"hsl({360 * i // len(names)},60%,50%)" for i, n in enumerate(names)}
    left, width, height = 70, 1500, 60
    scale = width / span
    legend = (len(names) + 4) // 5
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" '
           f'height="{height * len(lanes) + 40 + 16 * legend}" '
           'font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']
    for i, lane in enumerate(lanes):
        out.append(f'<text x="6" y="{40 + height * i}">{lane}</text>')
    base = 10 + height * len(lanes)
    for tenth in range(0, int(span / 1e5) + 1, 5):
        x = left + tenth * 1e5 * scale
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{base}" stroke="#ccc"/>'
                   f'<text x="{x + 2:.1f}" y="{base + 10}">{tenth / 10} ms</text>')
    for begin, end, lane, name in step:
        y = 12 + height * lanes.index(lane)
        out.append(f'<rect x="{left + (begin - first) * scale:.2f}" y="{y}" '
                   f'width="{max(0.3, (end - begin) * scale):.2f}" height="{height - 16}" '
                   f'fill="{colour[name]}" fill-opacity="0.75"/>')
    for i, name in enumerate(names):
        x, y = left + i % 5 * 300, base + 28 + 16 * (i // 5)
        out.append(f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{colour[name]}"/>'
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
    print(f"{'kernel':32} {'lane':>7} {'a step':>7} {'us':>9} {'idle us':>9}")
    for (name, lane), (count, busy, idle) in sorted(table.items(), key=lambda x: -x[1][1]):
        print(f"{name:32} {lane:>7} {count:7.1f} {busy:9.1f} {idle:9.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"step_us": median, "kernels": [
                {"name": n, "lane": l, "count": c, "us": b, "idle_us": i}
                for (n, l), (c, b, i) in table.items()]}, file, indent=1)
    if args.svg:
        draw(steps[-1], args.svg)


if __name__ == "__main__":
    main()
