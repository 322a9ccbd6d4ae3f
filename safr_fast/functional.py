"""The measures and losses of SAFR as stateless functions, in the style of :mod:`torch.nn.functional`.

``h`` is ``(..., T, E)``: hidden representations, one row per token; ``mask`` is bool ``(..., T)``, true where a token
is real. Packed sequences come as ``(N, E)`` with ``cu_seqlens`` ``(S + 1,)`` int32, the offsets at which sequences
start and the last one ends; a bare ``(N, E)`` is one sequence. Tokens past the last offset are of no sequence, as
padding is, which may hold anything, NaN included.

``impl`` names the back end; what each can serve, :func:`safr_fast.available_backends` says:

=============  ======================================  ===========================================================
``impl``       serves                                  notes
=============  ======================================  ===========================================================
"auto"         everything                              "cpp" on the CPU, "triton" on CUDA, else "reference",
                                                       so too for forward-mode derivatives and torch.func
"reference"    any device, any floating dtype          plain PyTorch, stores T×T tensors, twice differentiable
"cpp"          CPU; float32, bfloat16, float16         no T×T tensors, differentiates once
"triton"       CUDA; float32, bfloat16, float16        the same
=============  ======================================  ===========================================================

float32 products are as accurate as :func:`torch.set_float32_matmul_precision` asks. Under autocast ``h``, ``q`` and
``k`` are cast as for a matrix product, but for :func:`interference`; stored attention weights are not, since the losses
turn on how far a weight is from 1, which 16 bits cannot say. Losses are float32 (float64 for float64 input). Where all
tokens of a sample have norms below 1e-8, squared products leave float32's normal range and count as 0 on the CPU; above
some 1e9 their sums overflow, which makes losses infinite and capacities 0.

A compiler or :func:`torch.export.export` sees no values: offsets are then checked by the fused back ends on the CPU,
by none in the reference. An exported program gives gradients by ``impl="reference"`` alone.

Source: SAFR, *Neuron Redistribution for Interpretability*, arXiv 2501.16374.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safr_fast import arguments, reference
from safr_fast.ops import dispatch, sequence_parallel
from safr_fast.ops import importance as importance_op
from safr_fast.ops import interaction as interaction_op
from safr_fast.ops import row_energy as row_energy_op
from safr_fast.ops.dispatch import Impl
from safr_fast.precision import has_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if x.dtype == torch.float64 or not has_autocast(device):
        return x
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _reduce(terms: Tensor, count: Tensor | int, reduction: str) -> Tensor:
    if reduction == "none":
        return terms
    total = terms.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def row_energy(
    h: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Energy of each row of the Gram matrix off its diagonal, and the squared norm on it.

    .. math:: R_i = \sum_{j \neq i} (h_i \cdot h_j)^2, \qquad n2_i = h_i \cdot h_i

    Everything that SAFR defines on hidden representations follows from these two.

    Args:
        h: ``(..., T, E)``, or ``(N, E)`` with ``cu_seqlens``.
        mask: bool ``(..., T)``, true where a token is real.
        cu_seqlens: int32 ``(S + 1,)`` offsets of packed sequences; excludes ``mask``.
        group: ranks over which each sequence is spread, each with its own tokens ``(..., T, E)``, as many as it has:
            j runs over the tokens of all of them. The ranks exchange E×E moments alone, once forward and once backward,
            so all of them call this function, and its backward, in the same order. Excludes ``cu_seqlens``.
        impl: back end, see :mod:`safr_fast.functional`.

    Returns:
        ``(energy, squared_norm)``, each ``(..., T)``, in units of h⁴ and h²; 0 for padding. Of the rank's own tokens.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.
        BackendUnavailable: ``impl`` was named and cannot serve; the message says why and what to do.

    Source: the sums of SAFR Eq. 1–3 (arXiv 2501.16374).
    """
    arguments.check_hidden(h, mask, cu_seqlens)
    arguments.check_group(group, cu_seqlens)
    return _row_energy(_autocast(h), mask, cu_seqlens, group, impl)


def _row_energy(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, group: "ProcessGroup | None", impl: Impl
) -> tuple[Tensor, Tensor]:
    """Of checked arguments."""
    energy, squared_norm = row_energy_op.row_energy(h, mask, cu_seqlens, impl)
    if group is not None:
        energy = energy + sequence_parallel.energy_of_others(h, mask, group)
    return energy, squared_norm


def interference(h: Tensor, mask: Tensor | None = None, *, signed: bool = False) -> Tensor:
    r"""The interference matrix itself, for looking at: it is T×T, and the losses never make it.

    .. math:: I_{ij} = (h_i \cdot h_j)^2

    Args:
        h: ``(..., T, E)``.
        mask: bool ``(..., T)``, true where a token is real.
        signed: give :math:`h_i \cdot h_j`, whose sign tells alignment from opposition.

    Returns:
        ``(..., T, T)``, diagonal kept; rows and columns of padding are 0.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.

    Source: SAFR Eq. 1.
    """
    arguments.check_hidden(h, mask, None)
    gram = reference.gram(h, mask)
    return gram if signed else gram.square()


