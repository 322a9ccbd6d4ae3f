"""Turns the JSON of a benchmark run into ``BENCHMARKS.md`` and its plots.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python benchmarks/report.py run.json                 # adds it to benchmarks/results/, and writes BENCHMARKS.md anew

A run is kept under the name of its machine, level and date; a later run of the same name takes its place.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from comparison import ROUNDS
from targets import FROM_QK, OVER_PLAIN, OVER_PLAIN_HIGH, ROW_ENERGY, Target, targets

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "BENCHMARKS.md"
# Groups whose cases differ in length alone.
PLOTTED = {"row energy": ROW_ENERGY, "interaction": FROM_QK}

Bench = dict[str, Any]
Run = dict[str, Any]


def condensed(raw: Run) -> Run:
    """What is kept of pytest-benchmark's JSON: the machine, the date, and each case's comparison."""
    machine = raw["machine_info"]
    cpp = next((detail for name, detail in machine["backends"].items() if name == "cpp"), "")
    level = re.search(r"level (\w+)", cpp)
    return {
        "machine": _machine(machine),
        "cpus": machine["cpus"],
        "level": level[1] if level else "none",
        "versions": {"torch": machine["torch"], "python": machine["python_version"], "platform": machine["platform"]},
        "date": raw["datetime"][:10],
        "commit": (raw.get("commit_info") or {}).get("id", "")[:7],
        "cases": [
            {"group": bench["group"], "rounds": bench["stats"]["rounds"], **bench["extra_info"]}
            for bench in raw["benchmarks"]
        ],
    }


def _machine(info: dict[str, Any]) -> str:
    """Brand and, where it is told, the family and model that say which of the brand's processors it is."""
    cpu = info["cpu"]
    brand = cpu.get("brand_raw", info["processor"])
    return f"{brand} (family {cpu['family']}, model {cpu['model']})" if {"family", "model"} <= cpu.keys() else brand


def name_of(run: Run) -> str:
    words = re.sub(r"\((?!family)[^)]*\)|CPU|Processor", " ", run["machine"])
    return "-".join([*re.findall(r"[a-z0-9]+", words.lower()), run["level"], run["date"]])


def kept() -> list[tuple[str, Run]]:
    """Names and contents of the runs in ``benchmarks/results/``; its folders hold what other scripts measured."""
    return [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json"))]


def page(runs: Sequence[tuple[str, Run]]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Made by `python benchmarks/report.py` from the runs in `benchmarks/results/`. Times, errors, rates and memory",
        "were measured; `must`, `aim` and what a step takes at least are set or derived.",
        "",
        "The providers of a case run in turn in one process. Times are medians, forward and backward unless the",
        "case says otherwise; `×` is how many times as long as the case's first provider, the median of the",
        "rounds' ratios. Before anything is timed, results are held against float64: the error is the largest",
        "relative one, and a provider beyond 5 % is not timed. `of matmul`: operations of the cheapest known exact",
        "algorithm a second, over what `torch.mm` reaches in the same process. Memory is resident memory at the",
        "peak, beyond what was there before, of a provider's second call, eager float32's first; ours keeps at most",
        "8 MiB a thread from one call to the next, which were there. Cases that take long are medians of",
        f"{ROUNDS[0]} rounds, others of up to {ROUNDS[1]}. The allocator is the system's as it comes.",
        "[What limits them](benchmarks/LIMITS.md) has profiles, and what the allocator costs.",
        "",
    ]
    for name, run in runs:
        lines += _section(name, run)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, run: Run) -> Iterable[str]:
    versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
    yield f"## {run['machine']}, processors used: {run['cpus']}, level {run['level']}, {run['date']}"
    yield ""
    commit = f", commit {run['commit']}" if run.get("commit") else ""
    yield " ".join(filter(None, (f"{versions}{commit}. {_rates(run)}", run.get("note"))))
    yield ""
    groups: dict[str, list[Bench]] = {}
    for case in run["cases"]:
        groups.setdefault(case["group"], []).append(case)
    for title in (title for title, group in PLOTTED.items() if group in groups):
        yield f"![Time and memory of {title} against length](benchmarks/results/{_plot_name(name, title)})"
        yield ""
    yield from _target_table(run)
    for group, cases in groups.items():
        yield f"### {group[0].upper()}{group[1:]}"
        yield ""
        if "device" in cases[0]:
            yield from _gpu_table(cases)
            continue
        yield "| case | threads | provider | ms | × | error | of matmul | MiB |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        for case in cases:
            for index, (provider, p) in enumerate(case["providers"].items()):
                head = f"{case['case']} | {case['threads']}" if index == 0 else " |"
                yield f"| {head} | {_provider(provider, case)} | {_measured(p)} |"
        yield ""


def _gpu_table(cases: Sequence[Bench]) -> Iterable[str]:
    """Times by events, launches included, and of a CUDA graph."""
    first = cases[0]
    rates = ", ".join(f"{dtype} {rate:.0f} TFLOP/s" for dtype, rate in first["matmul_tflops"].items())
    yield f"{first['device']}, cold L2. `torch.mm` of {rates}; a copy {first['copy_gbytes']:.0f} GB/s."
    yield ""
    yield "| case | provider | ms | × | as a graph, ms | error | of matmul | of copy | MiB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    keys = {"times_as_long": ".2f", "graph_ms": ".3g", "error": ".0e", "fraction_of_matmul": ".2f",
            "fraction_of_copy": ".2f", "peak_mib": ".0f"}  # fmt: skip
    for case in cases:
        for index, (provider, p) in enumerate(case["providers"].items()):
            ms = p.get("why", "wrong")[:60].replace("|", "/") if p["ms"] is None else f"{p['ms']:.3g}"
            cells = ["" if p.get(key) is None else format(p[key], form) for key, form in keys.items()]
            yield f"| {case['case'] if index == 0 else ''} | {_provider(provider, case)} | {ms} | {' | '.join(cells)} |"
    yield ""


