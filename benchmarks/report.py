"""Tables and plots from the CSV files of the suites: ``python -m benchmarks.report [--check]``.

Writes docs/benchmarks.md, docs/scaling-*.png, docs/sampling-*.png and, in README.md and the other pages of docs/,
what stands between ``<!-- NAME -->`` and ``<!-- end -->``. ``--check`` writes nothing, and fails where a text is not
what the CSV files make.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import write_text
from dispersion_kernels.condensation.plot import COLOURS, MARKERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"

Row = dict[str, str]

# Variants that are in the table of docs/benchmarks.md, but not in README's.
PEERS = ("row-chunked", "KeOps")

HEAD = """\
# Benchmarks

Made by `python -m benchmarks.report` from the files in [results](results), which `python -m benchmarks --suite ...`
wrote; `pip install -e '.[bench]'` brings what the suites need. Times are medians of interleaved batches; where
quartiles are given they stand in brackets. Cases in which this package is slower are in the tables like all others.
Before an exact case is timed, its loss and gradient are compared with float64. Each table ends with the processor, the
versions and the commit of the measurement; at a commit ending in "-dirty" there were changes that were not committed.
`pytest benchmarks` has the cases of the suite `loss` for pytest-benchmark.
"""
ABOUT = {
    "loss": """\
Loss and gradient by shape. *f+b* is forward and backward, *forward* keeps what backward wants, *loss* runs under
`no_grad`. The limit is 3 B L^2 F FLOPs at the rate of `torch.mm` in the same rounds. GFLOP/s and their share of that
rate count the FLOPs that a mode needs: 3 B L^2 F, for forward and loss 1. A quotient below 1 (a share above 100%) says
that the kernel's own matrix products are faster than those of `torch.mm` on this processor. Peak memory is beyond the
tokens, of f+b. Where the processor has AVX-512, the suite now measures the CPU kernel on AVX2, too, which most laptops
end at; these tables are older. Errors are relative to float64. Times are medians of seven batches of
at least a quarter second.
*Row-chunked* is plain PyTorch with checkpointed blocks of rows.""",
    "memory": """\
