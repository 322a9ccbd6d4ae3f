"""A run evaluated: every ranker of its model, measured by deletion on the test split."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from safr_fast.data.corpus import Split
from safr_fast.evaluation import deletion
from safr_fast.evaluation.config import EvaluationConfig
from safr_fast.evaluation.normalised_aopc import aopc, limits, normalised
from safr_fast.evaluation.predictor import Predictor
from safr_fast.evaluation.rankers import GRADIENT_RANKERS, Scores, score
from safr_fast.evaluation.statistics import bootstrap, paired_test
from safr_fast.training import load_run
from safr_fast.training.errors import OptionError, RunError
from safr_fast.training.loop import corpus_of_run
from safr_fast.training.run import RunFolder, write_json
from safr_fast.training.settings import choose_device

FILE = "evaluation.json"
RANDOM = "random"
REFERENCE = "ffn1_pre"
"""The place whose capacity reproduces the paper's SRS, in the last layer: what the other rankers are tested against."""
IMPORTANT = 30
"""Per cent of a text's words, by VMASK's probability, that Table 3 calls important."""
_SHORT = 24

Item = TypeVar("Item")


def evaluate_run(
    run: str | Path,
    config: EvaluationConfig | None = None,
    *,
    data_dir: str | Path | None = None,
    device: str = "auto",
    file: str = FILE,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate a run on its test split, and write the result into its folder.

    ``report`` takes what a reader should know of the data, and of an evaluation that is about to be replaced.

    Raises:
        RunError: no such run, one without a finished epoch, no right to write into its folder, or data whose training
            words are not its own.
        DataUnavailable: the run's data set is not where it was; give ``data_dir``.
        ModuleNotFoundError: gradients are asked for and captum is not installed.
    """
    config = config or EvaluationConfig()
    model, vocabulary, trained = load_run(run)
    if not os.access(run, os.W_OK):
        raise RunError(f"{run} takes no {file}, it cannot be written to: evaluate a copy of the folder")
    weights = RunFolder(Path(run)).digest()
    model = model.to(choose_device(device))
    corpus = corpus_of_run(run, trained, data_dir)
    split = _drawn(corpus.test, config)
    predictor = Predictor(model, vocabulary, trained)
    if config.rankers:  # a name that is asked for in vain is said before the work
        _check_rankers(config, score(model, predictor.encode(split.texts[:1]), gradients=config.gradients))
    for line in filter(None, (corpus.note, _replaced(Path(run), file, config))):
        report(line)
    scores = score(model, predictor.encode(split.texts), gradients=config.gradients, progress=_bar("scores"))
    result = {
        "config": config.to_json(),
        "weights": weights,
        "run": {name: value for name, value in trained.to_json().items() if name not in ("data_dir", "out")},
        **evaluate_scores(predictor, split, scores, config),
    }
    write_json(Path(run) / file, result)
    return result


def _replaced(run: Path, file: str, config: EvaluationConfig) -> str:
    """The line about an evaluation that is about to be lost; empty where it was made as this one will be."""
    try:
        stored = RunFolder(run).load_evaluation(file)
    except RunError:
        return f"will replace {run / file}, which is damaged"
    if stored is None or stored["config"] == config.to_json():
        return ""
    how = config.differs(stored["config"]) or "options of another version"
    return f"will replace {run / file}, which was made with {how}"


def evaluate_scores(
    predict: deletion.Predict, split: Split, scores: Scores, config: EvaluationConfig
) -> dict[str, Any]:
    """Everything that :func:`safr_fast.evaluation.measure` gives, as means over texts with bootstrap intervals.

    Args:
        predict: class probabilities ``(texts, classes)`` of texts, each a list of words. It batches them itself.
        split: N texts, as strings, and their labels.
        scores: by ranker, for each text a tensor of the scores of its first words, of as many for every ranker. Of
            those named ``capacity:...`` the average is given too; random deletion is added.
        config: k, draws of random deletion, sufficiency, the number of short texts for normalised AOPC, the seed.

    Returns:
        Plain values, for JSON; ``[mean, low, high]`` where they are means over texts. ``accuracy`` of whole texts,
        ``predicted_positive``, ``capacity`` by place and importance. ``rankers``: by name and ``k``, ``accuracy`` of
        the rest, ``srs``, ``comprehensiveness``, ``sufficiency``, ``log_odds`` and p of paired tests; and the means
        over all k, ``aopc_comprehensiveness`` and ``aopc_sufficiency``. ``normalised_aopc``: by ranker, of deleting
        one word after another.

    Raises:
        OptionError: ``config`` names a ranker that is not among ``scores``.
        TypeError, ValueError: as :func:`safr_fast.evaluation.measure`; rankers score different numbers of words, or
            one is named as the control.
    """
    texts = [text.split() for text in split.texts]
    labels = torch.tensor(split.labels)
    if not scores:
        raise ValueError("scores must hold those of at least one ranker, by name, got none")
    if taken := [name for name in scores if name == RANDOM or name.startswith(f"{RANDOM}/")]:
        raise ValueError(
            f"scores must not be named {RANDOM} or {RANDOM}/..., as the control is, got {taken[0]!r}: rename it"
        )
    lengths = next(iter(scores.values()))
    _check_rankers(config, scores)
    _check_lengths(scores)
    places = scores
    scores = {name: scores[name] for name in config.rankers or scores}
    draws = {f"{RANDOM}/{i}": deletion.random_scores(lengths, config.seed * 1_000 + i) for i in range(config.draws)}
    measured = deletion.measure(
        predict, texts, labels, scores | draws, config.k, sufficiency=config.sufficiency, progress=_bar("deletion")
    )
    measured = {name: {k: _with_positive(values) for k, values in by_k.items()} for name, by_k in measured.items()}
    control = [measured.pop(name) for name in draws]
    measured[RANDOM] = {k: _mean_of_draws([draw[k] for draw in control]) for k in config.k}
    whole = deletion.probabilities_of(predict, texts).argmax(1)
    return {
        "texts": len(texts),
        "one_word_texts": sum(len(words) == 1 for words in texts),
        **_with_interval({"accuracy": (whole == labels).double()}, config.seed),
        "predicted_positive": (whole == 1).double().mean().item(),
        "capacity": average_capacity(places),
        "reference": reference(measured),
        "rankers": {name: _of_ranker(by_k, measured, config) for name, by_k in measured.items()},
        "normalised_aopc": _normalised(predict, texts, scores | draws, config),
    }


def _check_rankers(config: EvaluationConfig, scores: Scores) -> None:
    unknown = set(config.rankers) - set(scores)
    if unknown:
        remedy = "" if config.gradients or not unknown <= set(GRADIENT_RANKERS) else ": give --gradients too"
        raise OptionError(f"rankers must be among {', '.join(scores)}, got {', '.join(sorted(unknown))}{remedy}")


def _check_lengths(scores: Scores) -> None:
    first, rows = next(iter(scores.items()))
    for name, others in scores.items():
        if [len(row) for row in others] != [len(row) for row in rows]:
            raise ValueError(f"scores[{name!r}] must score as many words of each text as scores[{first!r}]")


def reference(rankers: Iterable[str]) -> str:
    """The one among them that the others are tested against."""
    layers = [name for name in rankers if name.endswith(REFERENCE)]
    return max(layers, key=lambda name: (len(name), name), default=RANDOM)  # layer10 after layer9


def average_capacity(scores: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, float]]:
    """Mean capacity over all tokens, and over the important and the less important of each text, by place (Table 3)."""
    places = {name.removeprefix("capacity:"): rows for name, rows in scores.items() if name.startswith("capacity:")}
    averages = {place: {"all": torch.cat(list(rows)).mean().item()} for place, rows in places.items()}
    if "vmask" in scores:
        chosen = []
        for gate in scores["vmask"]:
            important = torch.zeros(len(gate), dtype=torch.bool)
            important[deletion.order(gate)[: max(1, int(IMPORTANT * len(gate) / 100))]] = True
            chosen.append(important)
        important = torch.cat(chosen)
        for place, rows in places.items():
            values = torch.cat(list(rows))
            averages[place]["important"] = values[important].mean().item()
            if not important.all():
                averages[place]["less"] = values[~important].mean().item()
    return averages


def _with_positive(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The measures with ``positive``, 1 where class 1 is predicted for the rest, for the class itself."""
    kept = {name: value for name, value in values.items() if name != "predicted"}
    return kept | {"positive": (values["predicted"] == 1).double()}


def _mean_of_draws(draws: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([draw[name] for draw in draws]).mean(0) for name in draws[0]}


def _of_ranker(
    by_k: Mapping[float, Mapping[str, Tensor]],
    measured: Mapping[str, Mapping[float, Mapping[str, Tensor]]],
    config: EvaluationConfig,
) -> dict[str, Any]:
    result: dict[str, Any] = {"k": {}}
    against = measured[reference(measured)]
    for k, values in by_k.items():
        shown = {name: value for name, value in values.items() if name != "positive"}
        shown["accuracy"] = shown.pop("correct")
        result["k"][f"{k:g}"] = {
            **_with_interval(shown, config.seed),
            "predicted_positive": values["positive"].mean().item(),
            "p_against_reference": paired_test(values["correct"], against[k]["correct"], seed=config.seed),
            "p_against_random": paired_test(values["correct"], measured[RANDOM][k]["correct"], seed=config.seed),
        }
    for name in ("comprehensiveness", "sufficiency"):
        if name in next(iter(by_k.values())):
            mean = torch.stack([values[name] for values in by_k.values()]).mean(0)
            result |= _with_interval({f"aopc_{name}": mean}, config.seed)
    return result


def _with_interval(values: Mapping[str, Tensor], seed: int) -> dict[str, list[float]]:
    """By name ``[mean, low, high]`` over texts, by bootstrap."""
    stacked = torch.stack(list(values.values()), 1)  # (N, names)
    low, high = bootstrap(stacked, seed=seed)
    columns = zip(stacked.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: list(column) for name, column in zip(values, columns, strict=True)}


def _normalised(
    predict: deletion.Predict, texts: Sequence[deletion.Words], scores: Scores, config: EvaluationConfig
) -> dict[str, Any]:
    """By ranker the mean over a sample of short texts, with its interval; empty where none was asked for."""
    lengths = [len(row) for row in next(iter(scores.values()))]
    short = [i for i, words in enumerate(texts) if 2 <= len(words) <= _SHORT and lengths[i]]
    rows = sorted(Random(config.seed).sample(short, min(config.normalised, len(short))))
    if not rows:
        return {}
    values: dict[str, list[float]] = {name: [] for name in scores}
    for i in tqdm(rows, "AOPC limits", leave=False, unit="text", disable=None):
        low, high = limits(predict, texts[i], lengths[i])
        for name in scores:
            values[name].append(normalised(aopc(predict, texts[i], scores[name][i]), low, high))
    columns = {name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()}
    drawn = [columns.pop(name) for name in list(columns) if name.startswith(f"{RANDOM}/")]
    columns[RANDOM] = torch.stack(drawn).mean(0)
    return {"texts": len(rows), "longest": _SHORT, "rankers": _with_interval(columns, config.seed)}


def _drawn(split: Split, config: EvaluationConfig) -> Split:
    if config.texts is None or config.texts >= len(split):
        return split
    rows = sorted(Random(config.seed).sample(range(len(split)), config.texts))
    return Split([split.texts[i] for i in rows], [split.labels[i] for i in rows])


def _bar(name: str) -> Any:
    def bar(items: Sequence[Item]) -> Iterator[Item]:
        yield from tqdm(items, name, leave=False, disable=None)

    return bar
