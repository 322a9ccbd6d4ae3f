"""Attention within each of the sequences that are packed end to end, by the fastest form that serves."""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Form = TypeVar("Form", bound=Callable[..., Tensor])

_has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None  # from torch 2.10 on


def longest(cu_seqlens: Tensor) -> int:
    """Tokens of the longest sequence, for which a GPU has to be waited for."""
    return max(cu_seqlens.diff().tolist(), default=0)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Softmax attention ``(N, H, D)`` of ``q``, ``k`` and ``v``, each ``(N, H, D)``.

    ``cu_seqlens``: int32 ``(S + 1,)`` offsets of the sequences, from 0 to N; ``max_seqlen``: the longest one's length.

    On CUDA, 16-bit tensors go to PyTorch's ``varlen_attn`` (FlashAttention) where it is there, all others to its
    jagged nested tensors. Elsewhere ``scaled_dot_product_attention`` takes each sequence by itself, neighbours of one
    length together. Of the forms tried on a CPU this was the fastest at every length. Roughly, on one busy core of a
    Zen 5 machine (torch 2.13, float32, 8 heads of 32, batches of 8,000 tokens, forward and backward): 0.2 s for reviews
    of about 234 words, 0.7 s for reviews of about 1,000. Padded to the longest of the bucket, within 5 to 8 %, took
    1.5 times as long; weights made plainly 1.3 and 3.2 times; jagged nested tensors 7 times. ``varlen_attn`` has no
    kernel for CPUs.
    """
    if q.device.type != "cuda":
        return _uncompiled(_by_sequence)(q, k, v, cu_seqlens)
    flash = q.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(q.device)[0] >= 8
    if flash and _has_varlen:
        from torch.nn.attention.varlen import varlen_attn

        return cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen))
    return _uncompiled(_nested)(q, k, v, cu_seqlens, max_seqlen)


def _uncompiled(function: Form) -> Form:
    """The same out of the compiler's sight, since it would specialise on the lengths.

    Only where the compiler is loaded: ``torch.compiler.disable`` loads it, which takes as long as torch itself.
    """
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    runs = [(length, len([*run])) for length, run in itertools.groupby(cu_seqlens.diff().tolist())]
    tokens = [length * count for length, count in runs]
    contexts = []
    for shape, *parts in zip(runs, *(x.split(tokens) for x in (q, k, v)), strict=True):
        length, count = shape
        context = F.scaled_dot_product_attention(*(x.unflatten(0, (count, length)).transpose(1, 2) for x in parts))
        contexts.append(context.transpose(1, 2).flatten(0, 1))  # (tokens, H, D)
    return torch.cat(contexts) if contexts else torch.zeros_like(q)


def _nested(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    offsets = cu_seqlens.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x.contiguous(), offsets, max_seqlen=max_seqlen).transpose(1, 2)
        for x in (q, k, v)
    )  # (S, H, T of each, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()