Forward and backward of one sequence of L tokens, of 64 features on a CPU, each measurement in a process of its own:
peak memory beyond the input, in multiples of the input's bytes (MiB), and milliseconds. On a CPU, row-chunked keeps
what glibc's allocator does not give back, far more than its tensors.""",
    "train": """\
A step of the trainer; the runs take a step each in turn, and on a CPU freed memory stays with the process, as in the
trainer. Of the quotients with the step without the loss in the same turn the table has the median and its standard
error. Peak memory is what a step takes beyond weights and the optimiser's state; an activation is the fp32 hidden
states of one layer.""",
    "regularizer": """\
Forward and backward of a GPT-2: without the loss, by the recipe (hidden states out of the model, and the function on
all of them), by the function with `recompute=True`, and by `DispersionRegularizer`. Peak memory of tensors beyond the
step without the loss, in hidden states of one layer in the model's dtype; the median quotient of the time with the step
without it in the same turn.""",
    "accuracy": """\
Relative error of the gradient (of the loss), against float64 on the same numbers, by the mean cosine of the tokens:
2 x 512 tokens, F = 768. In fp16 the naive loss overflows. The 16-bit gradients of this package are fp32 sums that are
rounded once.""",
    "scale": """\
Loss and gradient of one sequence of L tokens, of 64 features in fp32, in a process whose memory beyond the input has a
ceiling.""",
    "sampling": """\
Relative error of the part of the gradient that is orthogonal to each token, and milliseconds of forward and backward
for one of four layers in a call.
*n partners*: each token meets so many others, a share n / L of the pairs; *0*: the model of the slope alone. *Low rank*
has 16 directions, *full rank* the cosine itself.""",
    "condensation": """\
A measurement of 100 texts of 512 tokens in a model of SmolLM2-135M's shape, beside its own forward pass: milliseconds
for a text and a layer, the quotient with `measure_condensation` and with a forward pass of SmolLM2-135M, and the
growth of peak memory. *Matrices in NumPy* makes the matrix of all cosines of a text and layer, `np.histogram` of its
pairs, with and without position 0, and the second moment of the features, as `measure_condensation` does; the
*published procedure* keeps all matrices and averages them.""",
    "convergence": """\
The trainer's nano GPT-2 from several seeds: mean and standard deviation, and of the difference from all pairs, seed by
seed, mean and standard error.""",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a text is not what the CSV files make")
    args = parser.parse_args(arguments)
    results = read_results(RESULTS)
    texts = {path: filled(path.read_text(encoding="utf-8"), results) for path in pages(ROOT)}
    texts[ROOT / "docs" / "benchmarks.md"] = page(results)
    if args.check:
        stale = [str(path) for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
        if stale:
            print(f"not what docs/results makes, run python -m benchmarks.report: {', '.join(stale)}", file=sys.stderr)
            raise SystemExit(1)
        return
    for path, text in texts.items():
        if text != path.read_text(encoding="utf-8"):
            write_text(path, text)
            print(path)
    for name in results:
        if name.startswith("memory-"):
            print(plot_scaling(results[name], ROOT / "docs" / f"{name.replace('memory', 'scaling')}.png"))
        if name.startswith("sampling-"):
            print(plot_sampling(results[name], ROOT / "docs" / f"{name}.png"))


def pages(root: Path) -> list[Path]:
    """Paths of README.md and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def read_results(folder: Path) -> dict[str, list[Row]]:
    """Rows of each file, by the file's name: the suite and the kind of machine."""
    results = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            results[path.stem] = list(csv.DictReader(file))
    return results


def page(results: dict[str, list[Row]]) -> str:
    """Text of docs/benchmarks.md."""
    parts = [HEAD]
    for name, rows in results.items():
        suite = name.split("-")[0]
        if suite not in TABLES:
            continue
        parts += [f"## {name}", "", ABOUT[suite], "", TABLES[suite](rows), "", machine(rows), ""]
        if suite == "memory":
            parts += [f"![Time and peak memory against L]({name.replace('memory', 'scaling')}.png)", ""]
        if suite == "sampling":
            parts += [f"![Error of the gradient against time]({name}.png)", ""]
    return "\n".join(parts)


def filled(text: str, results: dict[str, list[Row]]) -> str:
    """``text`` with the parts between ``<!-- NAME -->`` and ``<!-- end -->`` made anew.

    Where its file is missing, a part says how to make it.

    Raises ValueError for a name that is not known.
    """

    def part(match: re.Match[str]) -> str:
        name = match[1]
        kind = name.split("-")[0]
        if kind not in SHORT:
            raise ValueError(f"<!-- {name} --> begins with none of {', '.join(SHORT)}")
        source = name.replace("headline", "loss", 1)
        rows = results.get(source)
        if rows is None:
            command = f"python -m benchmarks --suite {source.split('-')[0]} --out docs/results/{source}.csv"
            made = f"*not measured yet: `{command}`*"
        else:
            made = SHORT[kind](rows)
        if kind == "headline":
            return f"<!-- {name} -->{made}<!-- end -->"
        return "\n".join([f"<!-- {name} -->", made, *(["", machine(rows)] if rows else []), "<!-- end -->"])

    return re.sub(r"<!-- ([\w-]+) -->.*?<!-- end -->", part, text, flags=re.DOTALL)


def _isa(row: Row) -> str:
    """Instruction set that a row was measured on; files without that column have one alone."""
    return row.get("isa") or (row["native_isa"] if row.get("device", "cpu") == "cpu" else "-")


def _widest(rows: list[Row]) -> list[Row]:
    """Rows on the instruction set that the processor's backends choose."""
    return [row for row in rows if not row.get("isa") or row["isa"] == row["native_isa"]]


def machine(rows: list[Row]) -> str:
    row = rows[0]
    rates = [float(each["mm_gflops"]) for each in _widest(rows) if each.get("mm_gflops")]
    on = dict.fromkeys(one["processor"] if one.get("device", "cpu") == "cpu" else one["device"] for one in rows)
    what = [
        " and ".join(on),
        f"{row['threads']} threads",
        f"PyTorch {row['torch']}",
        *([f"Triton {row['triton']}"] if row.get("device", "cpu") != "cpu" else [row["native_isa"]]),
        *([f"`torch.mm` {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s"] if rates else []),
        f"commit {' and '.join(dict.fromkeys(each['commit'] for each in rows))}",
    ]
    return f"*{', '.join(what)}*"


def headline(rows: list[Row]) -> str:
    """README's clause on speed: ranges over all shapes of forward and backward in fp32."""
    ratio: dict[tuple[str, ...], float] = {
        (row["variant"], row["B"], row["L"], row["F"]): float(row["ratio"])
        for row in _widest(rows)
        if row["mode"] == "f+b" and row["dtype"] == "fp32" and row["ratio"]
    }
    shapes = [shape for name, *shape in ratio if name == "cpu"]

    def times(name: str) -> str:
        found = [ratio[(name, *shape)] / ratio[("cpu", *shape)] for shape in shapes if (name, *shape) in ratio]
        return f"{min(found):.2g} to {max(found):.2g}"

    return (
        f"{times('naive compiled')} times that of the naive version under `torch.compile`, "
        f"{times('naive eager')} times that in eager mode"
    )


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def loss_short(rows: list[Row]) -> str:
    """Forward and backward in fp32, by variant and shape: milliseconds and, in parentheses, multiples of the limit."""
    timed = {
        (row["variant"], ", ".join((row["B"], row["L"], row["F"]))): row
        for row in _widest(rows)
        if row["mode"] == "f+b" and row["dtype"] == "fp32" and row["variant"] not in PEERS
    }
    names, shapes = (list(dict.fromkeys(part)) for part in zip(*timed, strict=True))
    lines = [[name, *(_milliseconds(timed[name, shape]) for shape in shapes)] for name in names]
    return table(["B, L, F:", *shapes], lines)


def _milliseconds(row: Row) -> str:
    if not row["ratio"]:
        return _status(row)
    # Three significant digits and no exponent.
    time = float(row["ms"])
    return f"{time:,.{max(0, 2 - int(math.log10(max(time, 1))))}f} ({float(row['ratio']):.2f})"


def _status(row: Row) -> str:
    """Status of a row in a word or two."""
    return re.sub(r"^not timed: a call takes ", "", row["status"]) if not row["status"].startswith("skipped") else "-"


def loss_full(rows: list[Row]) -> str:
    header = [
        "B, L, F",
        "variant",
        "instructions",
        "f+b, ms",
        "forward, ms",
        "loss, ms",
        "f+b / limit",
        "GFLOP/s: f+b, forward, loss",
    ]
    header += ["of `torch.mm`", "peak, MiB (x input)", "error of the loss", "of the gradient"]
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (", ".join((row["B"], row["L"], row["F"])), f"{row['variant']}, {row['dtype']}", _isa(row))
        groups.setdefault(key, {})[row["mode"]] = row
    lines = []
    for case, modes in groups.items():
        both = modes["f+b"]
        asked = [modes.get(mode, {}) for mode in ("f+b", "forward", "loss")]
        times = [_spread(modes[mode]) if mode in modes else "-" for mode in ("f+b", "forward", "loss")]
        if not both["ratio"]:
            times = [both["status"], "-", "-"]
        peak = "-"
        if both.get("peak_bytes"):
            peak = (
                f"{float(both['peak_bytes']) / 2**20:,.1f} ({int(both['peak_bytes']) / int(both['input_bytes']):.1f})"
            )
        errors = [f"{float(both[name]):.1e}" if both.get(name) else "-" for name in ("loss_error", "grad_error")]
        lines.append(
            [
                *case,
                *times,
                f"{float(both['ratio']):.2f}" if both["ratio"] else "-",
                ", ".join(f"{float(row['gflops']):,.0f}" if row.get("gflops") else "-" for row in asked),
                ", ".join(f"{float(row['of_limit']):.0%}" if row.get("of_limit") else "-" for row in asked),
                peak,
                *errors,
            ]
        )
    return table(header, lines)


def _spread(row: Row) -> str:
    quartiles = f" [{float(row['ms_q1']):.3g}, {float(row['ms_q3']):.3g}]" if row.get("ms_q1") else ""
    return f"{float(row['ms']):.4g}{quartiles}" if row.get("ms") else "-"


def memory_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(row["variant"], row["L"]): row for row in rows}
    lines = []
    for length in dict.fromkeys(row["L"] for row in rows):
        size = float(found[names[0], length]["input_bytes"])
        cells = []
        for name in names:
            row = found[name, length]
            if row["peak_bytes"]:
                peak = float(row["peak_bytes"])
                cells.append(f"{peak / size:,.1f} ({peak / 2**20:,.1f}), {float(row['ms']):,.1f}")
            else:
                cells.append(_status(row))
        lines.append([f"{int(length):,}", f"{size / 2**20:.2f}", *cells])
    return table(["L", "input, MiB", *(f"{name}, x input (MiB), ms" for name in names)], lines)


