"""How exactly float32 is to be multiplied, as PyTorch was told, and whether it may be cast before."""

import torch

_BY_BACKEND = {"tf32": "high", "bf16": "medium"}


def matmul_precision(device_type: str) -> str:
    """``"highest"``, ``"high"`` or ``"medium"``, whichever of PyTorch's two ways to say it was taken.

    Setting ``torch.backends.fp32_precision``, or its like for one kind of device, leaves
    :func:`torch.get_float32_matmul_precision` as it was, or makes it raise.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        return _BY_BACKEND.get(_of_backend(device_type), "highest")
    if precision != "highest" and _of_backend(device_type) == "ieee":
        return "highest"
    return precision


def _of_backend(device_type: str) -> str:
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return getattr(backend.matmul, "fp32_precision", "none")  # PyTorch has it since 2.9


def has_autocast(device_type: str) -> bool:
    """Whether :class:`torch.autocast` knows the device; it does not know ``meta``."""
    return torch.amp.is_autocast_available(device_type)


# The compiler of PyTorch 2.11 cannot trace it; the mark is explained in ops/dispatch.py.
vars(has_autocast)["_dynamo_marked_constant"] = True
