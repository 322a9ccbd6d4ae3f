"""The two training protocols: what padding takes part in, and which epoch is tested."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safr_fast.data.batches import Batch, EncodedSplit, PaddedBatch
from safr_fast.nn import ClassifierOutput

# Far below any score, yet finite in 16 bits.
_CLOSED = -3e4

AnyBatch = TypeVar("AnyBatch", Batch, PaddedBatch)


class TextOutput(NamedTuple):
    """What a classifier gives for the real tokens of one text."""

    gate: Tensor | None  # (T,)
    q: Tensor  # (H, T, D), of the last layer
    k: Tensor  # (H, T, D)


class Protocol(ABC, Generic[AnyBatch]):
    """All that training does in one way or the other; :data:`MASKED` is right, :data:`RELEASED` repeats the authors'.

    Every position of a protocol's batches counts as a token in the means of both losses: there are pads in them only
    where pads count.

    Source: the SAFR authors' code (arXiv 2501.16374).
    """

    pads_count: ClassVar[bool]
    """Every text is padded to ``max_len``; pads are embedded, gated, pooled and in both losses. As keys of attention
    they are closed; as queries they attend, and their rows count."""
    tests_last_epoch: ClassVar[bool]
    """Not the best development epoch."""
    imdb_dev: ClassVar[Literal["drawn", "last"]]
    """How IMDB's development texts are taken, see :func:`safr_fast.data.load`."""

    @abstractmethod
    def width(self, max_len: int | None) -> int | None:
        """The length that every text is padded to; None: no fixed one."""

    @abstractmethod
    def batch(self, split: EncodedSplit, rows: list[int]) -> AnyBatch:
        """These texts, laid out as model and losses take them."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: AnyBatch) -> ClassifierOutput: ...

    @abstractmethod
    def regularised(self, output: ClassifierOutput, batch: AnyBatch) -> dict[str, Any]:
        """What :class:`safr_fast.SAFRLoss` takes: ``hidden``, ``qk`` and the layout."""

    @abstractmethod
    def gates(self, output: ClassifierOutput, batch: AnyBatch) -> tuple[Tensor, int] | None:
        """Sum over the batch's real tokens, and how many there are; None without a gate."""

    @abstractmethod
    def texts(self, output: ClassifierOutput, batch: AnyBatch) -> Iterator[TextOutput]:
        """Each text by itself."""


class Masked(Protocol[Batch]):
    """Packed texts: padding does not exist."""

    pads_count = False
    tests_last_epoch = False
    imdb_dev = "drawn"

    def width(self, max_len: int | None) -> None:
        return None

    def batch(self, split: EncodedSplit, rows: list[int]) -> Batch:
        return split.batch(rows)

    def forward(self, model: nn.Module, batch: Batch) -> ClassifierOutput:
        return cast(ClassifierOutput, model(batch.ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen))

    def regularised(self, output: ClassifierOutput, batch: Batch) -> dict[str, Any]:
        return {"hidden": output.hidden, "qk": output.qk, "cu_seqlens": batch.cu_seqlens}

    def gates(self, output: ClassifierOutput, batch: Batch) -> tuple[Tensor, int] | None:
        return None if output.gate is None else (output.gate.sum(), len(batch.ids))

    def texts(self, output: ClassifierOutput, batch: Batch) -> Iterator[TextOutput]:
        gate, (q, k) = output.gate, output.qk[-1]
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            own = slice(start, end)
            yield TextOutput(None if gate is None else gate[own], q[own].transpose(0, 1), k[own].transpose(0, 1))


class Released(Protocol[PaddedBatch]):
    """Padded texts, whose pads are tokens but for being closed as keys of attention."""

    pads_count = True
    tests_last_epoch = True
    imdb_dev = "last"

    def width(self, max_len: int | None) -> int | None:
        return max_len

    def batch(self, split: EncodedSplit, rows: list[int]) -> PaddedBatch:
        return split.padded(rows)

    def forward(self, model: nn.Module, batch: PaddedBatch) -> ClassifierOutput:
        return cast(ClassifierOutput, model(batch.ids, batch.mask))

    def regularised(self, output: ClassifierOutput, batch: PaddedBatch) -> dict[str, Any]:
        """The losses are told of no mask, and each pad's key gets a feature that closes it to every query.

        So ``softmax(scale · q kᵀ)`` is the model's attention.
        """
        # As in the model, a sample without any real token attends to all of its pads.
        closed = (~batch.mask & batch.mask.any(dim=1, keepdim=True))[:, None, :, None]  # (B, 1, T, 1)
        qk = tuple(
            (
                F.pad(q, (0, 1), value=1.0),
                torch.cat((k, torch.where(closed, _CLOSED, k.new_zeros(1)).expand(*k.shape[:-1], 1)), -1),
            )
            for q, k in output.qk
        )
        return {"hidden": output.hidden, "qk": qk}

    def gates(self, output: ClassifierOutput, batch: PaddedBatch) -> tuple[Tensor, int] | None:
        return None if output.gate is None else (output.gate.where(batch.mask, 0).sum(), sum(batch.lengths))

    def texts(self, output: ClassifierOutput, batch: PaddedBatch) -> Iterator[TextOutput]:
        gate, (q, k) = output.gate, output.qk[-1]
        for b, length in enumerate(batch.lengths):
            yield TextOutput(None if gate is None else gate[b, :length], q[b, :, :length], k[b, :, :length])


MASKED = Masked()
RELEASED = Released()
PROTOCOLS: dict[str, Protocol[Any]] = {"masked": MASKED, "released": RELEASED}