def train_table(rows: list[Row]) -> str:
    header = [f"`{rows[0]['recipe']}`", "tokens per second", "x the step without", "step, ms [quartiles]"]
    header += ["peak memory of a step, MiB", "more, in activations a layer"]
    lines = []
    for row in rows:
        peak = more = "-"
        if row["peak_bytes"]:
            peak = f"{float(row['peak_bytes']) / 2**20:,.1f}"
            activations = int(row["layers"]) * float(row["activation_bytes"])
            more = f"{(float(row['peak_bytes']) - float(rows[0]['peak_bytes'])) / activations:.2f}"
        time_ratio = f"{float(row['of_time_without']):.3f} ± {float(row['of_time_error']):.3f}"
        speed = f"{float(row['tokens_per_second']):,.0f}"
        lines.append([row["variant"], speed, time_ratio, _spread(row), peak, more])
    return table(header, lines)


def accuracy_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    found = {tuple(row[key] for key in ("potential", "mean_cosine", "dtype", "variant")): row for row in rows}
    columns = [(dtype, name) for dtype in dict.fromkeys(row["dtype"] for row in rows) for name in names]
    several = len({row["potential"] for row in rows}) > 1
    lines = []
    for potential, cosine in dict.fromkeys((row["potential"], row["mean_cosine"]) for row in rows):
        cells = []
        for column in columns:
            row = found[(potential, cosine, *column)]
            errors = row["status"] == "computed"
            cells.append(f"{float(row['grad_error']):.1e} ({float(row['loss_error']):.1e})" if errors else _status(row))
        lines.append([f"{potential}, {cosine}" if several else cosine, *cells])
    return table(["mean cosine", *(f"{name}, {dtype}" for dtype, name in columns)], lines)


