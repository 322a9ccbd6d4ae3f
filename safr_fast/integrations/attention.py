"""Queries and keys of models that do not return them, taken where PyTorch computes attention."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    and with gradients. A scale other than :math:`1/\sqrt{D}` is multiplied into ``q``: leave ``SAFRLoss(scale=None)``.

    What else enters the scores is not seen:

    * padding and causality: tell the loss by ``mask`` and ``is_causal``;
    * biases by position (T5, ALiBi) and windows (Mistral, ModernBERT): the loss is then that of other weights than the
      model's;
    * which dimension is the heads': queries ``(N, T, D)`` count as N samples of one head;
    * layers that are checkpointed in a compiled model: they are missing from the list. Compile or checkpoint;
    * whether queries and keys are of one text: attention between different lengths is left out, between two of one
      length, as an encoder's and a decoder's may be, it is recorded as any other. Take it out of the list.

    Compile the whole model and run it once in a block: layers compiled one by one would be compiled anew for each. In a
    model sharded by FSDP, backward has to pass through what the model returned too.

    Yields:
        A list that fills up, of queries ``(B, H, T, D)`` and keys with H or fewer heads.

    Raises:
        ValueError: nothing was seen by the end; a layer adds a key of its own to those of the tokens.
        RuntimeError: attention runs without gradients in a block that began with them, as under reentrant
            checkpointing, where the recorded tensors would have none.

    Example::

        loss_fn = SAFRLoss(lambda_importance=0.1, lambda_interaction=0.1, variant="released")
        with record_qk() as qk:  # a model of Hugging Face transformers
            output = model(**batch)
        mask = batch["attention_mask"].bool()
        loss = loss_fn(output.logits, labels, hidden=gated_embeddings, qk=qk, mask=mask)
    """
    recorder = _Recorder()
    with recorder:
        yield recorder.pairs
    if recorder.pairs:
        return
    if recorder.left_out:
        raise ValueError(f"no self-attention was seen, but {recorder.left_out} calls between sequences of two lengths")
    raise ValueError(
        "no self-attention was seen: record_qk knows F.scaled_dot_product_attention and nn.MultiheadAttention, in the "
        "thread of the block and not where a compiled model is checkpointed; load a transformers model with "
        'attn_implementation="sdpa", or pass SAFRLoss queries and keys yourself'
    )


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.left_out = 0
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
            self.left_out += 1
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
    query, key = _with_heads(query), _with_heads(key)
    if scale is not None and not math.isclose(scale * math.sqrt(query.shape[-1]), 1.0):
        query = query * (scale * math.sqrt(query.shape[-1]))
    return query, key


def _with_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) of any number of dimensions in front of T; of one, samples of a single head."""
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x.unsqueeze(-3)[(None,) * (3 - x.dim())] if x.dim() < 4 else x


def _of_multi_head(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of ``(T, B, E)``, or ``(T, E)``, what enters the projections."""
    if given["add_zero_attn"] or any(given.get(name) is not None for name in ("bias_k", "static_k")):
        raise ValueError(
            "record_qk cannot tell the keys of nn.MultiheadAttention with add_bias_kv, add_zero_attn or static keys "
            "from those of the tokens"
        )
    if given.get("use_separate_proj_weight"):
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].chunk(3)[:2]
    bias = given["in_proj_bias"]
    biases = (None, None) if bias is None else bias.chunk(3)[:2]
    heads = []
    with _apart_from_checkpoints():
        for x, weight, offset in zip((given["query"], given["key"]), weights, biases, strict=True):
            projected = F.linear(x if x.dim() == 3 else x.unsqueeze(1), weight, offset)
            heads.append(projected.unflatten(-1, (given["num_heads"], -1)).permute(1, 2, 0, 3))  # (B, H, T, D)
    return heads[0], heads[1]


def _apart_from_checkpoints() -> AbstractContextManager[object]:
    """Checkpointing counts what is saved for backward, and runs the layer again without what is recorded.

    A compiler and torch.func know no such hooks.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_with_version, _unchanged)


def _with_version(x: Tensor) -> tuple[Tensor, int]:
    return x, x._version


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    """Autograd itself no longer looks whether a tensor that hooks have saved was changed."""
    x, version = saved
    if x._version != version:
        raise RuntimeError(f"{tuple(x.shape)} of a layer that record_qk saw has been modified by an inplace operation")
    return x
