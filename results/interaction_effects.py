"""What the weight of the interaction changes over Appendix D's grid, masked: the figures in RESULTS.md.

Run it as ``python results/interaction_effects.py``; it reads what lies beside it.
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

from safr_fast.evaluation.statistics import t_interval

RUNS = Path(__file__).parent / "sst2-masked"
WEIGHTS = (0, 0.01, 0.1, 1)
SEEDS = 5


def measures(importance: float, interaction: float, seed: int) -> dict[str, float]:
    run = RUNS / f"sst2-masked-imp{importance:g}-inter{interaction:g}-seed{seed}"
    evaluation = json.loads((run / "evaluation-tables.json").read_text(encoding="utf-8"))
    rankers = evaluation["rankers"]
    return {
        "accuracy": 100 * evaluation["accuracy"][0],
        "SRS FFN1": 100 * rankers["capacity:ffn1_pre"]["k"]["30"]["srs"][0],
        "SRS VMASK": 100 * rankers["capacity:vmask"]["k"]["30"]["srs"][0],
        "NAOPC FFN1": evaluation["normalised_aopc"]["rankers"]["capacity:ffn1_pre"][0],
    }


def differences(grid: np.ndarray) -> list[str]:
    """By weight: mean over seeds of the difference to none, itself the mean over importance weights; Student's 95 %."""
    found = []
    for column in range(1, len(WEIGHTS)):
        by_seed = (grid[:, column] - grid[:, 0]).mean(0)
        mean, half = t_interval(by_seed.tolist())
        found.append(f"{WEIGHTS[column]:g}: {mean:.3f} ± {half:.3f}")
    return found


def p_values(grid: np.ndarray) -> dict[str, float]:
    """Analysis of variance by importance weight and interaction weight, seeds as blocks."""
    rows, columns, seeds = grid.shape
    around = grid - grid.mean()
    squares = {
        "importance": columns * seeds * (around.mean((1, 2)) ** 2).sum(),
        "interaction": rows * seeds * (around.mean((0, 2)) ** 2).sum(),
    }
    squares["both together"] = seeds * (around.mean(2) ** 2).sum() - sum(squares.values())
    freedom = {"importance": rows - 1, "interaction": columns - 1, "both together": (rows - 1) * (columns - 1)}
    blocks = rows * columns * (around.mean((0, 1)) ** 2).sum()
    rest = (around**2).sum() - sum(squares.values()) - blocks
    variance = rest / ((rows * columns - 1) * (seeds - 1))
    return {
        name: float(stats.f.sf(squares[name] / n / variance, n, (rows * columns - 1) * (seeds - 1)))
        for name, n in freedom.items()
    }


if __name__ == "__main__":
    every = [[[measures(i, j, seed) for seed in range(SEEDS)] for j in WEIGHTS] for i in WEIGHTS]
    for name in every[0][0][0]:
        grid = np.array([[[run[name] for run in cell] for cell in row] for row in every])
        print(name, *differences(grid), *(f"p of {term} {p:.3f}" for term, p in p_values(grid).items()), sep="\n  ")