def scale_table(rows: list[Row]) -> str:
    header = ["L", "seconds", "x the last", "peak beyond the input, MiB (x input)", "ceiling, MiB"]
    header += ["an L x L matrix, MiB", "error of gradient rows"]
    lines, last = [], ""
    for row in rows:
        peak, size = float(row["peak_bytes"]), float(row["input_bytes"])
        lines.append(
            [
                f"{int(row['L']):,}",
                f"{float(row['seconds']):.2f}",
                f"{float(row['seconds']) / float(last):.1f}" if last else "",
                f"{peak / 2**20:,.1f} ({peak / size:.1f})",
                f"{float(row['ceiling_bytes']) / 2**20:,.0f}",
                f"{float(row['matrix_bytes']) / 2**20:,.0f}",
                f"{float(row['row_error']):.1e}",
            ]
        )
        last = row["seconds"]
    return table(header, lines)


def sampling_full(rows: list[Row]) -> str:
    return _sampling(rows, list(dict.fromkeys(row["variant"] for row in rows)))


def sampling_short(rows: list[Row]) -> str:
    """Short table: a selection of the variants, at the larger tau."""
    tau = max(float(row["tau"]) for row in rows)
    variants = [
        "256 tokens, naive",
        "none, 64",
        "low_rank, 64",
        "low_rank, 0",
        "full rank, 0",
        "low_rank, 1/16",
        "full rank, 1/16",
        "all pairs",
    ]
    measured = {row["variant"] for row in rows}
    return _sampling([row for row in rows if float(row["tau"]) == tau], [name for name in variants if name in measured])


def _sampling(rows: list[Row], variants: list[str]) -> str:
    found = {(row["source"], row["L"], row["tau"], row["variant"]): row for row in rows}
    lines = []
    for source, length, tau in dict.fromkeys((row["source"], row["L"], row["tau"]) for row in rows):
        case_rows = [found.get((source, length, tau, name)) for name in variants]
        cells = [f"{float(row['error']):.1%}, {float(row['ms']):,.1f}" if row else "-" for row in case_rows]
        lines.append([f"{source}, L = {int(length):,}, tau = {float(tau):g}", *cells])
    return table(["error, ms", *(_partners(name) for name in variants)], lines)


