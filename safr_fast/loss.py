"""The drop-in: a task loss plus SAFR's two regularisers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from safr_fast import arguments, functional
from safr_fast.ops.dispatch import Impl, check_impl

Pair = tuple[Tensor, Tensor]


class LossParts(NamedTuple):
    """The total and its terms before their weights; None where a term's weight is 0 and it was not computed."""

    total: Tensor
    task: Tensor
    importance: Tensor | None
    interaction: Tensor | None


class SAFRLoss(nn.Module):
    r"""``criterion(logits, target) + λ_importance · L_importance + λ_interaction · L_interaction``.

    ==============  ================================================  ==============================================
    ``variant``     importance                                        interaction
    ==============  ================================================  ==============================================
    ``"paper"``     sum over tokens of :math:`\sqrt{P_i / E}`, ε = 0  sum over heads; overlap squared, diagonal kept
    ``"released"``  mean over real tokens, ε = 1e-5                   mean over heads; overlap itself, diagonal left out
    ==============  ================================================  ==============================================

    They are made of :func:`safr_fast.importance_loss` and :func:`safr_fast.interaction_loss`. All but the released
    importance, whose mean is over the real tokens of the whole batch, are then means over samples. Several layers count
    as several heads: ``"paper"`` sums over them, ``"released"`` takes their mean.

    **Which λ corresponds.** With samples of T tokens and layers of H heads, L of them:

    * ``λ_importance("paper") = λ_importance("released") / (T · L)``: exactly, but for ε.
    * ``λ_interaction("paper") = λ_interaction("released") / (H · L)`` gives both terms the same weight; their forms
      differ, so their values do too.

    The λ that the SAFR paper reports belong to the released code, whose terms are means. The paper's own formulas sum
    over samples as well, which with a batch of B is another factor of B.

    **Accumulated gradients.** Means over samples are the same of one batch and of equal parts of it averaged. The
    released importance is not, where parts have different numbers of real tokens: weigh each part's by them.

    Under FSDP, pass what the model's ``forward`` returned: a tensor stashed on a module misses FSDP's hooks.

    Args:
        lambda_importance: weight of the importance term; at 0 it is not computed. Both may be set anew at any step.
        lambda_interaction: weight of the interaction term; at 0 it is not computed.
        variant: ``"paper"`` or ``"released"``, as above.
        criterion: the task loss, ``criterion(logits, target)``, a scalar; cross-entropy if None.
        is_causal: for ``qk``: the model attends to earlier tokens only.
        scale: for ``qk``: of the scores; ``1/√D`` if None.
        impl: back end, see :mod:`safr_fast.functional`.

    Example::

        loss_fn = SAFRLoss(lambda_importance=1.0, lambda_interaction=0.1, variant="released")
        loss = loss_fn(logits, labels, hidden=gated_embeddings, qk=(q, k), mask=mask)
        loss.backward()

    A model that computes its own task loss hands it through::

        loss_fn = SAFRLoss(variant="released", criterion=lambda loss, _: loss)
        loss = loss_fn(output.loss, None, hidden=gated_embeddings, qk=qk, mask=mask)

    Source: SAFR Eq. 4–6 (arXiv 2501.16374) and the authors' code.
    """

    def __init__(
        self,
        lambda_importance: float = 1.0,
        lambda_interaction: float = 1.0,
        *,
        variant: Literal["paper", "released"] = "paper",
        criterion: Callable[..., Tensor] | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        arguments.check_flag("is_causal", is_causal)
        if scale is not None:
            arguments.check_number("scale", scale)
        check_impl(impl)
        if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
            raise TypeError(
                f"criterion must be a module or function of (logits, target), got {arguments.describe(criterion)}"
            )
        self.lambda_importance = lambda_importance
        self.lambda_interaction = lambda_interaction
        self.variant = variant
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.is_causal = is_causal
        self.scale = scale
        self.impl: Impl = impl

    @property
    def lambda_importance(self) -> float:
        return self._lambda_importance

    @lambda_importance.setter
    def lambda_importance(self, value: float) -> None:
        arguments.check_number("lambda_importance", value, least=0)
        self._lambda_importance = value

    @property
    def lambda_interaction(self) -> float:
        return self._lambda_interaction

    @lambda_interaction.setter
    def lambda_interaction(self, value: float) -> None:
        arguments.check_number("lambda_interaction", value, least=0)
        self._lambda_interaction = value

    @property
    def variant(self) -> Literal["paper", "released"]:
        return self._variant

    @variant.setter
    def variant(self, value: Literal["paper", "released"]) -> None:
        if value not in ("paper", "released"):
            raise ValueError(f'variant must be "paper" or "released", got {value!r}')
        self._variant = value

    def extra_repr(self) -> str:
        return (
            f"lambda_importance={self.lambda_importance}, lambda_interaction={self.lambda_interaction}, "
            f"variant={self.variant!r}, is_causal={self.is_causal}, scale={self.scale}, impl={self.impl!r}"
        )

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None,
        *,
        hidden: Tensor | Sequence[Tensor] | None = None,
        attention: Tensor | Sequence[Tensor] | None = None,
        qk: Pair | list[Pair] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        return_parts: bool = False,
    ) -> Tensor | LossParts:
        """
        Args:
            logits: what ``criterion`` takes first.
            target: what it takes second.
            hidden: ``(B, T, E)`` representations for the importance term, weighted by VMASK's gate; or packed
                ``(N, E)``; or several.
            attention: ``(B, H, T, T)`` weights for the interaction term, before dropout; or several. Excludes ``qk``.
            qk: ``(q, k)``, each ``(B, H, T, D)`` or packed ``(N, H, D)``, for the same without stored weights; or a
                list of such pairs, one for each layer.
            mask: bool ``(B, T)``, true where a token is real: the opposite of PyTorch's ``key_padding_mask``.
            cu_seqlens: int32 ``(S + 1,)`` offsets of packed samples; excludes ``mask`` and ``attention``.
            max_seqlen: tokens that no packed sample exceeds, for ``qk``: see
                :func:`safr_fast.interaction_loss_from_qk`.
            return_parts: give :class:`LossParts` instead of the total.

        Raises:
            ValueError: a term with a positive weight lacks its input, or has two; ``attention`` with ``cu_seqlens``;
                the terms' inputs are not of the same tokens; the task loss is no scalar.
        """
        task: Tensor = self.criterion(logits, target)
        if not isinstance(task, Tensor) or task.dim() > 0:
            raise ValueError(f"criterion must give a scalar tensor, got {arguments.describe(task)}")
        total = task
        importance = interaction = None
        if self.lambda_importance > 0:
            importance = self._importance(hidden, mask, cu_seqlens)
            total = total + self.lambda_importance * importance
        if self.lambda_interaction > 0:
            interaction = self._interaction(attention, qk, mask, cu_seqlens, max_seqlen)
            total = total + self.lambda_interaction * interaction
        if importance is not None and interaction is not None:
            _check_same_tokens(hidden, attention, qk, packed=cu_seqlens is not None)
        return LossParts(total, task, importance, interaction) if return_parts else total

    def _importance(
        self, hidden: Tensor | Sequence[Tensor] | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if hidden is None:
            raise ValueError("hidden must be given for the importance term; or set lambda_importance=0")
        layers = _layers("hidden", hidden)
        eps = 1e-5 if self.variant == "released" else 0.0
        form: dict[str, Any] = {"eps": eps, "reduction": self._reduction, "impl": self.impl}
        terms = [functional.importance_loss(h, mask, cu_seqlens=cu_seqlens, **form) for h in layers]
        return self._pool("hidden", terms, [_samples(math.prod(h.shape[:-2]), cu_seqlens) for h in layers])

    def _interaction(
        self,
        attention: Tensor | Sequence[Tensor] | None,
        qk: Pair | list[Pair] | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> Tensor:
        released = self.variant == "released"
        form: dict[str, Any] = {
            "squared": not released,
            "exclude_diagonal": released,
            "reduction": self._reduction,
            "impl": self.impl,
        }
        if attention is not None and qk is None:
            if cu_seqlens is not None or max_seqlen is not None:
                raise ValueError("cu_seqlens goes with qk: stored attention is padded (B, H, T, T), pass mask with it")
            layers = _layers("attention", attention)
            terms = [functional.interaction_loss(weights, mask, **form) for weights in layers]
            return self._pool("attention", terms, [weights.shape[0] for weights in layers])
        if qk is not None and attention is None:
            pairs = _pairs(qk)
            form |= {"scale": self.scale, "is_causal": self.is_causal}
            form |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            terms = [functional.interaction_loss_from_qk(q, k, mask, **form) for q, k in pairs]
            return self._pool("qk", terms, [_samples(q.shape[0], cu_seqlens) for q, _ in pairs])
        given = "neither" if qk is None else "both"
        raise ValueError(
            f"the interaction term takes attention or qk, got {given}: pass one; or set lambda_interaction=0"
        )

    @property
    def _reduction(self) -> str:
        return "mean" if self.variant == "released" else "sum"

    def _pool(self, name: str, terms: list[Tensor], samples: list[int]) -> Tensor:
        """The layers' terms in one: means averaged, sums added up per sample."""
        if not terms:
            raise ValueError(f"{name} must hold at least one layer, got an empty sequence")
        if self.variant == "released":
            return torch.stack(terms).mean()
        return torch.stack([term / max(count, 1) for term, count in zip(terms, samples, strict=True)]).sum()


def _samples(padded: int, cu_seqlens: Tensor | None) -> int:
    return padded if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _layers(name: str, layers: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(layers, Tensor):
        return [layers]
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, Tensor) for layer in layers):
        nothing = isinstance(layers, (list, tuple)) and any(layer is None for layer in layers)
        remedy = ": a model that gives no weights gives queries and keys to record_qk" if nothing else ""
        raise TypeError(f"{name} must be a tensor or a list or tuple of tensors, got {arguments.kinds(layers)}{remedy}")
    return layers


def _pairs(qk: Pair | list[Pair]) -> list[Pair]:
    """A tuple is one pair: of two layers, all queries and all keys in a tuple each would look like two pairs."""
    pairs = [qk] if isinstance(qk, (list, tuple)) and len(qk) > 0 and isinstance(qk[0], Tensor) else qk
    if not isinstance(pairs, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)
        for pair in pairs
    ):
        raise TypeError(
            f"qk must be (q, k), two tensors, or of several layers a list [(q, k), ...], got {arguments.kinds(qk)}"
        )
    return pairs


def _check_same_tokens(hidden: Any, attention: Any, qk: Any, *, packed: bool) -> None:
    """Without a mask nothing else tells ``(T, B, E)`` from ``(B, T, E)``."""
    grids = [(tuple(h.shape[:-1]), "hidden", h) for h in _layers("hidden", hidden)]
    if attention is not None:
        grids += [((a.shape[0], a.shape[-1]), "attention", a) for a in _layers("attention", attention)]
    else:
        grids += [(q.shape[:1] if packed else (q.shape[0], q.shape[2]), "q", q) for q, _ in _pairs(qk)]
    # Compared one by one: a set of them would tie compiled code to their numbers.
    if any(tuple(grid) != grids[0][0] for grid, _, _ in grids):
        form = "(N, E) and (N, H, D)" if packed else "(B, T, E), (B, H, T, T) and (B, H, T, D)"
        got = ", ".join(dict.fromkeys(f"{name} {tuple(x.shape)}" for _, name, x in grids))
        raise ValueError(f"hidden, attention and q must be of the same tokens, {form}, got {got}")
