"""Tables and figure of benchmarks/scale.py: seconds, memory, and how they grow with the work."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import scale_inputs
import scale_points
from rich.console import Console
from rich.table import Table

OF_A_STEP = 512  # tokens a side where pairs or ranks grow
IN_ALL = 8  # pairs of a step of all ranks together
PER_RANK = 2  # pairs of each rank
STARTS = {"first": "first start, 1 rank", "second": "second start, 1 rank", "two_ranks": "second start, 2 ranks"}
VOCABULARY = 49_152


def slopes(work: list[float], values: list[float]) -> list[float | None]:
    """The exponent of growth between neighbors, log(v2 / v1) / log(w2 / w1), None for the first one and where a value
    is not above 0. Example: work 1, 2, 4 and values 3, 6, 24 -> None, 1, 2."""
    out: list[float | None] = [None]
    for (w1, v1), (w2, v2) in pairwise(zip(work, values, strict=True)):
        out.append(math.log(v2 / v1) / math.log(w2 / w1) if min(v1, v2) > 0 and w1 != w2 else None)
    return out[: len(work)]


def step_flops(tokens: int) -> tuple[float, float]:
    """(attention's, all) FLOPs of the forward pass of one side of `tokens` tokens, half of them supervised: each token
    sees those before it, and the LM head works where a token is supervised."""
    sizes = scale_inputs.SMALL
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    weights = layers * (4 * hidden**2 + 3 * hidden * sizes["intermediate_size"])
    attention = 4 * hidden * layers * tokens**2 / 2
    return attention, attention + 2 * weights * tokens + 2 * hidden * VOCABULARY * tokens / 2


def most(result: dict[str, Any], name: str) -> float:
    """Of the rank that has most."""
    return max(rank[name] for rank in result["ranks"])


def step_table(axis: str, kind: str, found: list[dict[str, Any]]) -> Table:
    """Of the slowest and of the largest rank. "step GB" is what a step's peak is above the memory before it, "expected"
    the exponent of its FLOPs, of which attention has a share."""
    titles = {"tokens": "a step of one pair, by tokens of a side", "pairs": f"a step, by pairs of {OF_A_STEP} tokens"}
    how = {"per_rank": f"{PER_RANK} pairs for each", "in_all": f"{IN_ALL} pairs for all together"}.get(kind)
    cores = f"{found[0]['cores']} cores"
    table = Table(title=titles.get(axis, f"a step by ranks, {how}, one thread a rank, {cores} for all of them"))
    work = [result["size"] for result in found]
    seconds = [most(result, "seconds") for result in found]
    grown = [most(result, "step_gb") - most(result, "before_gb") for result in found]
    columns: dict[str, list[str]] = {axis: [f"{size:,}" for size in work]}
    columns |= {"seconds": [f"{s:.3f}" for s in seconds], "exp.": powers(work, seconds)}
    if axis == "tokens":
        flops = [step_flops(size) for size in work]
        columns |= {"expected": powers(work, [whole for _, whole in flops])}
        columns |= {"attention": [f"{attention / whole:.0%}" for attention, whole in flops]}
    columns |= {"peak GB": [f"{most(result, 'peak_gb'):.2f}" for result in found]}
    columns |= {"step GB": [f"{gb:.3f}" for gb in grown], "exp. GB": powers(work, grown)}
    return filled(table, columns)


def powers(work: list[float], values: list[float]) -> list[str]:
    return ["" if slope is None else f"{slope:.2f}" for slope in slopes(work, values)]


def filled(table: Table, columns: dict[str, list[str]]) -> Table:
    for name in columns:
        table.add_column(name, justify="right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def start_table(kind: str, found: list[dict[str, Any]]) -> Table:
    """Seconds of each stage on the slowest rank, with the exponent since the size before."""
    table = Table(title=f"{STARTS[kind]}: seconds by pairs in the set (exponent)")
    work = [result["size"] for result in found]
    table.add_column("stage")
    for result in found:
        table.add_column(f"{result['size']:,}{'*' if result['stand_in'] else ''}", justify="right")

    def add(name: str, values: list[float], digits: int = 1) -> None:
        cells = zip(values, powers(work, values), strict=True)
        table.add_row(name, *(f"{value:.{digits}f}{f' ({power})' if power else ''}" for value, power in cells))

    for stage in scale_points.ORDER:
        add(stage, [max(rank["stages"][stage] for rank in result["ranks"]) for result in found])
    add("all", [total(result) for result in found])
    add("GB of a rank's own", [own(result) for result in found], 2)
    add("GB resident, with pages of files", [most(result, "peak_gb") for result in found], 2)
    if any(result["stand_in"] for result in found):
        table.caption = "* the reference's forward pass is left out: zeros are its log-probs"
    return table


def own(result: dict[str, Any]) -> float:
    """GB, without pages of files, of the rank that has most."""
    return max(max(rank["own_gb"].values()) for rank in result["ranks"])


def total(result: dict[str, Any]) -> float:
    return max(sum(rank["stages"].values()) for rank in result["ranks"])


def show(found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    for (axis, kind), points in found.items():
        Console().print(start_table(kind, points) if axis == "set" else step_table(axis, kind, points))


def draw(found: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """Seconds and GB by size, an axis a panel; dashed lines of seconds grow as their work does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"tokens": "tokens of a side", "pairs": "pairs of a step", "ranks": "ranks", "set": "pairs in the set"}
    series = {"per_rank": "2 pairs for each rank", "in_all": "8 pairs for all together", "": "a step", **STARTS}
    figure, panels = pyplot.subplots(2, len(titles), figsize=(16, 7), layout="constrained")
    for column, (axis, label) in enumerate(titles.items()):
        above, below = panels[:, column]
        for kind, points in ((kind, points) for (of, kind), points in found.items() if of == axis):
            seconds = [total(result) if axis == "set" else most(result, "seconds") for result in points]
            memory = [own(result) if axis == "set" else most(result, "peak_gb") for result in points]
            work = [result["size"] for result in points]
            [line] = above.plot(work, seconds, marker="o", label=series[kind])
            below.plot(work, memory, marker="o", label=series[kind])
            if axis in ("tokens", "pairs") or kind == "first":
                linear = [seconds[-1] * size / work[-1] for size in work]
                above.plot(work, linear, "--", color=line.get_color(), alpha=0.4, label="in proportion")
        for panel, what in ((above, "seconds"), (below, "GB of a rank")):
            panel.set(xscale="log", yscale="log" if panel is above and axis != "ranks" else "linear", xlabel=label)
            panel.set(ylabel=what)
            sizes = sorted({result["size"] for (of, _), points in found.items() if of == axis for result in points})
            panel.set_xticks(sizes, [short(size) for size in sizes])
            panel.minorticks_off()
            if panel.get_yscale() == "linear":
                panel.set_ylim(bottom=0)
            else:
                panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def short(size: int) -> str:
    """Example: 4, 512, 32k, 100k, 1M."""
    if size >= 1_000_000:
        return f"{size // 1_000_000}M"
    return f"{size // (1000 if size % 1000 == 0 else 1024)}k" if size >= 1000 else str(size)
