"""Words taken out of a text by their scores, and what the predictions for the rest say of the scores.

Everything here works on any ``predict``: a function from texts, each a sequence of words, to class probabilities
``(texts, classes)``. A text may be longer than its scores: a model that reads the first T words scores those alone,
k % of all its words are chosen among them, and once they are gone later words slide into the model's window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from safr_fast.arguments import describe
from safr_fast.evaluation.config import wrong_ks

Words = Sequence[str]
Predict = Callable[[Sequence[Words]], Tensor]
Progress = Callable[[Sequence[range]], Iterator[range]]

_CHUNK = 256


def count(words: int, scored: int, k: float) -> int:
    """How many words deleting k % takes: ``max(1, ⌊k · words / 100⌋)`` of the scored ones, never a text's last word."""
    return max(0, min(max(1, int(round(k * words / 100, 9))), scored, words - 1))


def order(scores: Tensor) -> list[int]:
    """Positions by falling score; equal scores by position."""
    return scores.argsort(descending=True, stable=True).tolist()


def without(words: Words, positions: Sequence[int]) -> list[str]:
    """The text that is left when these are taken out."""
    gone = set(positions)
    return [word for i, word in enumerate(words) if i not in gone]


def alone(words: Words, positions: Sequence[int]) -> list[str]:
    """The text of these words alone, in their order."""
    return [words[i] for i in sorted(positions)]


def random_scores(scores: Sequence[Tensor], seed: int) -> list[Tensor]:
    """One draw of the control: a score for every word that has one, in random order."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(len(row), generator=generator) for row in scores]


def measure(
    predict: Predict,
    texts: Sequence[Words],
    labels: Tensor | Sequence[int],
    scores: Mapping[str, Sequence[Tensor | Sequence[float]]],
    ks: Sequence[float],
    *,
    sufficiency: bool = True,
    batch_size: int | None = None,
    progress: Progress = iter,
) -> dict[str, dict[float, dict[str, Tensor]]]:
    """What deletion does to each text, for every ranker and every k.

    Args:
        predict: class probabilities ``(texts, classes)`` of texts.
        texts: N texts, as words.
        labels: ``(N,)`` true classes, from 0.
        scores: by ranker, for each text the scores of its first words; the highest are deleted first.
        ks: per cents to delete: 30, not 0.3.
        sufficiency: also predict the deleted words alone.
        batch_size: most texts in a call of ``predict``. If None, all variants of 256 texts at once, which are
            thousands: for a ``predict`` that batches them itself.
        progress: wraps the chunks of texts, for a progress bar.

    Returns:
        By ranker and k, float64 ``(N,)`` for each measure; ŷ is the class predicted for the whole text:

        * ``"correct"``: 1 where the rest is still classified as labelled.
        * ``"srs"``: correct on the whole text − ``"correct"``. Its mean is the paper's SRS, over 100.
        * ``"predicted"``: the class predicted for the rest.
        * ``"comprehensiveness"``: p(ŷ | text) − p(ŷ | rest).
        * ``"sufficiency"``: p(ŷ | text) − p(ŷ | deleted words alone).
        * ``"log_odds"``: log p(ŷ | rest) − log p(ŷ | text).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or length, by name; ``predict`` gives no
            probabilities.

    Source: SAFR section 4 (arXiv 2501.16374); DeYoung et al. 2020, *ERASER*; Chen & Ji 2020 for the log-odds.
    """
    _check_ks(ks)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for no limit, got {batch_size}")
    labels, scores = _checked(texts, labels, scores)
    parts: dict[str, dict[float, list[Tensor]]] = {name: {k: [] for k in ks} for name in scores}
    whole = []
    for rows in progress([range(i, min(i + _CHUNK, len(texts))) for i in range(0, len(texts), _CHUNK)]):
        variants: list[Words] = [texts[i] for i in rows]
        for name in scores:
            orders = {i: order(scores[name][i]) for i in rows}
            for k in ks:
                chosen = {i: orders[i][: count(len(texts[i]), len(orders[i]), k)] for i in rows}
                variants += [without(texts[i], chosen[i]) for i in rows]
                if sufficiency:
                    variants += [alone(texts[i], chosen[i]) or texts[i] for i in rows]
        predictions = iter(probabilities_of(predict, variants, batch_size).split(len(rows)))
        whole.append(next(predictions))
        for name in scores:
            for k in ks:
                rest = next(predictions)
                parts[name][k].append(torch.stack([rest, next(predictions)] if sufficiency else [rest]))
    probabilities = torch.cat(whole)  # (N, classes)
    classes = probabilities.shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be among the {classes} classes of predict, from 0, got {labels.unique().tolist()}"
        )
    return {name: {k: _measures(probabilities, torch.cat(parts[name][k], 1), labels) for k in ks} for name in scores}


def _check_ks(ks: Sequence[float]) -> None:
    if not isinstance(ks, Sequence):
        raise TypeError(f"ks must be a list of per cents, got {describe(ks)}")
    if wrong := wrong_ks(ks):
        raise ValueError(wrong)


def _checked(
    texts: Sequence[Words], labels: Tensor | Sequence[int], scores: Mapping[str, Sequence[Tensor | Sequence[float]]]
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Labels and scores as tensors on the CPU."""
    if not len(texts):
        raise ValueError("texts must hold at least one text, got none")
    if any(isinstance(text, str) for text in texts):
        raise TypeError("texts must be sequences of words, got a string: pass text.split()")
    classes = _tensor("labels", labels)
    if classes.shape != (len(texts),):
        raise ValueError(f"labels must have shape ({len(texts)},), one for each text, got {tuple(classes.shape)}")
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise TypeError(f"labels must be the numbers of classes, whole, got {describe(classes)}: pass labels.long()")
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be by the rankers' names, such as {{'vmask': [...]}}, got {describe(scores)}")
    by_ranker = {}
    for name, rows in scores.items():
        if len(rows) != len(texts):
            raise ValueError(f"scores[{name!r}] must hold a row for each of {len(texts)} texts, got {len(rows)}")
        both = zip(rows, texts, strict=True)
        by_ranker[name] = [checked_row(f"scores[{name!r}][{i}]", row, words) for i, (row, words) in enumerate(both)]
    return classes, by_ranker


