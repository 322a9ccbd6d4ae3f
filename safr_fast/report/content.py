"""What a page shows of a run: values and figures, no markup."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from safr_fast import functional
from safr_fast.data.vocabulary import UNKNOWN
from safr_fast.evaluation.places import exact_capacity, hidden_states, title
from safr_fast.evaluation.predictor import Predictor
from safr_fast.nn import TransformerClassifier
from safr_fast.report import drawn, figures
from safr_fast.report.drawn import Drawn
from safr_fast.training.run import RunFolder

_GRAPH = 24
_MATRIX = 32
_WORDS = 20
# Characters that XML, and so SVG, cannot hold.
_UNDRAWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Word:
    """One word of a text; ``values`` by place, empty past the model's window."""

    text: str
    values: tuple[float, ...]
    gate: float | None
    unknown: bool
    """Not in the model's vocabulary: all such words are one to it."""


@dataclass(frozen=True)
class Text:
    """A text as the model sees it."""

    words: tuple[Word, ...]
    places: tuple[str, ...]
    positive: float
    ranked: str
    """What tells its words' importance."""
    largest: tuple[float, ...]
    """Capacity by place, of the word that has most."""
    distinct: int
    """Words that the graphs and matrices choose from: of those within the model's window each once."""
    outside: int
    """Words past the window."""
    graphs: dict[str, Drawn]
    matrices: dict[str, Drawn]
    strip: Figure
    """Of the first words; the graphs and matrices show the most important of all."""


def of_text(model: TransformerClassifier, predictor: Predictor, text: str) -> Text:
    """Capacities of every word at every place, with the graph and the matrix of each place."""
    batch = predictor.encode([text]).batch([0])
    output, states = hidden_states(model, batch.ids, batch.mask)
    length = int(batch.mask.sum())
    by_place = {place: exact_capacity(h, batch.mask)[0, :length] for place, h in states.items()}
    gate = None if output.gate is None else output.gate[0, :length].double()
    importance = by_place["embedding"] if gate is None else gate
    ranked = "capacity at the embedding" if gate is None else "VMASK probability"
    words = [_UNDRAWABLE.sub("\ufffd", word) for word in text.split()]
    chosen = _distinct(words, importance.argsort(descending=True, stable=True).tolist())
    columns = torch.stack(list(by_place.values()), 1).tolist() if length else []
    rows = tuple(
        Word(
            word,
            tuple(columns[i]) if i < length else (),
            float(gate[i]) if gate is not None and i < length else None,
            number == UNKNOWN,
        )
        for i, (word, number) in enumerate(zip(words, predictor.vocabulary.encode(text), strict=True))
    )
    graphs, matrices = {}, {}
    for place, h in states.items():
        real = h[0, :length].double()
        graphs[title(place)] = _graph(words, real, by_place[place], importance, ranked, sorted(chosen[:_GRAPH]))
        matrices[title(place)] = _matrix(words, real, sorted(chosen[:_MATRIX]))
    shown = min(length, 60)
    return Text(
        words=rows,
        places=tuple(map(title, states)),
        positive=float(output.logits.double().softmax(1)[0, 1]),
        ranked=ranked,
        largest=tuple(max(column) for column in zip(*columns, strict=True)),
        distinct=len(chosen),
        outside=len(words) - length,
        graphs=graphs,
        matrices=matrices,
        strip=figures.capacities(words[:shown], {title(p): values[:shown].numpy() for p, values in by_place.items()}),
    )


def _distinct(words: Sequence[str], order: list[int]) -> list[int]:
    """Of a word that a text repeats, the place that comes first in the order."""
    found: dict[str, int] = {}
    for i in order:
        found.setdefault(words[i], i)
    return list(found.values())


def _graph(words: Sequence[str], h: Tensor, own: Tensor, importance: Tensor, ranked: str, chosen: list[int]) -> Drawn:
    gram = (h[chosen] @ h[chosen].T).numpy()
    return drawn.allocation([words[i] for i in chosen], gram, own[chosen].numpy(), importance[chosen].numpy(), ranked)


def _matrix(words: Sequence[str], h: Tensor, chosen: list[int]) -> Drawn:
    """Polysemanticity counts the whole text, as it is defined, not the chosen words alone."""
    polysemanticity = functional.polysemanticity(h, impl="reference")[chosen]
    pairs = functional.interference(h[chosen])
    return drawn.interference([words[i] for i in chosen], pairs.numpy(), polysemanticity.numpy())


