"""The two training protocols: what padding takes part in, and which epoch is tested."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safr_fast.data.batches import Batch
from safr_fast.data.vocabulary import PAD
from safr_fast.nn import ClassifierOutput

# Far below any score, yet finite in 16 bits.
_CLOSED = -3e4


class TextOutput(NamedTuple):
    """What a classifier gives for the words of one text."""

    gate: Tensor | None  # (T,)
    q: Tensor  # (H, T, D), of the last layer
    k: Tensor  # (H, T, D)


class Protocol(ABC):
    """All that training does in one way or the other; :data:`MASKED` is right, :data:`RELEASED` repeats the authors'.

    Source: the SAFR authors' code (arXiv 2501.16374).
    """

    pads_count: ClassVar[bool]
    """Every text is padded to ``max_len`` by tokens, which are embedded, gated, pooled and in both losses. As keys of
    attention they are closed; as queries they attend, and their rows count."""
    tests_last_epoch: ClassVar[bool]
    """Not the best development epoch."""
    imdb_dev: ClassVar[Literal["drawn", "last"]]
    """How IMDB's development texts are taken, see :func:`safr_fast.data.load`."""

    @abstractmethod
    def width(self, max_len: int | None) -> int:
        """The length that every text is padded to by tokens; 0: none is."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> ClassifierOutput:
        """The model called on a batch."""

    @abstractmethod
    def regularised(self, output: ClassifierOutput, batch: Batch) -> dict[str, Any]:
        """What :class:`safr_fast.SAFRLoss` takes: ``hidden``, ``qk`` and their layout."""

    @abstractmethod
    def mean_gate(self, gate: Tensor, batch: Batch) -> tuple[Tensor, Tensor | int]:
        """Over words, pads apart; and how many words there are."""

    @abstractmethod
    def texts(self, output: ClassifierOutput, batch: Batch) -> Iterator[TextOutput]:
        """Each text by itself."""


class Masked(Protocol):
    """Packed texts: padding does not exist."""

    pads_count = False
    tests_last_epoch = False
    imdb_dev = "drawn"

    def width(self, max_len: int | None) -> int:
        return 0

    def forward(self, model: nn.Module, batch: Batch) -> ClassifierOutput:
        return cast(ClassifierOutput, model(batch.ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen))

    def regularised(self, output: ClassifierOutput, batch: Batch) -> dict[str, Any]:
        packed = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
        return {"hidden": output.hidden, "qk": output.qk, **packed}

    def mean_gate(self, gate: Tensor, batch: Batch) -> tuple[Tensor, Tensor | int]:
        return gate.sum() / max(len(gate), 1), len(gate)

    def texts(self, output: ClassifierOutput, batch: Batch) -> Iterator[TextOutput]:
        gate, (q, k) = output.gate, output.qk[-1]
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            own = slice(start, end)
            yield TextOutput(None if gate is None else gate[own], q[own].transpose(0, 1), k[own].transpose(0, 1))


class Released(Protocol):
    """Texts of one length, whose pads are tokens but for being closed as keys of attention."""

    pads_count = True
    tests_last_epoch = True
    imdb_dev = "last"

    def width(self, max_len: int | None) -> int:
        return cast(int, max_len)

    def forward(self, model: nn.Module, batch: Batch) -> ClassifierOutput:
        ids = _padded(batch)
        return cast(ClassifierOutput, model(ids, ids != PAD))

    def regularised(self, output: ClassifierOutput, batch: Batch) -> dict[str, Any]:
        """The losses are told of no mask, and each pad's key gets a feature that closes it to every query.

        So ``softmax(scale · q kᵀ)`` is the model's attention.
        """
        words = _padded(batch) != PAD  # (B, T)
        # As in the model, a sample without any word attends to all of its pads.
        closed = (~words & words.any(dim=1, keepdim=True))[:, None, :, None]  # (B, 1, T, 1)
        qk = [
            (
                F.pad(q, (0, 1), value=1.0),
                torch.cat((k, torch.where(closed, _CLOSED, k.new_zeros(1)).expand(*k.shape[:-1], 1)), -1),
            )
            for q, k in output.qk
        ]
        return {"hidden": output.hidden, "qk": qk}

    def mean_gate(self, gate: Tensor, batch: Batch) -> tuple[Tensor, Tensor | int]:
        words = _padded(batch) != PAD
        count = words.sum()
        return gate.where(words, 0).sum() / count.clamp(min=1), count

    def texts(self, output: ClassifierOutput, batch: Batch) -> Iterator[TextOutput]:
        gate, (q, k) = output.gate, output.qk[-1]
        for b, words in enumerate((_padded(batch) != PAD).sum(1).tolist()):
            yield TextOutput(None if gate is None else gate[b, :words], q[b, :, :words], k[b, :, :words])


def _padded(batch: Batch) -> Tensor:
    """(B, T): the word types of texts that all have the same length."""
    return batch.ids.view(len(batch.rows), -1)


MASKED = Masked()
RELEASED = Released()
PROTOCOLS: dict[str, Protocol] = {"masked": MASKED, "released": RELEASED}
