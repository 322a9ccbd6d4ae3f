"""Queries and keys of models that do not return them, taken where PyTorch computes attention."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from safr_fast.loss import Pair

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


@contextmanager
def record_qk() -> Iterator[list[Pair]]:
    r"""Within the block, the ``(q, k)`` of every self-attention layer that runs, in order, as ``SAFRLoss`` takes them.

    Seen are calls of :func:`torch.nn.functional.scaled_dot_product_attention`, and so of most models that others
    publish, and of :class:`torch.nn.MultiheadAttention`, whose two projections are computed once more. Before dropout,
    and with gradients. A scale other than :math:`1/\sqrt{D}` is multiplied into ``q``, so ``SAFRLoss`` keeps its own.

    What else enters the scores is not seen, padding and causality included: tell the loss by ``mask`` and
    ``is_causal``. Biases by position, and windows, it does not know. Attention between sequences of different lengths
    is left out; between two of one length, as an encoder's and a decoder's may be, it is recorded as any other: take it
    out of the list.

    Yields:
        A list that fills up, of queries ``(B, H, T, D)`` and keys with H or fewer heads.

    Raises:
        ValueError: at the end, if nothing was seen.
        RuntimeError: attention runs without gradients in a block that began with them, as under reentrant
            checkpointing, where the recorded tensors would have none.

    Example::

        loss_fn = SAFRLoss(lambda_importance=0.1, lambda_interaction=0.1, variant="released")
        with record_qk() as qk:  # a model of Hugging Face transformers
            output = model(**batch, output_hidden_states=True)
        mask = batch["attention_mask"].bool()
        loss = loss_fn(output.logits, labels, hidden=output.hidden_states[0], qk=qk, mask=mask)
    """
    recorder = _Recorder()
    with recorder:
        yield recorder.pairs
    if not recorder.pairs:
        raise ValueError(
            "no self-attention was seen: record_qk knows F.scaled_dot_product_attention and nn.MultiheadAttention; "
            'load a transformers model with attn_implementation="sdpa", or pass SAFRLoss queries and keys yourself'
        )


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.with_gradients = torch.is_grad_enabled()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self._record(*_of_dot_product(*args, **kwargs))
        elif function is F.multi_head_attention_forward:
            self._record(*_of_multi_head(_MULTI_HEAD.bind(*args, **kwargs).arguments))
        return function(*args, **kwargs)

    def _record(self, q: Tensor, k: Tensor) -> None:
        if q.shape[-2] != k.shape[-2]:
            return
        if self.with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "attention runs without gradients within record_qk: use_reentrant=False where it is checkpointed, and "
                "run models that are not trained outside of the block"
            )
        self.pairs.append((q, k))


def _of_dot_product(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any
) -> tuple[Tensor, Tensor]:
    if query.dim() == 3:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    if scale is not None and not math.isclose(scale * math.sqrt(query.shape[-1]), 1.0):
        query = query * (scale * math.sqrt(query.shape[-1]))
    return query, key


def _of_multi_head(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of ``(T, B, E)``, or ``(T, E)``, what enters the projections."""
    if given.get("use_separate_proj_weight"):
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].chunk(3)[:2]
    bias = given["in_proj_bias"]
    biases = (None, None) if bias is None else bias.chunk(3)[:2]
    heads = []
    # Checkpointing counts what a layer saves for backward, and runs it again without this.
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        for x, weight, offset in zip((given["query"], given["key"]), weights, biases, strict=True):
            projected = F.linear(x if x.dim() == 3 else x.unsqueeze(1), weight, offset)
            heads.append(projected.unflatten(-1, (given["num_heads"], -1)).permute(1, 2, 0, 3))  # (B, H, T, D)
    return heads[0], heads[1]


def _itself(x: Tensor) -> Tensor:
    return x
