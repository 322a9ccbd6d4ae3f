"""Results over seeds, as values and as Markdown, with the paper's figures beside them where it gives any."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safr_fast.evaluation.places import title
from safr_fast.evaluation.statistics import t_interval
from safr_fast.reproduction.config import Target
from safr_fast.reproduction.settings import PAPER, PAPER_CAPACITY, PAPER_TEXTS, Setting

_FFN1, _VMASK, _RANDOM = "capacity:ffn1_pre", "capacity:vmask", "random"
_TERMS = ("importance", "interaction")
_TITLES = {
    "table1": "Table 1: the plain transformer, VMASK, and SAFR",
    "table2": "Table 2 and Appendix D: weights of both terms",
    "table3": "Table 3: average capacity of all, important and less important words",
    "figure3": "Figure 3: accuracy after deleting k % of the words",
}

Results = Sequence[Mapping[str, Any]]
"""Of each run: ``protocol``, ``setting``, ``seed``, its ``evaluation``, and its ``gradients`` if recorded."""


def summarise(
    target: Target, dataset: str, results: Results, departures: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The table as plain values: for every row and measure ``[mean, half width of the 95 % interval, or null]``.

    The paper's figures stand beside the runs that were trained as its own: by the protocol ``released``, with no
    ``departures``, which are options by name, and evaluated on as many texts.
    """
    groups: dict[tuple[str, Setting], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["protocol"], result["setting"]), []).append(result)
    rows = []
    for (protocol, setting), runs in groups.items():
        evaluations = [run["evaluation"] for run in runs]
        texts = {evaluation["texts"] for evaluation in evaluations}
        as_its_own = protocol == "released" and not departures and texts == {PAPER_TEXTS.get(dataset)}
        figures = PAPER.get((dataset, setting)) if as_its_own else None
        rows.append(
            {
                "protocol": protocol,
                "setting": str(setting),
                "seeds": [run["seed"] for run in runs],
                **_values(target, evaluations),
                "gradients": _gradients([run.get("gradients", {}) for run in runs]),
                "paper": figures._asdict() if figures and target in ("table1", "table2") else None,
                "paper_capacity": PAPER_CAPACITY.get((dataset, setting)) if figures and target == "table3" else None,
            }
        )
    counts = sorted({(result["evaluation"]["texts"], result["evaluation"]["one_word_texts"]) for result in results})
    return {
        "target": target,
        "dataset": dataset,
        "trained_with": dict(departures or {}),
        "texts": [texts for texts, _ in counts],
        "one_word_texts": [one_word for _, one_word in counts],
        "rows": rows,
    }


