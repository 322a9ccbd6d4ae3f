"""How exactly float32 is to be multiplied, as PyTorch was told."""

import torch

_BY_BACKEND = {"tf32": "high", "bf16": "medium"}


def matmul_precision(device_type: str) -> str:
    """``"highest"``, ``"high"`` or ``"medium"``, whichever of PyTorch's two ways to say it was taken.

    :func:`torch.get_float32_matmul_precision` raises once ``torch.backends.fp32_precision`` or its like for one kind of
    device has been set to anything else.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        return _BY_BACKEND.get(backend.matmul.fp32_precision, "highest")