def training(run: Path) -> dict[str, Drawn]:
    """Curves of every term, by title."""
    records = RunFolder(run).load_metrics()
    epochs = [record for record in records if record["event"] == "epoch"]
    shown = {}
    terms = {
        "accuracy": "Accuracy",
        "cross_entropy": "Cross-entropy",
        "importance": "Importance term before its weight",
        "interaction": "Interaction term before its weight",
        "gate": "Mean gate of real words",
    }
    for name, name_in_print in terms.items():
        both = {split: figures.series_of(epochs, split, name) for split in ("train", "dev")}
        series = {split: values for split, values in both.items() if values}
        if series:
            shown[name_in_print] = drawn.curves(series, name.replace("_", "-"))
    weighted = {
        name.removesuffix("_weighted").replace("_", "-"): figures.series_of(epochs, "train", name)
        for name in ("cross_entropy", "importance_weighted", "interaction_weighted")
    }
    weighted = {name: values for name, values in weighted.items() if values and min(values.values()) > 0}
    if len(weighted) > 1:
        shown["Every term as weighted in the loss"] = drawn.curves(weighted, "loss", log=True)
    norms = _gradient_norms([record for record in records if record["event"] == "step"])
    if norms:
        shown["Gradient norm of each weighted term"] = drawn.curves(norms, "norm, mean of an epoch", log=True)
    return shown


def _gradient_norms(steps: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """By term the mean of each epoch's logged steps; an epoch may have none."""
    names = ("cross_entropy", "importance_weighted", "interaction_weighted")
    series: dict[str, dict[int, float]] = {}
    for name in names:
        by_epoch: dict[int, list[float]] = {}
        for step in steps:
            if f"gradient_{name}" in step["train"]:
                by_epoch.setdefault(step["epoch"], []).append(step["train"][f"gradient_{name}"])
        means = {epoch: sum(values) / len(values) for epoch, values in sorted(by_epoch.items())}
        if means and min(means.values()) > 0:
            series[name.removesuffix("_weighted").replace("_", "-")] = means
    return series


def deletion(evaluation: Mapping[str, Any]) -> Drawn:
    """Accuracy by k: three rankers and the control, with the intervals over texts."""
    curves = {}
    for name, shown in {
        evaluation["reference"]: "capacity, FFN1",
        "capacity:vmask": "capacity, VMASK",
        "vmask": "VMASK probability",
        "random": "random",
    }.items():
        if name in evaluation["rankers"]:
            by_k = evaluation["rankers"][name]["k"]
            points = [("0", evaluation["accuracy"]), *((k, values["accuracy"]) for k, values in by_k.items())]
            curves[shown] = sorted((float(k), *(100 * value for value in interval)) for k, interval in points)
    return drawn.accuracy_by_k(curves)


@dataclass(frozen=True)
class VocabularyWord:
    word: str
    capacity: float
    gate: float | None


def vocabulary(model: TransformerClassifier, words: Sequence[str]) -> dict[str, list[VocabularyWord]]:
    """Words of highest and lowest capacity, the vocabulary's gated embeddings taken for one dictionary of features.

    Among all its words, those that the gate drops have none; the lowest are taken from those it rather keeps, if any.
    """
    with torch.no_grad():
        x = model.embedding.weight[2:] * model.embedding.embedding_dim**0.5  # padding and the unknown word apart
        gate = None if model.gate is None else model.gate(x)
        h = (x if gate is None else gate.unsqueeze(-1) * x).double()
        # The definition by the feature moment: one W×W matrix over IMDB's vocabulary would take 70 GB.
        squares = (h * h).sum(1) ** 2
        values = squares / ((h @ (h.T @ h)) * h).sum(1).clamp(min=torch.finfo(h.dtype).tiny)
    kept = torch.arange(len(values)) if gate is None else (gate > 0.5).nonzero().squeeze(1)

    def rows(positions: Tensor) -> list[VocabularyWord]:
        return [
            VocabularyWord(words[2 + i], float(values[i]), None if gate is None else float(gate[i]))
            for i in positions.tolist()
        ]

    return {
        "highest": rows(values.argsort(descending=True, stable=True)[:_WORDS]),
        "lowest": rows(kept[values[kept].argsort(stable=True)[:_WORDS]]),
    }
