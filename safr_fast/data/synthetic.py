"""Generated reviews whose label follows from planted words by a known rule.

A review is a shuffled row of clauses. Each opinion clause plants one sentiment word; three in ten are turned round by a
negator before them ("not good"), and the two are a planted pair. All else is filler, which says nothing of the label.
With polarity ±1 for a sentiment word,

    score = Σ over opinions of  polarity · (−1 if negated),        label = 1 if score > 0 else 0

The opinions of one review agree in sign, so that no word decides where there is a negator, but a pair does. Lengths are
log-normal: filler is added until the review has at least exp(N(log 12, 0.6²)) tokens, about 200 at most.
"""

import math
from random import Random

from safr_fast.data.corpus import Corpus, Split, Truth


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POSITIVE = _words("good great lovely superb moving funny charming clever brilliant warm fresh gripping tender witty")
NEGATIVE = _words("bad awful dull boring clumsy stale tedious bland shallow messy annoying lifeless dreary hollow")
NEGATORS = _words("not never hardly")

_ASPECTS = _words(
    "acting story plot music script camerawork dialogue ending cast direction humour pacing opening scenery"
)
_VERBS = _words("was seemed felt looked remained sounded")
_FILLERS = (
    "{who} watched it {when} {where}",
    "the film runs for {number} minutes",
    "it was shot {where} by a crew of {number}",
    "{who} had read the {source} before",
    "the screening {when} was half empty",
    "the second part takes place {where}",
    "{who} talked about the {source} {when}",
    "there is a scene {where} with {number} people",
)
_SLOTS = {
    "who": ["we", "my sister", "they", "our neighbours", "the critics", "two friends", "a colleague", "the students"],
    "when": ["on sunday", "last night", "in april", "after work", "before dinner", "twice", "again", "this week"],
    "where": ["in a small town", "at home", "near the sea", "in the city", "on a train", "by the river", "in a school"],
    "number": ["ninety", "forty", "twelve", "three", "a hundred", "sixty", "eleven", "seven"],
    "source": ["novel", "play", "comic", "article", "trailer", "memoir", "interview", "series"],
}

_SIZES = {"train": 8_000, "dev": 1_000, "test": 2_000}
_OPINIONS = {1: 0.5, 2: 0.35, 3: 0.15}
_NEGATED = 0.3
_LONGEST = 200

Clause = tuple[list[str], list[str]]
"""Words, and the role of each."""


def synthetic(seed: int = 0, sizes: dict[str, int] | None = None) -> Corpus:
    """The corpus of one seed. ``sizes``: reviews in ``train``, ``dev`` and ``test``; 8,000, 1,000 and 2,000 if None."""
    splits = {}
    for split, size in (sizes or _SIZES).items():
        random = Random(f"{seed}/{split}")
        reviews = [_review(random) for _ in range(size)]
        texts, labels, truth = zip(*reviews, strict=True) if reviews else ((), (), ())
        splits[split] = Split(texts, labels, truth)
    return Corpus("synthetic", splits["train"], splits["dev"], splits["test"])


def score(text: str, truth: Truth) -> int:
    """What the planted words of a review add up to; its sign is the label."""
    words = text.split()
    negated = {sentiment for _, sentiment in truth.pairs}
    return sum(
        (1 if words[i] in POSITIVE else -1) * (-1 if i in negated else 1)
        for i, role in enumerate(truth.roles)
        if role == "sentiment"
    )


def _review(random: Random) -> tuple[str, int, Truth]:
    label = random.randrange(2)
    count = random.choices(tuple(_OPINIONS), tuple(_OPINIONS.values()))[0]
    clauses = [_opinion(random, bool(label)) for _ in range(count)]
    length = sum(len(words) + 1 for words, _ in clauses)
    target = min(_LONGEST, random.lognormvariate(math.log(12), 0.6))
    while length < target:
        clauses.append(_filler(random))
        length += len(clauses[-1][0]) + 1
    random.shuffle(clauses)

    tokens: list[str] = []
    roles: list[str] = []
    for words, clause_roles in clauses:
        tokens += [*words, random.choice((",", "and", ";"))]
        roles += [*clause_roles, "filler"]
    tokens[-1] = "."
    pairs = tuple((i, i + 1) for i, role in enumerate(roles) if role == "negator")
    return " ".join(tokens), label, Truth(tuple(roles), pairs)


def _opinion(random: Random, positive: bool) -> Clause:
    words = ["the", random.choice(_ASPECTS), random.choice(_VERBS)]
    roles = ["filler"] * 3
    negated = random.random() < _NEGATED
    if negated:
        words.append(random.choice(NEGATORS))
        roles.append("negator")
    words.append(random.choice(POSITIVE if positive != negated else NEGATIVE))
    roles.append("sentiment")
    return words, roles


def _filler(random: Random) -> Clause:
    slots = {slot: random.choice(choices) for slot, choices in _SLOTS.items()}
    words = random.choice(_FILLERS).format_map(slots).split()
    return words, ["filler"] * len(words)