def _partners(variant: str) -> str:
    model, _, number = variant.partition(", ")
    if "/" in number:
        return f"{model.replace('_', ' ')}, {number} of the pairs"
    return f"{model.replace('_', ' ')}, {number} partners" if number.isdigit() else variant


def convergence_full(rows: list[Row]) -> str:
    return _convergence(rows, ["validation_loss", "cosine_last", "cosine_mean"])


def convergence_short(rows: list[Row]) -> str:
    return _convergence(rows, ["validation_loss", "cosine_mean"])


def _convergence(rows: list[Row], measured: list[str]) -> str:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(row["variant"], row["seed"]): row for row in rows}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    header = [f"`{rows[0]['recipe']}`, {len(seeds)} seeds"]
    header += [part for name in measured for part in (name.replace("_", " "), "less all pairs")]
    lines = []
    for name in names:
        line = [name]
        for key in measured:
            values = [float(found[name, seed][key]) for seed in seeds]
            gaps = [value - float(found["all pairs", seed][key]) for value, seed in zip(values, seeds, strict=True)]
            line.append(_mean(values, 1))
            line.append("" if name == "all pairs" else _mean(gaps, len(gaps)))
        lines.append(line)
    return table(header, lines)


def _mean(values: list[float], of: int) -> str:
    """Mean of the values and the standard error of a mean of ``of`` values."""
    deviation = statistics.stdev(values) / of**0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def plot_sampling(rows: list[Row], path: Path) -> Path:
    """Error against time, one panel for each L and tau, of the first source of a pretrained model, or the first.

    Raises ModuleNotFoundError where matplotlib is missing.
    """
    figure_class = _figure()
    sources = list(dict.fromkeys(row["source"] for row in rows))
    source = next((name for name in sources if "SmolLM" in name), sources[0])
    rows = [row for row in rows if row["source"] == source]
    lengths = list(dict.fromkeys(row["L"] for row in rows))
    taus = list(dict.fromkeys(row["tau"] for row in rows))
    figure = figure_class(figsize=(4.4 * len(lengths), 3.4 * len(taus)), layout="constrained")
    panels = figure.subplots(len(taus), len(lengths), squeeze=False, sharey="row", sharex="col")
    models = {
        "none": "pairs, no model",
        "low_rank": "pairs, low rank",
        "full rank": "pairs, full rank",
    }
    for line, tau in zip(panels, taus, strict=True):
        for axes, length in zip(line, lengths, strict=True):
            case = [row for row in rows if (row["L"], row["tau"]) == (length, tau)]
            at = {row["variant"]: (float(row["ms"]), float(row["error"])) for row in case}
            axes.plot(
                *at["256 tokens, naive"], "x", color="0.2", markersize=9, markeredgewidth=2.5, label="256 tokens, naive"
            )
            axes.plot(*at["256 tokens"], "+", color="0.2", markersize=11, markeredgewidth=2.5, label="256 tokens, ours")
            for (model, label), colour, marker in zip(models.items(), COLOURS, MARKERS, strict=False):
                curve = sorted(point for name, point in at.items() if re.fullmatch(rf"{model}, [1-9][\d/]*", name))
                axes.plot(
                    *zip(*curve, strict=True), color=colour, marker=marker, markersize=5, linewidth=2, label=label
                )
                if f"{model}, 0" in at:
                    axes.plot(
                        *at[f"{model}, 0"],
                        marker,
                        color=colour,
                        markersize=9,
                        markerfacecolor="white",
                        markeredgewidth=2,
                    )
            axes.axvline(at["all pairs"][0], color="0.6", linestyle=":", linewidth=1.4)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"L = {int(length):,}, tau = {float(tau):g}", loc="left", fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("forward + backward, ms (dotted: all pairs)")
    for axes in panels[:, 0]:
        axes.set_ylabel("error of the gradient")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    filled = "filled: 32 to 256 partners a token, and 1/16 of the pairs"
    figure.suptitle(f"{source}, F = {rows[0]['F']}; {filled}; open: no pairs", fontsize=11)
    return _saved(figure, path)


