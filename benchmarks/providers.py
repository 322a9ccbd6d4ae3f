"""Ours, at every precision that makes a difference on this machine, beside the formulas of a user without us."""

from collections.abc import Sequence
from functools import cache

import torch
from comparison import Loss, Provider, exact_gradients, gradients
from formulas import compiled
from torch import Tensor

import safr_fast as sf

ROUNDING_RIVALS_BELOW = 2048  # tokens, so that the run ends in time


def precisions() -> tuple[str, ...]:
    """Those that differ in their float32 products: by splits into bfloat16 on AMX, at ``medium`` with AVX-512 BF16."""
    cpp = next(backend for backend in sf.available_backends() if backend.name == "cpp")
    level = cpp.detail.split("level ")[-1].split()[0]
    return {"amx": ("highest", "high", "medium"), "avx512_bf16": ("highest", "medium")}.get(level, ("highest",))


@cache
def own_precision(precision: str) -> str:
    """``highest`` where PyTorch's own products are the same at ``precision``, as at ``high`` on most CPUs."""
    before = torch.get_float32_matmul_precision()
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    products = []
    for setting in (precision, "highest"):
        torch.set_float32_matmul_precision(setting)
        products.append(a @ b)
    torch.set_float32_matmul_precision(before)
    return "highest" if torch.equal(*products) else precision


def all_providers(
    ours: Loss,
    plain: Loss,
    inputs: Sequence[Tensor],
    algebra: Loss | None = None,
    *,
    dynamic: bool = True,
    name: str = "ours",
) -> list[Provider]:
    """Forward and backward; the first is ours at ``highest``. What is rounded to bfloat16, where the machine multiplies
    it, is so before the oracle.

    On more than one thread only the plain formula is a rival, so that the run ends in time. ``dynamic``: how it is
    compiled. ``name``: of ours.
    """
    exact = exact_gradients(plain, inputs)
    one_thread = torch.get_num_threads() == 1
    rounding_rivals = inputs[0].shape[-2] < ROUNDING_RIVALS_BELOW

    def provider(title: str, loss: Loss, precision: str = "highest") -> Provider:
        return Provider(title, lambda: gradients(loss, inputs), exact, precision, warm_up=loss is not plain)

    providers = [provider(f"{name} {precision}", ours, precision) for precision in precisions()]
    providers.append(provider("eager", plain))
    if "medium" in precisions():  # elsewhere ours is as fast as in float32, and PyTorch's takes minutes
        rounded = [x.bfloat16() for x in inputs]
        exact_of_rounded = exact_gradients(plain, rounded)
        providers.append(Provider(f"{name} bfloat16", lambda: gradients(ours, rounded), exact_of_rounded))
        if one_thread and rounding_rivals:
            providers.append(Provider("eager bfloat16", lambda: gradients(plain, rounded), exact_of_rounded))
    if one_thread:
        if rounding_rivals:
            providers += [provider(f"eager {p}", plain, p) for p in precisions()[1:] if own_precision(p) == p]
        providers.append(provider("compiled", compiled(plain, dynamic)))
        if algebra is not None:
            providers.append(provider("algebra compiled", compiled(algebra)))
    return providers
