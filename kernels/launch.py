"""The Triton back end as the ops see it. Triton itself is imported by the first call that computes something."""

import torch
from torch import Tensor

from .availability import description, unavailable_reason
from .configs import moment_slots
from .tuning import tuned

__all__ = [
    "description",
    "importance",
    "importance_backward",
    "interaction",
    "interaction_from_qk",
    "moment_slots",
    "row_energy",
    "row_energy_backward",
    "scale",
    "unavailable_reason",
]


def row_energy(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, save_moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy ``(B, T)``, squared norm ``(B, T)``, and moments ``(slots, E, E)`` of the long sequences."""
    from . import row_energy_launch

    with torch.cuda.device_of(h):
        launch = row_energy_launch.forward
        tokens = _tokens(h, cu_seqlens)
        return tuned(lambda: launch(h, mask, cu_seqlens, save_moments), h, tokens, unwritten=1)  # the moments


def row_energy_backward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    squared_norm: Tensor,
    moments: Tensor,
    grad_energy: Tensor,
    grad_squared_norm: Tensor,
) -> Tensor:
    """Gradient of ``h``, from those of the energy and of the squared norm."""
    from . import row_energy_launch

    rows = (energy, squared_norm, moments, grad_energy, grad_squared_norm)
    with torch.cuda.device_of(h):
        (grad_h,) = tuned(lambda: (row_energy_launch.backward(h, mask, cu_seqlens, *rows),), h, _tokens(h, cu_seqlens))
    return grad_h


def importance(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    scale: float,
    mean: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """``scale · Σ √R / (√n2 + ε)``, over the number of real tokens for the mean, what the sum was multiplied by, and
    what :func:`row_energy` gives, followed by the moments' Euclidean norms ``(slots,)``."""
    from . import row_energy_launch

    with torch.cuda.device_of(h):
        launch = row_energy_launch.importance
        tokens = _tokens(h, cu_seqlens)
        unwritten = 2 if cu_seqlens is None else 4  # moments and their norms; packed rows past the last sequence
        return tuned(lambda: launch(h, mask, cu_seqlens, eps, scale, mean, save), h, tokens, unwritten=unwritten)


def importance_backward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    squared_norm: Tensor,
    moments: Tensor,
    moment_norm: Tensor,
    factor: Tensor,
    grad_loss: Tensor,
    eps: float,
) -> Tensor:
    """Gradient of ``h``, from that of the loss."""
    from . import row_energy_launch

    sums = (energy, squared_norm, moments, moment_norm, factor, grad_loss, eps)
    with torch.cuda.device_of(h):
        (grad_h,) = tuned(
            lambda: (row_energy_launch.importance_backward(h, mask, cu_seqlens, *sums),), h, _tokens(h, cu_seqlens)
        )
    return grad_h


def interaction(
    attention: Tensor,
    mask: Tensor | None,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pair sums ``(B, H)`` of stored attention, and their gradient."""
    from . import interaction_launch

    form = (squared, exclude_diagonal, need_grad, workspace_bytes)
    with torch.cuda.device_of(attention):
        return tuned(lambda: interaction_launch.from_attention(attention, mask, *form), attention, attention.shape[-1])


def interaction_from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    workspace_bytes: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pair sums ``(B, H)`` of the attention of queries and keys, and their gradients, the keys' for each query head."""
    from . import interaction_launch, interaction_packed_launch

    form = (scale, is_causal, squared, exclude_diagonal, need_grad, workspace_bytes)
    with torch.cuda.device_of(q):
        if cu_seqlens is None:
            return tuned(lambda: interaction_launch.from_qk(q, k, mask, *form), q, q.shape[2])
        launch = interaction_packed_launch.from_qk
        return tuned(lambda: launch(q, k, cu_seqlens, *form, max_seqlen), q, _tokens(q, cu_seqlens))


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    from . import gradient_scale

    with torch.cuda.device_of(gradient):
        gradient_scale.scale(gradient, factor, out)


def _tokens(h: Tensor, cu_seqlens: Tensor | None) -> int:
    """Of a sequence; of packed ones on average, since their lengths are not known without waiting for the device."""
    return h.shape[-2] if cu_seqlens is None else h.shape[0] // max(cu_seqlens.shape[0] - 1, 1)
