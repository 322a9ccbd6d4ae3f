"""The page of a run: one file of HTML that needs no network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from safr_fast.data.corpus import Split
from safr_fast.evaluation.places import title
from safr_fast.evaluation.predictor import Predictor
from safr_fast.evaluation.run import FILE as EVALUATION
from safr_fast.evaluation.table import ranker_title
from safr_fast.nn import TransformerClassifier
from safr_fast.report import content, figures
from safr_fast.report.drawn import Drawn
from safr_fast.training import TrainConfig, load_run
from safr_fast.training.errors import OptionError
from safr_fast.training.loop import corpus_of_run
from safr_fast.training.protocol import PROTOCOLS
from safr_fast.training.run import RunFolder, write_atomically

FILE = "report.html"
FIGURES = "figures"
_START = title("ffn1_pre")


@dataclass(frozen=True)
class Report:
    """The page, and its figures for papers."""

    page: Path
    figures: Path


def report_run(run: str | Path, texts: Sequence[str] = (), *, data_dir: str | Path | None = None) -> Report:
    """Write ``report.html`` into a run's folder, and each figure as SVG into its folder ``figures``.

    Args:
        run: the run's folder; what :func:`safr_fast.evaluation.evaluate_run` left there is shown too.
        texts: texts to look into; if none, one of each class from the test split.
        data_dir: where the data set is, if no longer where the run was trained from.

    Raises:
        RunError: no such run, one without a finished epoch, or data whose training words are not its own.
        OptionError: a text without words.
        DataUnavailable: no text is given, and the data set is not there to take one from.
    """
    run = Path(run)
    if not all(text.split() for text in texts):
        raise OptionError(f"text must hold words, got {next(text for text in texts if not text.split())!r}")
    model, vocabulary, config = load_run(run)
    predictor = Predictor(model, vocabulary, config)
    if not texts:
        texts = _examples(corpus_of_run(run, config, data_dir).test)
    looked_into = [content.of_text(model, predictor, text) for text in texts]
    evaluation = RunFolder(run).load_evaluation(EVALUATION)
    outdated = evaluation is not None and evaluation.get("weights") != RunFolder(run).digest()
    if outdated:
        evaluation = None
    images: dict[str, bytes] = {}
    plots: dict[str, go.Figure] = {}

    def place(name: str, figure: Drawn) -> str:
        """Keeps both forms of a figure; gives the id of the element that the page draws it in."""
        name = _file_name(name)
        images[name], plots[name] = figures.svg(figure.paper), figure.page
        return name

    def each(prefix: str, named: dict[str, Drawn]) -> dict[str, str]:
        return {name: place(f"{prefix}-{name}", figure) for name, figure in named.items()}

    shown = []
    for i, text in enumerate(looked_into, 1):
        images[f"text{i}-capacity"] = figures.svg(text.strip)
        shown.append(
            {
                "words": text.words,
                "places": text.places,
                "positive": text.positive,
                "ranked": text.ranked,
                "largest": text.largest,
                "outside": text.outside,
                "unknown": sum(word.unknown for word in text.words),
                "distinct": text.distinct,
                "repeated": text.distinct < len(text.words) - text.outside,
                "graphs": each(f"text{i}-allocation", text.graphs),
                "matrices": each(f"text{i}-interference", text.matrices),
            }
        )
    page = _template().render(
        heading=f"SAFR: {run.resolve().name}",
        facts=_facts(model, config, run),
        texts=shown,
        start=next(name for name in reversed(looked_into[0].places) if name.endswith(_START)),
        evaluation=evaluation,
        outdated=outdated,
        k=_nearest_30(evaluation),
        deletion=place("deletion", content.deletion(evaluation)) if evaluation else None,
        training=each("training", content.training(run)),
        vocabulary=content.vocabulary(model, vocabulary.words),
        gated=model.gate is not None,
        plots=_json(plots),
        library=get_plotlyjs(),
        title=title,
        ranker_title=ranker_title,
        capacity=_capacity,
        folder=FIGURES,
    )
    result = Report(run / FILE, run / FIGURES)
    write_atomically(result.page, lambda file: file.write_text(page, encoding="utf-8"))
    result.figures.mkdir(exist_ok=True)
    for pattern in ("text*-*.svg", "training-*.svg", "deletion.svg"):
        for stale in result.figures.glob(pattern):
            stale.unlink()
    for name, image in images.items():
        (result.figures / f"{name}.svg").write_bytes(image)
    return result


def _template() -> jinja2.Template:
    source = files("safr_fast.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source)


def _json(plots: dict[str, go.Figure]) -> str:
    """Data and layout by id, as it can stand in a script element."""
    parts = (f"{json.dumps(name)}: {figure.to_json()}" for name, figure in plots.items())
    return "{" + ",\n".join(parts).replace("<", "\\u003c") + "}"


def _capacity(value: float) -> str:
    """Two digits behind the point, or the one that counts of less."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}" if value else "0"


def _facts(model: TransformerClassifier, config: TrainConfig, run: Path) -> str:
    parts = [
        config.dataset,
        f"protocol {config.protocol}",
        "VMASK" if model.gate is not None else "no VMASK",
        f"λ importance {config.lambda_importance:g}, interaction {config.lambda_interaction:g} ({config.variant})",
        f"seed {config.seed}",
    ]
    summary = RunFolder(run).load_summary()
    if summary is not None:
        tested = summary.epochs if PROTOCOLS[config.protocol].tests_last_epoch else summary.best_epoch
        accuracy = 100 * summary.test["accuracy"]
        parts.append(f"test accuracy {accuracy:.2f} %, of epoch {tested} of {summary.epochs}")
    return ", ".join(parts)


def _examples(split: Split) -> list[str]:
    """The first text of each class that is neither very short nor long."""
    found: dict[int, str] = {}
    for low, high in ((10, 25), (1, 10**9)):
        for text, label in zip(split.texts, split.labels, strict=True):
            if low <= len(text.split()) <= high:
                found.setdefault(label, text)
    return [found[label] for label in sorted(found)]


def _nearest_30(evaluation: dict[str, Any] | None) -> str | None:
    if evaluation is None:
        return None
    return f"{min(evaluation['config']['k'], key=lambda k: abs(k - 30)):g}"


def _file_name(name: str) -> str:
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in name).lower().split())
