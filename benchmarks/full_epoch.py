"""One epoch over all of IMDB's 25,000 training reviews, nothing cut, both terms: time, share of each term, memory.

    python benchmarks/full_epoch.py --data-dir data/imdb --out full-epoch.json

The steps are those of ``safr-fast train --dataset imdb --full-length``, which keeps 5,000 of the reviews for
development. A term's time is measured in every step, at the back end's calls and where gradients are scaled. Afterwards
the plain formula takes a few steps of one review, padded to the longest of all: each costs the same.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_training_step import plain
from comparison import matmul_gflops, tile_gflops
from formulas import interaction_floor, row_energy_floor
from tqdm import tqdm

from safr_fast import data
from safr_fast.data.batches import EncodedSplit
from safr_fast.data.corpus import Split
from safr_fast.data.vocabulary import Vocabulary
from safr_fast.env import describe
from safr_fast.ops import cpp, interaction
from safr_fast.training.config import ModelConfig, TrainConfig
from safr_fast.training.measure import build_loss, forward
from safr_fast.training.meter import peak_memory
from safr_fast.training.model import build_model
from safr_fast.training.plan import Step, share, steps
from safr_fast.training.protocol import MASKED
from safr_fast.training.settings import keep_memory

TERMS: dict[str, list[tuple[Any, str]]] = {
    "importance": [(cpp, "importance"), (cpp, "importance_backward")],
    "interaction": [(cpp, "interaction_from_qk"), (interaction.InteractionFromQK, "backward")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with IMDB's files")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--texts", type=int, help="only so many reviews, drawn, for a quick look")
    parser.add_argument("--plain-steps", type=int, default=3, help="steps of the plain formula")
    options = parser.parse_args()

    keep_memory()
    torch.set_float32_matmul_precision(options.precision)
    corpus = data.load("imdb", options.data_dir)
    both = Split([*corpus.train.texts, *corpus.dev.texts], [*corpus.train.labels, *corpus.dev.labels])
    vocabulary = Vocabulary.of(both.texts)
    reviews = EncodedSplit.of(both, vocabulary)
    longest = int(reviews.lengths.max())
    if options.texts is not None:
        reviews = _drawn(reviews, options.texts)
    training = Training(reviews, len(vocabulary), options.batch_tokens)
    measured = training.epoch()
    measured |= {
        "plain": training.plain(options.plain_steps, longest, len(both)) if options.plain_steps else None,
        "matmul_gflops": matmul_gflops(torch.get_num_threads()),
        "least_share_in_float32": least_share(reviews.lengths.tolist(), training.config.model, measured),
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe().splitlines(),
    }
    options.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


def least_share(lengths: list[int], model: ModelConfig, measured: dict[str, Any]) -> float | None:
    """Of the regularisers, were all their operations done at the rate of the tiles, and the rest as it was measured."""
    rate = tile_gflops()
    if rate is None:
        return None
    heads, width = model.heads, model.dim
    operations = sum(interaction_floor(n, heads, width // heads) + row_energy_floor(n, width) for n in lengths)
    least = operations / (rate * 1e9 * torch.get_num_threads())
    rest = measured["seconds"] * (1 - sum(measured["share"].values()))
    return least / (least + rest)


class Training:
    """The paper's model with both terms at IMDB's default weights."""

    def __init__(self, reviews: EncodedSplit, words: int, batch_tokens: int) -> None:
        self.config = TrainConfig(dataset="imdb", max_len=0, batch_tokens=batch_tokens)
        torch.manual_seed(0)
        self.reviews = reviews
        self.model = build_model(words, self.config.model).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate, fused=True)
        self.loss = build_loss(self.config, 0.01, 0.01)

    def epoch(self) -> dict[str, Any]:
        plan = steps(self.reviews.lengths, self.config, epoch=1)
        for step in plan[:2]:
            self._step(step)
        with _timed(TERMS) as seconds:
            started = time.perf_counter()
            for step in tqdm(plan, unit="step", disable=None):
                self._step(step)
            total = time.perf_counter() - started
        tokens = len(self.reviews.ids)
        return {
            "reviews": len(self.reviews),
            "tokens": tokens,
            "seconds": total,
            "tokens_per_second": tokens / total,
            "share": {term: spent / total for term, spent in seconds.items()},
            "peak_mib": peak_memory(torch.device("cpu")).get("process", 0) / 2**20,
        }

    def plain(self, count: int, length: int, reviews: int) -> dict[str, Any]:
        """Steps of one review, padded to ``length``: by words, since what padding costs does not depend on them."""
        ids = self.reviews.ids[:length][None]  # (1, length)
        times = []
        for _ in range(count):
            started = time.perf_counter()
            self._move(lambda: plain(self.model(ids), self.reviews.labels[:1]))
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        return {
            "length": length,
            "seconds_a_review": seconds,
            "hours_an_epoch": seconds * reviews / 3600,
            "arithmetic": f"{seconds:.2f} s a review x {reviews:,} reviews / 3,600",
            "gib_of_one_attention_tensor_of_32_reviews": 32 * self.config.model.heads * length**2 * 4 / 2**30,
        }

    def _step(self, step: Step) -> None:
        (rows,) = step.batches
        torch.manual_seed(step.seeds[0])
        batch = self.reviews.batch(rows)

        def total() -> torch.Tensor:
            _, parts = forward(self.model, self.loss, batch, MASKED)
            return share(step, batch, self.loss, parts)

        self._move(total)

    def _move(self, total: Callable[[], torch.Tensor]) -> None:
        self.optimizer.zero_grad()
        total().backward()
        self.optimizer.step()


def _drawn(reviews: EncodedSplit, count: int) -> EncodedSplit:
    rows = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(0))[:count].tolist()
    batch = reviews.batch(rows)
    return EncodedSplit(batch.ids, batch.cu_seqlens.long(), batch.labels)


@contextmanager
def _timed(terms: dict[str, list[tuple[Any, str]]]) -> Iterator[dict[str, float]]:
    """Seconds in each term's functions, which are replaced by ones that look at the clock."""
    seconds: dict[str, float] = defaultdict(float)
    originals = []

    def watch(term: str, owner: Any, name: str) -> None:
        original = getattr(owner, name)
        originals.append((owner, name, original))

        def watched(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                seconds[term] += time.perf_counter() - started

        setattr(owner, name, watched)

    for term, functions in terms.items():
        for owner, name in functions:
            watch(term, owner, name)
    try:
        yield seconds
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


if __name__ == "__main__":
    main()
