"""An evaluation as a table for its reader."""

from collections.abc import Mapping
from typing import Any

from safr_fast.evaluation.places import title


def ranker_title(name: str) -> str:
    kind, _, place = name.partition(":")
    return f"capacity, {title(place)}" if place else kind.replace("_", " ")


def table(result: Mapping[str, Any]) -> str:
    """Accuracy, then a row for each ranker at the k nearest 30 %, and average capacities; per cents where marked."""
    ks = list(result["config"]["k"])
    k = f"{min(ks, key=lambda value: abs(value - 30)):g}"
    width = max(34, *(len(ranker_title(name)) + 1 for name in result["rankers"]))
    limits = result["normalised_aopc"].get("rankers", {})
    accuracy, low, high = (100 * value for value in result["accuracy"])
    lines = [
        f"{result['texts']:,} test texts ({result['one_word_texts']} of one word, which keep it): "
        f"accuracy {accuracy:.2f} % [{low:.2f}, {high:.2f}], "
        f"predicted positive {100 * result['predicted_positive']:.1f} %",
        "",
        f"{f'deleting {k} % of the words':{width}} SRS, points        acc. %  positive %  p(random)  compr.   suff.  "
        "log-odds  AOPC compr.  normalised",
    ]
    for name, ranker in result["rankers"].items():
        row = ranker["k"][k]
        srs, low, high = (100 * value for value in row["srs"])
        p = "" if name == "random" else f"{row['p_against_random']:.4f}"
        sufficiency = f"{row['sufficiency'][0]:7.3f}" if "sufficiency" in row else " " * 7
        norm = f"{limits[name][0]:10.3f}" if name in limits else ""
        lines.append(
            f"{ranker_title(name):{width}}{srs:6.2f} [{low:6.2f}, {high:6.2f}] {100 * row['accuracy'][0]:6.2f} "
            f"{100 * row['predicted_positive']:10.1f}  {p:>9} {row['comprehensiveness'][0]:7.3f} {sufficiency} "
            f"{row['log_odds'][0]:9.3f} {ranker['aopc_comprehensiveness'][0]:12.3f}  {norm}".rstrip()
        )
    width = max(32, *(len(title(place)) for place in result["capacity"])) if result["capacity"] else 32
    lines += ["", f"{'average capacity':{width}}       all   important   less"]
    for place, values in result["capacity"].items():
        parts = "".join(f"{values[name]:10.3f}" for name in ("all", "important", "less") if name in values)
        lines.append(f"{title(place):{width}}{parts}")
    return "\n".join(lines)