def plot_scaling(rows: list[Row], path: Path) -> Path:
    """Time and peak memory against L, log-log, with the limit, and where a variant ran out of memory.

    Raises ModuleNotFoundError where matplotlib is missing.
    """
    figure = _figure()(figsize=(11, 4.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        own = [row for row in rows if row["variant"] == name]
        measured = [row for row in own if row["peak_bytes"]]
        if not measured:
            continue
        lengths = [int(row["L"]) for row in measured]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2, "label": name}
        time.plot(lengths, [float(row["ms"]) for row in measured], **style)
        memory.plot(lengths, [float(row["peak_bytes"]) / 2**20 for row in measured], **style)
        ended = [row for row in own if row.get("status") == "out of memory"]
        if ended:
            for axes, last in ((time, float(measured[-1]["ms"])), (memory, float(measured[-1]["peak_bytes"]) / 2**20)):
                next_length = int(ended[0]["L"])
                expected = last * (next_length / lengths[-1]) ** 2
                axes.plot([lengths[-1], next_length], [last, expected], ":", color=colour)
                axes.plot([next_length], [expected], "x", color=colour, markersize=10, markeredgewidth=2.5)
                axes.annotate("out of memory", (next_length, expected), (-8, 0), textcoords="offset points", ha="right")
    limits = {int(row["L"]): float(row["limit_ms"]) for row in rows if row.get("limit_ms")}
    if limits:
        time.plot(list(limits), list(limits.values()), "--", color="0.35", linewidth=1.4, label="limit: 3 L²F FLOPs")
    sizes = {int(row["L"]): float(row["input_bytes"]) / 2**20 for row in rows}
    memory.plot(list(sizes), list(sizes.values()), "--", color="0.35", linewidth=1.4)
    memory.annotate("the input itself", list(sizes.items())[-1], (0, -12), textcoords="offset points", ha="right")
    time.set_ylabel("forward + backward, ms")
    memory.set_ylabel("peak memory beyond the input, MiB")
    ticks = sorted(sizes)
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
        axes.set_xlabel("tokens of the sequence, L")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    time.legend(frameon=False)
    time.set_title(f"One sequence, F = {rows[0]['F']}, {rows[0]['dtype']}", loc="left", fontsize=11)
    return _saved(figure, path)


def _figure() -> Any:
    """Matplotlib's figure class, used without pyplot: no display, no global state, no figure left open."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install matplotlib", name=error.name) from error
    return Figure


def _saved(figure: Any, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
    return path


def regularizer_table(rows: list[Row]) -> str:
    kinds = list(dict.fromkeys((row["dtype"], row["checkpointing"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    of = {(row["variant"], row["dtype"], row["checkpointing"]): row for row in rows}
    heads = [f"{dtype}{', checkpointed' if int(checkpointing) else ''}" for dtype, checkpointing in kinds]
    lines = [f"| {rows[0]['shape']}: z, of time | {' | '.join(heads)} |", "| --- " * (1 + len(kinds)) + "|"]
    for name in names:
        found = [of[(name, *kind)] for kind in kinds]
        cells = [f"{float(row['more_z']):.1f}, {float(row['of_time_without']):.2f}" for row in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def condensation_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        forward_fraction = f"{float(row['of_forward']):.1%}" if row["of_forward"] else "-"
        peak = f"{float(row['peak_bytes']) / 2**20:,.0f}" if row["peak_bytes"] else "-"
        cells = [row["variant"], f"{float(row['ms']):.2f} ({float(row['q1_ms']):.2f}, {float(row['q3_ms']):.2f})"]
        lines.append([*cells, f"{float(row['of_ours']):.1f}", forward_fraction, peak])
    return table(["way", "ms", "of `measure_condensation`", "of the forward", "peak, MiB"], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "loss": loss_full,
    "memory": memory_table,
    "train": train_table,
    "regularizer": regularizer_table,
    "accuracy": accuracy_table,
    "scale": scale_table,
    "sampling": sampling_full,
    "convergence": convergence_full,
    "condensation": condensation_table,
}
SHORT: dict[str, Callable[[list[Row]], str]] = {
    **TABLES,
    "headline": headline,
    "loss": loss_short,
    "sampling": sampling_short,
    "convergence": convergence_short,
}


if __name__ == "__main__":
    main()
