"""The definitions, in plain PyTorch: the specification that every back end is checked against.

Any device and floating dtype, twice differentiable, T×T tensors and all. 16-bit input is computed in float32, float64
in float64; in float64 these functions are the project's oracle.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from safr_fast.precision import has_autocast


def upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``(N,)`` index of the packed sequence of each token; S for tokens past the last sequence."""
    position = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def real(valid: Tensor | None, x: Tensor) -> Tensor:
    """Rows of ``x`` where ``valid``, else 0: selected, since padding may hold NaN."""
    return x if valid is None else torch.where(valid.unsqueeze(-1), x, 0.0)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Products at the precision of their operands; on a device such as ``meta``, which knows no autocast, as it is."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def gram(h: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(..., T, T)`` inner products :math:`h_i · h_j`; 0 in padded rows and columns."""
    with _no_autocast(h):
        h = real(mask, upcast(h))
        return h @ h.mT


def row_energy(h: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:math:`R_i = Σ_{j≠i} (h_i · h_j)²` and :math:`n2_i = h_i · h_i`, each ``(..., T)``."""
    tokens = h.shape[-2]
    other = ~torch.eye(tokens, dtype=torch.bool, device=h.device)
    if cu_seqlens is not None:
        segment = segment_ids(cu_seqlens, tokens)
        mask = segment < cu_seqlens.shape[0] - 1
        other = other & (segment[:, None] == segment[None, :])
    h = real(mask, upcast(h))  # once, since each use's gradient would be rounded to 16 bits by itself
    energy = torch.where(other, gram(h), 0.0).square().sum(-1)
    return energy, h.square().sum(-1)


def attention_from_qk(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, scale: float, is_causal: bool, segment: Tensor | None = None
) -> Tensor:
    """:math:`A = softmax(scale · q kᵀ)` over valid keys, ``(B, H, T, T)``; rows and columns of padding are 0.

    ``segment`` ``(T,)``: tokens attend within their own packed sequence.
    """
    with _no_autocast(q):
        valid = None if mask is None else mask[:, None, :]
        q, k = real(valid, upcast(q)), real(valid, upcast(k))
        scores = scale * (q @ k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1).mT)  # (B, H, T, T)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if is_causal:
        allowed = allowed.tril()
    if segment is not None:
        allowed = allowed & (segment[:, None] == segment[None, :])
    if mask is not None:
        allowed = allowed & (mask[:, None, :, None] & mask[:, None, None, :])
    # A row with nothing to attend to softmaxes over equal scores and is then emptied: −inf throughout would give NaN.
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.where(allowed, scores.softmax(-1), 0.0)


def _interaction_rows(attention: Tensor, squared: bool, exclude_diagonal: bool) -> Tensor:
    with _no_autocast(attention):
        overlap = attention @ attention.mT  # (..., T, T)
        if exclude_diagonal:
            overlap = torch.where(torch.eye(overlap.shape[-1], dtype=torch.bool, device=overlap.device), 0.0, overlap)
        return (attention * (1 - (overlap.square() if squared else overlap))).sum(-1)


def interaction_total(
    attention: Tensor, mask: Tensor | None = None, *, squared: bool, exclude_diagonal: bool
) -> Tensor:
    """:math:`Σ_ij A_ij (1 − φ(G_ij))`, :math:`G = A Aᵀ`, of each sample and head: ``(B, H)``."""
    attention = upcast(attention)
    if mask is not None:
        attention = torch.where(mask[:, None, :, None] & mask[:, None, None, :], attention, 0.0)
    return _interaction_rows(attention, squared, exclude_diagonal).sum(-1)


def interaction_total_from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
) -> Tensor:
    """The same from queries and keys: ``(B, H)``, or ``(S, H)`` for packed input ``(N, H, D)``."""
    if cu_seqlens is None:
        attention = attention_from_qk(q, k, mask, scale=scale, is_causal=is_causal)
        return _interaction_rows(attention, squared, exclude_diagonal).sum(-1)
    sequences = cu_seqlens.shape[0] - 1
    segment = segment_ids(cu_seqlens, q.shape[0])
    q, k = q.movedim(0, 1).unsqueeze(0), k.movedim(0, 1).unsqueeze(0)  # (1, H, N, D)
    real = (segment < sequences).unsqueeze(0)
    attention = attention_from_qk(q, k, real, scale=scale, is_causal=is_causal, segment=segment)
    rows = _interaction_rows(attention, squared, exclude_diagonal).squeeze(0).mT  # (N, H)
    return rows.new_zeros(sequences + 1, rows.shape[1]).index_add(0, segment, rows)[:sequences]
