"""Whether Triton can serve here. Imports neither Triton nor a kernel: asking costs nothing."""

import functools
import importlib.metadata
import importlib.util
import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # bfloat16 products


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, as it reads the variable itself."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unavailable_reason(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why Triton kernels cannot serve tensors of this kind (or any at all), with the remedy; None if they can."""
    if not _installed():
        return "triton is not installed: it comes with PyTorch's GPU builds, or by `pip install triton`"
    if dtype is not None and dtype not in DTYPES:
        return f'{dtype} is not among {DTYPES}: cast, or use impl="reference"'
    if interpreting():
        if device_type not in (None, "cpu", "cuda"):
            return f'the tensors are on "{device_type}": move them to the CPU or a GPU'
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies the raw bits of bfloat16: use float16 or float32, or a GPU"
        return None
    if device_type not in (None, "cuda"):
        return f'the tensors are on "{device_type}": move them to a GPU, or set TRITON_INTERPRET=1 before the start'
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU: use one, or set TRITON_INTERPRET=1 before the start to run on the CPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return f'{name} has compute capability {major}.{minor}, the kernels need 8.0: use impl="reference"'
    return None


def description() -> str:
    """What serves, in a few words."""
    where = "interpreter" if interpreting() else torch.cuda.get_device_name()
    return f"Triton {importlib.metadata.version('triton')}, {where}"
