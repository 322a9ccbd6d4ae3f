"""The two training protocols: what padding takes part in, and which epoch is tested."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from safr_fast.nn import ClassifierOutput

# Far below any score, yet finite in 16 bits.
_CLOSED = -3e4


@dataclass(frozen=True)
class Protocol:
    """Data, model and loss ask it; :data:`MASKED` is the right one, :data:`RELEASED` repeats the authors' code.

    Source: the SAFR authors' code (arXiv 2501.16374).
    """

    pads_count: bool
    """Every text is padded to ``max_len``; pads are embedded, gated, pooled and in both losses. As keys of attention
    they are closed; as queries they attend, and their rows count."""
    tests_last_epoch: bool
    """Not the best development epoch."""
    imdb_dev: Literal["drawn", "last"]
    """How IMDB's development texts are taken, see :func:`safr_fast.data.load`."""

    def width(self, max_len: int | None) -> int:
        """The length that every text is padded to by tokens; 0: none is."""
        return cast(int, max_len) if self.pads_count else 0

    def regularised(self, output: ClassifierOutput, mask: Tensor) -> dict[str, Any]:
        """What :class:`safr_fast.SAFRLoss` takes: ``hidden``, ``qk`` and ``mask``. Here ``mask`` is of real words.

        With pads that count, the loss is told of no mask, and each pad's key gets a feature that closes it to every
        query, so that ``softmax(scale · q kᵀ)`` is the model's attention.
        """
        if not self.pads_count:
            return {"hidden": output.hidden, "qk": output.qk, "mask": mask}
        # As in the model, a sample without any real token attends to all of its pads.
        closed = (~mask & mask.any(dim=1, keepdim=True))[:, None, :, None]  # (B, 1, T, 1)
        qk = tuple(
            (
                F.pad(q, (0, 1), value=1.0),
                torch.cat((k, torch.where(closed, _CLOSED, k.new_zeros(1)).expand(*k.shape[:-1], 1)), -1),
            )
            for q, k in output.qk
        )
        return {"hidden": output.hidden, "qk": qk, "mask": None}


MASKED = Protocol(pads_count=False, tests_last_epoch=False, imdb_dev="drawn")
RELEASED = Protocol(pads_count=True, tests_last_epoch=True, imdb_dev="last")
PROTOCOLS = {"masked": MASKED, "released": RELEASED}
