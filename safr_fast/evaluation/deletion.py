"""Words taken out of a text by their scores, and what the predictions for the rest say of the scores.

Everything here works on any ``predict``: a function from texts, each a sequence of words, to class probabilities
``(texts, classes)``. A text may be longer than its scores: a model that reads the first T words scores those alone,
words are chosen among them, and once they are gone later words slide into the model's window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Words = Sequence[str]
Predict = Callable[[Sequence[Words]], Tensor]
Progress = Callable[[Sequence[range]], Iterator[range]]

_CHUNK = 256


def count(words: int, scored: int, k: float) -> int:
    """How many words deleting k % takes: ``max(1, ⌊k · scored / 100⌋)``, but never the last word of a text."""
    return max(0, min(max(1, int(round(k * scored / 100, 9))), words - 1))


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
    labels: Tensor,
    scores: Mapping[str, Sequence[Tensor]],
    ks: Sequence[float],
    *,
    sufficiency: bool = True,
    progress: Progress = iter,
) -> dict[str, dict[float, dict[str, Tensor]]]:
    """What deletion does to each text, for every ranker and every k.

    Args:
        predict: class probabilities of texts.
        texts: N texts, as words.
        labels: ``(N,)`` true classes.
        scores: by ranker, for each text the scores of its first words; the highest are deleted first.
        ks: per cents to delete.
        sufficiency: also predict the deleted words alone.
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
    if any(not 0 < k <= 100 for k in ks):
        raise ValueError(f"k must be above 0 and at most 100 per cent, got {list(ks)}")
    if len(set(ks)) < len(ks):
        raise ValueError(f"k must name each per cent once, got {list(ks)}")
    _check(texts, labels, scores)
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
        predictions = iter(_probabilities(predict, variants).split(len(rows)))
        whole.append(next(predictions))
        for name in scores:
            for k in ks:
                rest = next(predictions)
                parts[name][k].append(torch.stack([rest, next(predictions)] if sufficiency else [rest]))
    probabilities = torch.cat(whole)  # (N, classes)
    return {name: {k: _measures(probabilities, torch.cat(parts[name][k], 1), labels) for k in ks} for name in scores}


def _check(texts: Sequence[Words], labels: Tensor, scores: Mapping[str, Sequence[Tensor]]) -> None:
    if any(isinstance(text, str) for text in texts):
        raise TypeError("texts must be sequences of words, got a string: pass text.split()")
    if not isinstance(labels, Tensor) or labels.shape != (len(texts),):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor of shape ({len(texts)},), one for each text, got {got}")
    for name, rows in scores.items():
        if len(rows) != len(texts):
            raise ValueError(f"scores[{name!r}] must hold a row for each of {len(texts)} texts, got {len(rows)}")
        for i, (row, words) in enumerate(zip(rows, texts, strict=True)):
            if len(row) > len(words):
                raise ValueError(
                    f"scores[{name!r}][{i}] must score at most the text's {len(words)} words, got {len(row)}"
                )
        if rows and torch.cat(list(rows)).isnan().any():
            raise ValueError(f"scores[{name!r}] must be numbers, got NaN")


def _probabilities(predict: Predict, texts: Sequence[Words]) -> Tensor:
    """float64 ``(texts, classes)`` on the CPU."""
    p = predict(texts).double().cpu()
    if p.dim() != 2 or len(p) != len(texts) or not torch.allclose(p.sum(1), torch.ones(len(p)).double(), atol=1e-3):
        raise ValueError(
            f"predict must give class probabilities ({len(texts)}, classes), each row summing to 1, got shape "
            f"{tuple(p.shape)}: of scores take softmax(1)"
        )
    return p


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