def polysemanticity(
    h: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 0.0,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""How much of a token's direction other tokens use too.

    .. math:: P_i = \sum_{j \neq i} (\hat h_i \cdot h_j)^2 = \frac{R_i}{(\lVert h_i \rVert + ε)^2}

    Args:
        h: ``(..., T, E)``, or ``(N, E)`` with ``cu_seqlens``.
        mask: bool ``(..., T)``, true where a token is real.
        eps: ε, in units of h; 0 as in the paper, 1e-5 in the released code.
        cu_seqlens: int32 ``(S + 1,)`` offsets of packed sequences; excludes ``mask``.
        impl: back end, see :mod:`safr_fast.functional`.

    Returns:
        ``(..., T)`` in units of h²; 0 for padding and for zero rows.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`row_energy`; ``eps`` below 0.

    Source: SAFR Eq. 2.
    """
    arguments.check_number("eps", eps, least=0)
    energy, squared_norm = row_energy(h, mask, cu_seqlens=cu_seqlens, impl=impl)
    alive = squared_norm != 0  # NaN stays
    squared_norm = torch.where(alive, squared_norm, 1.0)
    return torch.where(alive, energy / (squared_norm if eps == 0 else (squared_norm.sqrt() + eps).square()), 0.0)


def capacity(h: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    r"""Share of each token's representation that is its own.

    .. math:: C_i = \frac{(h_i \cdot h_i)^2}{\sum_j (h_i \cdot h_j)^2} = \frac{n2_i}{n2_i + P_i}

    Works on any rows: of a feature dictionary ``(N, d)``, a row for each feature, it is the dimensionality of each. The
    decoder of a sparse autoencoder, an ``nn.Linear(features, d)``, has them as columns: ``capacity(decoder.weight.T)``.
    Longer texts share the same E dimensions, so means over texts of different lengths do not compare.

    Args:
        h: ``(..., T, E)``, or ``(N, E)`` with ``cu_seqlens``.
        mask: bool ``(..., T)``, true where a token is real.
        cu_seqlens: int32 ``(S + 1,)`` offsets of packed sequences; excludes ``mask``.
        impl: back end, see :mod:`safr_fast.functional`.

    Returns:
        ``(..., T)`` in ``[0, 1]``, summing to at most min(T, E) over a sample; 0 for padding and for zero rows.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`row_energy`.

    Source: SAFR Eq. 3; the feature dimensionality of Elhage et al. 2022, *Toy Models of Superposition*.
    """
    energy, squared_norm = row_energy(h, mask, cu_seqlens=cu_seqlens, impl=impl)
    alive = squared_norm != 0  # NaN stays
    squared_norm = torch.where(alive, squared_norm, 1.0)
    # Through P rather than n2²: the fourth power of a small gate underflows.
    return torch.where(alive, squared_norm / (squared_norm + energy / squared_norm), 0.0)


def importance_loss(
    h: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 0.0,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Asks tokens for monosemantic representations; ``h`` is weighted by importance (VMASK's gate) beforehand.

    .. math:: t_i = \sqrt{P_i / E}, \qquad L = \sum_i t_i \quad\text{or}\quad \text{mean}_i\, t_i

    Args:
        h: ``(..., T, E)``, or ``(N, E)`` with ``cu_seqlens``.
        mask: bool ``(..., T)``, true where a token is real.
        eps: ε of :func:`polysemanticity`; 0 as in the paper, 1e-5 in the released code.
        reduction: ``"mean"`` over real tokens (the released code's), ``"sum"`` (the paper's), or ``"none"``: ``t_i``.
        cu_seqlens: int32 ``(S + 1,)`` offsets of packed sequences; excludes ``mask``.
        group: ranks over which each sequence is spread, as for :func:`row_energy`. The loss is that of all tokens, the
            same on each rank; if each rank calls backward on it, each has the gradient of its own tokens.
        impl: back end, see :mod:`safr_fast.functional`.

    Returns:
        A scalar, or ``(..., T)``; in units of h. The gradient at ``P_i = 0`` is taken as 0.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`polysemanticity`; no such ``reduction``.

    Source: SAFR Eq. 4 and the authors' code.
    """
    arguments.check_reduction(reduction)
    arguments.check_number("eps", eps, least=0)
    arguments.check_hidden(h, mask, cu_seqlens)
    arguments.check_group(group, cu_seqlens)
    h = _autocast(h)
    chosen = dispatch.choose(impl, h, mask, cu_seqlens)
    if chosen != "reference" and group is None and reduction != "none":
        return importance_op.importance(h, mask, cu_seqlens, eps, reduction == "mean", chosen)
    energy, squared_norm = _row_energy(h, mask, cu_seqlens, group, impl)
    alive = (energy != 0) & (squared_norm != 0)  # NaN stays
    energy, squared_norm = torch.where(alive, energy, 1.0), torch.where(alive, squared_norm, 1.0)
    # √R over a norm rather than √P: R / n2 of tiny rows underflows.
    terms = torch.where(alive, energy.sqrt() / (squared_norm.sqrt() + eps), 0.0) / math.sqrt(max(h.shape[-1], 1))
    count = row_energy_op.real_tokens(h, mask, cu_seqlens)
    if group is not None and reduction != "none":
        terms = sequence_parallel.sum_over_ranks(terms.sum(), group)
        if not isinstance(count, Tensor):
            count = torch.full((), count, dtype=torch.int64, device=h.device)  # not copied there, which would wait
        count = sequence_parallel.sum_over_ranks(count, group)
    return _reduce(terms, count, reduction)


def interaction_loss(
    attention: Tensor,
    mask: Tensor | None = None,
    *,
    squared: bool = True,
    exclude_diagonal: bool = False,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Lets strongly attending pairs share neurons: attention falls on pairs whose attention rows overlap.

    .. math:: L = \frac{1}{T^2} \sum_{ij} A_{ij} \bigl(1 - φ(G_{ij})\bigr), \qquad G = A A^\top

    of each sample and head, over its real tokens, T of them; 0 for a sample without any. If the weights are a softmax
    of queries and keys at hand, :func:`interaction_loss_from_qk` never stores them.

    Args:
        attention: ``(B, H, T, T)`` weights, row *i* what query *i* pays to each key, before dropout: a row that does
            not sum to 1 may have an overlap above 1, and the loss falls below 0. :class:`torch.nn.MultiheadAttention`
            returns them after it; go by its queries and keys then.
        mask: bool ``(B, T)``, true where a token is real. Weights of other keys are left out, and what remains of a row
            is taken as it is.
        squared: φ(x) = x² as in the paper, else φ(x) = x as in the released code.
        exclude_diagonal: set the diagonal of G to 0, as the released code does.
        reduction: ``"mean"`` over samples and heads, ``"sum"`` over both, or ``"none"``.
        workspace_bytes: of ``"triton"``: what the T×T matrices of the heads in work may take at a time, though never
            less than one head's. 512 MiB if None. Shows in no bit of the result.
        impl: back end, see :mod:`safr_fast.functional`.

    Returns:
        A scalar, or ``(B, H)``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name; no such ``reduction``.
        BackendUnavailable: ``impl`` was named and cannot serve; the message says why and what to do.

    Source: SAFR Eq. 5 and the authors' code.
    """
    arguments.check_attention(attention, mask)
    arguments.check_form(squared, exclude_diagonal, reduction)
    arguments.check_bytes("workspace_bytes", workspace_bytes)
    return interaction_op.interaction(attention, mask, squared, exclude_diagonal, reduction, impl, workspace_bytes)


def interaction_loss_from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    squared: bool = True,
    exclude_diagonal: bool = False,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    workspace_bytes: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r""":func:`interaction_loss` of :math:`A = \mathrm{softmax}(\text{scale} \cdot q k^\top)`, which is never stored.

    Beside :func:`torch.nn.functional.scaled_dot_product_attention`, which does not return its weights.

    Args:
        q: ``(B, H, T, D)``, or packed ``(N, H, D)`` with ``cu_seqlens``.
        k: the same, with H or fewer heads: grouped keys, query head h uses key head ``h // (H // key heads)``.
        mask: bool ``(B, T)``, true where a token is real: padding neither attends nor is attended to.
        scale: of the scores; ``1/√D`` if None.
        is_causal: token *i* attends to *j* ≤ *i*.
        squared: φ(x) = x² as in the paper, else φ(x) = x as in the released code.
        exclude_diagonal: set the diagonal of G to 0, as the released code does.
        reduction: ``"mean"`` over samples and heads, ``"sum"`` over both, or ``"none"``.
        cu_seqlens: int32 ``(S + 1,)`` offsets of packed sequences; excludes ``mask``.
        max_seqlen: tokens that no packed sequence exceeds; N if None. "triton" works in strips of that width, and in
            more launches the fewer of them fit the workspace; shows in no bit of the result. A longer sequence raises
            on the CPU; "triton", which would have to wait for the device, makes its loss NaN.
        workspace_bytes: as for :func:`interaction_loss`.
        impl: back end, see :mod:`safr_fast.functional`.

    Returns:
        A scalar, or ``(B, H)``; ``(S, H)`` for packed input.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`interaction_loss`.

    Source: SAFR Eq. 5 and the authors' code.
    """
    arguments.check_floating("q", q)
    arguments.check_floating("k", k)
    q, k = _autocast(q), _autocast(k)
    arguments.check_query_key(q, k, mask, cu_seqlens)
    arguments.check_max_seqlen(max_seqlen, cu_seqlens)
    arguments.check_form(squared, exclude_diagonal, reduction)
    arguments.check_flag("is_causal", is_causal)
    arguments.check_bytes("workspace_bytes", workspace_bytes)
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    arguments.check_number("scale", scale)
    form = (float(scale), is_causal, squared, exclude_diagonal, reduction)
    return interaction_op.interaction_from_qk(q, k, mask, cu_seqlens, *form, impl, workspace_bytes, max_seqlen)
