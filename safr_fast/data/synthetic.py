"""Generated reviews whose label follows from planted words by a known rule.

A review is a shuffled row of clauses. Each opinion clause plants one sentiment word, which may be preceded by a negator
("not good") or an intensifier ("very good"); the modifier and its sentiment word are a planted pair. All else is
filler, which says nothing of the label. With polarity ±1 for a sentiment word,

    score = Σ over opinions of  polarity · (−1 if negated) · (2 if intensified),        label = 1 if score > 0 else 0

and a review whose score is 0 is drawn again. Lengths are log-normal: filler is added until the review has at least
exp(N(log 18, 0.6²)) tokens, 200 at most.
"""

import math
from random import Random

from safr_fast.data.corpus import Corpus, Split, Truth


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POSITIVE = _words("""
    good great lovely superb moving funny charming clever brilliant warm fresh gripping honest tender witty stunning
    graceful thrilling inspired joyful touching vivid sharp delightful heartfelt masterful radiant sincere elegant rich
""")
NEGATIVE = _words("""
    bad awful dull boring clumsy stale tedious bland weak shallow messy annoying lifeless sloppy dreary predictable
    hollow pointless crude tiresome flat silly ugly forced muddled lazy cold pretentious painful confused
""")
NEGATORS = _words("not never hardly scarcely")
INTENSIFIERS = _words("very truly extremely remarkably")

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

_SIZES = {"train": 6_000, "dev": 1_000, "test": 2_000}
_NEGATED, _INTENSIFIED = 0.3, 0.25
_LONGEST = 200

Clause = tuple[list[str], list[str], int]
"""Words, the role of each, and the score of the opinion (0 for filler)."""


def synthetic(seed: int = 0, sizes: dict[str, int] | None = None) -> Corpus:
    """The corpus of one seed. ``sizes``: reviews in ``train``, ``dev`` and ``test``; 6,000, 1,000 and 2,000 if None."""
    splits = {}
    for split, size in (sizes or _SIZES).items():
        random = Random(f"{seed}/{split}")
        reviews = [_review(random) for _ in range(size)]
        texts, labels, truth = zip(*reviews, strict=True) if reviews else ((), (), ())
        splits[split] = Split(texts, labels, truth)
    return Corpus("synthetic", splits["train"], splits["dev"], splits["test"])


def score(text: str, truth: Truth) -> int:
    """The score that the planted words of a review add up to; its sign is the label."""
    words = text.split()
    total = {i: 1 if words[i] in POSITIVE else -1 for i, role in enumerate(truth.roles) if role == "sentiment"}
    for modifier, sentiment in truth.pairs:
        total[sentiment] *= -1 if truth.roles[modifier] == "negator" else 2
    return sum(total.values())


def _review(random: Random) -> tuple[str, int, Truth]:
    opinions: list[Clause] = []
    while sum(points for *_, points in opinions) == 0:
        opinions = [_opinion(random) for _ in range(random.choices((1, 2, 3), (0.4, 0.35, 0.25))[0])]
    clauses, length = opinions, sum(len(words) + 1 for words, *_ in opinions)
    target = min(_LONGEST - 10, random.lognormvariate(math.log(18), 0.6))
    while length < target:
        clauses.append(_filler(random))
        length += len(clauses[-1][0]) + 1
    random.shuffle(clauses)

    tokens: list[str] = []
    roles: list[str] = []
    pairs: list[tuple[int, int]] = []
    for words, clause_roles, _ in clauses:
        if clause_roles[-2] != "filler":
            pairs.append((len(tokens) + len(words) - 2, len(tokens) + len(words) - 1))
        tokens += [*words, random.choice((",", "and", ";"))]
        roles += [*clause_roles, "filler"]
    tokens[-1] = "."
    label = int(sum(points for *_, points in clauses) > 0)
    return " ".join(tokens), label, Truth(tuple(roles), tuple(pairs))


def _opinion(random: Random) -> Clause:
    words = ["the", random.choice(_ASPECTS), random.choice(_VERBS)]
    roles = ["filler"] * 3
    points = random.choice((1, -1))
    kind = random.random()
    if kind < _NEGATED:
        words.append(random.choice(NEGATORS))
        roles.append("negator")
        factor = -1
    elif kind < _NEGATED + _INTENSIFIED:
        words.append(random.choice(INTENSIFIERS))
        roles.append("intensifier")
        factor = 2
    else:
        factor = 1
    words.append(random.choice(POSITIVE if points > 0 else NEGATIVE))
    roles.append("sentiment")
    return words, roles, points * factor


def _filler(random: Random) -> Clause:
    slots = {slot: random.choice(choices) for slot, choices in _SLOTS.items()}
    words = random.choice(_FILLERS).format_map(slots).split()
    return words, ["filler"] * len(words), 0