def _rates(run: Run) -> str:
    """What products of float32 reach on one thread."""
    one = [case for case in run["cases"] if case.get("threads") == 1]
    if not one:
        return "Of a GPU alone."
    own = next((case["tile_gflops"] for case in one if case.get("tile_gflops")), None)
    tiles = f", this package's tiles {own:.0f}" if own else ""
    return (
        f"On one thread `torch.mm` of float32 reaches {one[0]['matmul_gflops']:.0f} GFLOP/s{tiles}.{_neighbours(run)}"
    )


def _neighbours(run: Run) -> str:
    """What was done about others on the processor, where AMX suffers from them."""
    watched = [case for case in run["cases"] if "disturbed" in case and run["level"] == "amx"]
    if not watched:
        return ""
    times = sum(p["ms"] is not None for case in watched for p in case["providers"].values())
    marked = sum(len(case["disturbed"]) for case in watched)
    return (
        " Calls while others slowed a processor that they used are left out (`benchmarks/quiet.py`), where three"
        f" rounds without are there: not so in {marked} of {times} times, marked \\*."
    )


def _provider(name: str, case: Bench) -> str:
    share = case.get("regularisers_share", {}).get(name)
    mark = "\\*" if name in case.get("disturbed", []) else ""
    if share is None:
        return name + mark
    least = f" (least in float32: {case['least_share_in_float32']:.0%})" if "least_share_in_float32" in case else ""
    return f"{name}{mark}: regularisers {share:.0%} of the step" + (least if name == "ours highest" else "")


def _measured(p: dict[str, float | None]) -> str:
    if p["ms"] is None:
        return f"wrong | | {p['error']:.0e} | | "
    fraction = "" if p["fraction_of_matmul"] is None else f"{p['fraction_of_matmul']:.2f}"
    memory = "" if p["peak_mib"] is None else f"{p['peak_mib']:.0f}"
    return f"{p['ms']:.3g} | {p['times_as_long']:.2f} | {p['error']:.0e} | {fraction} | {memory}"


def _target_table(run: Run) -> Iterable[str]:
    """Ratios to eager beside what the design asks for."""
    rows = list(targets(run))
    if not rows:
        return
    yield "### Times as fast as eager float32, beside the targets"
    yield ""
    yield "| | T | must | aim | 1 thread | 2 threads | best plain PyTorch over ours |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        reached = " | ".join(_ratio(run, row, threads, ["eager"], row.must) for threads in (1, 2))
        plain = _ratio(run, row, 1, ["compiled", "algebra compiled"], row.over_plain)
        yield f"| {row.title} | {row.length} | {row.must:g} | {row.aim:g} | {reached} | {plain} |"
    yield ""
    yield (
        f"The last column must be {OVER_PLAIN:g}, {OVER_PLAIN_HIGH:g} with products faster than float32's; it takes "
        "the faster of both algebras under `torch.compile`."
    )
    yield ""


def _ratio(run: Run, row: Target, threads: int, rivals: Sequence[str], must: float) -> str:
    """The fastest rival's time over ours."""
    for case in run["cases"]:
        if case["group"] == row.group and case.get("length") == row.length and case.get("threads") == threads:
            own = case["providers"].get(row.provider)
            times = [case["providers"][name]["times_as_long"] for name in rivals if name in case["providers"]]
            known = [time for time in times if time]
            if own and own["ms"] and known:
                ratio = min(known) / own["times_as_long"]
                disturbed = {row.provider, *rivals} & set(case.get("disturbed", []))
                return f"{ratio:.2g}" + "\\*" * bool(disturbed) + ("" if ratio >= must else " (short)")
    return ""


def _plot_name(name: str, title: str) -> str:
    return f"{name}-{title.replace(' ', '-')}.svg"


def plot(name: str, run: Run, title: str, group: str, threads: int = 1) -> None:
    """Time and memory against length, both axes logarithmic, every provider a line."""
    from matplotlib import pyplot

    cases = [c for c in run["cases"] if c["group"] == group and c.get("threads") == threads]
    if not cases:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in (
        (axes[0], "ms", "time, ms a head or 8,192 tokens"),
        (axes[1], "peak_mib", "peak memory, MiB"),
    ):
        for provider in dict.fromkeys(p for case in cases for p in case["providers"]):
            points = [
                (case["length"], case["providers"][provider][key] / (case.get("heads", 1) if key == "ms" else 1))
                for case in cases
                if case["providers"].get(provider, {}).get(key)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=provider)
        axis.set(xscale="log", yscale="log", xlabel="T, tokens", ylabel=label)
        axis.set_xticks(ticks := sorted({case["length"] for case in cases}), map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{cases[0]['group']}: {run['machine']}, {threads} thread, {run['date']}", fontsize="medium")
    pyplot.rcParams["svg.hashsalt"] = name  # the same run gives the same file
    figure.savefig(RESULTS / _plot_name(name, title), metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="*", type=Path, help="JSON files of pytest-benchmark to add; none: write anew only"
    )
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for path in arguments.run:
        run = condensed(json.loads(path.read_text(encoding="utf-8")))
        (RESULTS / f"{name_of(run)}.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    runs = kept()
    for name, run in runs:
        for title, group in PLOTTED.items():
            plot(name, run, title, group)
    PAGE.write_text(page(runs), encoding="utf-8")
    print(f"{PAGE}: {len(runs)} runs")


if __name__ == "__main__":
    main()