def checked_row(name: str, scores: Tensor | Sequence[float], words: Words) -> Tensor:
    """Scores of a text's first words, as a tensor on the CPU."""
    row = _tensor(name, scores)
    if row.dim() != 1 or len(row) > len(words):
        raise ValueError(f"{name} must score at most the text's {len(words)} words, got {tuple(row.shape)}")
    if row.isnan().any():
        raise ValueError(f"{name} must be numbers, got NaN")
    return row


def _tensor(name: str, values: object) -> Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers, got {describe(values)} ({error})") from None


def probabilities_of(predict: Predict, texts: Sequence[Words], batch_size: int | None = None) -> Tensor:
    """float64 ``(texts, classes)`` on the CPU."""
    size = batch_size or max(len(texts), 1)
    given = [_tensor("predict's result", predict(texts[i : i + size])) for i in range(0, len(texts), size)]
    p = torch.cat(given).double()
    sums = p.sum(-1)
    # In 16 bits a softmax comes to 1 only about.
    slack = max([1e-3, *(4 * torch.finfo(x.dtype).eps for x in given if x.is_floating_point())])
    if p.dim() != 2 or len(p) != len(texts) or not ((sums - 1).abs() <= slack).all():
        worst = "" if p.dim() != 2 else f", sums from {sums.min():.4g} to {sums.max():.4g}"
        raise ValueError(
            f"predict must give class probabilities ({len(texts)}, classes), each row summing to 1, got shape "
            f"{tuple(p.shape)}{worst}: of scores take softmax(1)"
        )
    return p / sums.unsqueeze(1) if slack > 1e-3 else p


def _measures(whole: Tensor, variants: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``variants``: predictions for the rest and, where they were made, for the deleted words alone."""
    rest = variants[0]
    predicted = whole.argmax(1, keepdim=True)  # (N, 1)
    before, after = (p.gather(1, predicted).squeeze(1) for p in (whole, rest))  # (N,)
    correct = (rest.argmax(1) == labels).double()
    tiny = torch.finfo(torch.float64).tiny
    measures = {
        "correct": correct,
        "srs": (whole.argmax(1) == labels).double() - correct,
        "predicted": rest.argmax(1).double(),
        "comprehensiveness": before - after,
        "log_odds": after.clamp(min=tiny).log() - before.clamp(min=tiny).log(),
    }
    if len(variants) > 1:
        measures["sufficiency"] = before - variants[1].gather(1, predicted).squeeze(1)
    return measures