def _values(target: Target, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = evaluations[0]
    if target == "table3":
        return {
            "capacity": {
                place: {
                    part: _over(e["capacity"][place][part] for e in evaluations)
                    for part in parts
                    if all(part in e["capacity"][place] for e in evaluations)
                }
                for place, parts in first["capacity"].items()
            }
        }
    accuracy = _over(100 * e["accuracy"][0] for e in evaluations)
    by_k = {
        name: {k: _of_k([e["rankers"][name]["k"][k] for e in evaluations]) for k in ranker["k"]}
        for name, ranker in first["rankers"].items()
    }
    normalised = {}
    counts = {e["normalised_aopc"].get("texts") for e in evaluations}
    if len(counts) == 1 and counts != {None}:  # of every run, on as many texts
        limits = [e["normalised_aopc"]["rankers"] for e in evaluations]
        normalised = {name: _over(e[name][0] for e in limits) for name in limits[0]}
    return {"accuracy": accuracy, "rankers": by_k, "normalised_aopc": normalised}


def _gradients(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Per cents of cross-entropy's gradient, over the runs that recorded them."""
    recorded = [run for run in runs if run]
    return {term: _over(100 * run[term] for run in recorded) for term in (recorded[0] if recorded else ())}


def _of_k(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "accuracy": _over(100 * run["accuracy"][0] for run in runs),
        "srs": _over(100 * run["srs"][0] for run in runs),
        "predicted_positive": _over(100 * run["predicted_positive"] for run in runs),
        "comprehensiveness": _over(run["comprehensiveness"][0] for run in runs),
    }


def _over(values: Iterable[float]) -> list[float | None]:
    return list(t_interval(list(values)))


def markdown(summary: Mapping[str, Any]) -> str:
    """A summary for its reader."""
    target, rows = summary["target"], summary["rows"]
    counts = zip(summary["texts"], summary["one_word_texts"], strict=True)
    texts = " or ".join(f"{texts:,} test texts ({one_word:,} of one word, which keep it)" for texts, one_word in counts)
    trained_with = ", ".join(f"{name} {value}" for name, value in summary["trained_with"].items())
    head = [
        f"# {_TITLES[target]} ({summary['dataset']}{'; ' if trained_with else ''}{trained_with})",
        "",
        f"{texts}. Mean over seeds ± half the width of Student's 95 % interval of it; none from one seed.",
    ]
    body = {"table3": _table3, "figure3": _figure3}.get(target, _table2)(rows)
    return "\n".join([*head, "", *body]) + "\n"


def _table2(rows: Results) -> list[str]:
    lines = [
        "Per cents and points, 30 % of the words deleted; SRS by capacity before FFN1's ReLU, the place that comes "
        "nearest the paper's SRS, and by capacity of VMASK's output. *Positive*: share of the texts predicted positive "
        "after the first; where it is near 0 or 100, SRS sits at the class prior. *NAOPC*: AOPC between its limits, of "
        "both, where it was asked for: 0 the worst order of words, 1 the best; this one compares models. *Gradient*: "
        "norm of each weighted term's gradient, in per cent of cross-entropy's, where it was recorded.",
        "",
        "| protocol | λ imp., inter. | seeds | accuracy | paper | random | paper | SRS FFN1 | paper | SRS VMASK "
        "| positive | NAOPC FFN1 | NAOPC VMASK | gradient imp. | gradient inter. |",
        "| --- " * 15 + "|",
    ]
    for row in rows:
        paper, norm = row["paper"] or {}, row["normalised_aopc"]
        ffn1, vmask, random = (row["rankers"].get(name, {}).get("30") for name in (_FFN1, _VMASK, _RANDOM))
        cells = [
            row["protocol"],
            row["setting"],
            len(row["seeds"]),
            _cell(row["accuracy"]),
            paper.get("accuracy", ""),
            _cell(random["accuracy"]),
            paper.get("random", ""),
            _cell(ffn1["srs"]),
            paper.get("srs", ""),
            _cell(vmask["srs"]) if vmask else "",
            _cell(ffn1["predicted_positive"], 1),
            *(_cell(norm[name], 3) if name in norm else "" for name in (_FFN1, _VMASK)),
            *(_cell(row["gradients"][term]) if term in row["gradients"] else "" for term in _TERMS),
        ]
        lines.append(_line(cells))
    return lines


def _table3(rows: Results) -> list[str]:
    lines = [
        "*Important*: the first 30 % of each text by VMASK's probability.",
        "",
        "| protocol | λ imp., inter. | place | all | important | less |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for place, parts in row["capacity"].items():
            cells = [_cell(parts[part], 3) if part in parts else "" for part in ("all", "important", "less")]
            lines.append(_line([row["protocol"], row["setting"], title(place), *cells]))
        if row["paper_capacity"]:
            paper = row["paper_capacity"]
            lines.append(_line(["paper", row["setting"], "not said", paper["all"], paper["important"], paper["less"]]))
    return lines


def _figure3(rows: Results) -> list[str]:
    lines = [
        "Accuracy, per cent: words deleted by capacity before FFN1's ReLU, and as many at random.",
        "",
        "| protocol | λ imp., inter. | seeds | deleted by | none | "
        + " | ".join(f"{k} %" for k in rows[0]["rankers"][_RANDOM])
        + " |",
        "| --- " * (5 + len(rows[0]["rankers"][_RANDOM])) + "|",
    ]
    for row in rows:
        for name, by_k in row["rankers"].items():
            cells = [_cell(values["accuracy"]) for values in by_k.values()]
            start = [row["protocol"], row["setting"], len(row["seeds"])]
            lines.append(_line([*start, "random" if name == _RANDOM else "capacity", _cell(row["accuracy"]), *cells]))
    return lines


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _cell(value: Sequence[float | None], digits: int = 2) -> str:
    mean, half = value
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def figure(summary: Mapping[str, Any], stem: Path) -> None:
    """Figure 3 of each protocol, as ``<stem>-<protocol>.svg``; a stem that ends so already says it once."""
    from safr_fast.report.figures import accuracy_by_k, svg

    for protocol in sorted({row["protocol"] for row in summary["rows"]}):
        curves = {}
        for row in summary["rows"]:
            if row["protocol"] == protocol:
                for name, by_k in row["rankers"].items():
                    points = [(0.0, *_band(row["accuracy"]))]
                    points += [(float(k), *_band(values["accuracy"])) for k, values in by_k.items()]
                    curves[f"{row['setting']}, {'random' if name == _RANDOM else 'capacity'}"] = points
        stem.with_name(f"{stem.name.removesuffix(f'-{protocol}')}-{protocol}.svg").write_bytes(
            svg(accuracy_by_k(curves))
        )


def _band(value: Sequence[float | None]) -> tuple[float, float, float]:
    mean, half = value[0] or 0.0, value[1] or 0.0
    return mean, mean - half, mean + half
