"""Whether Triton can serve here. Imports neither Triton nor a kernel: asking costs nothing."""

import functools
import importlib.metadata
import importlib.util
import os
import re

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # bfloat16 products
OLDEST_TRITON = (3, 6)  # float32 products by way of bfloat16


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, as it reads the variable itself."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def version() -> str:
    """Triton's, whatever the distribution is called that it came in; empty where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return ""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # pytorch-triton, triton-rocm, triton-windows
        names = importlib.metadata.packages_distributions().get("triton", [])
        return importlib.metadata.version(names[0]) if names else importlib.import_module("triton").__version__


def _is_old() -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version())
    return numbers is not None and tuple(map(int, numbers.groups())) < OLDEST_TRITON


def unavailable_reason(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why Triton kernels cannot serve tensors of this kind (or any at all), with the remedy; None if they can."""
    if not version():
        return "triton is not installed: it comes with PyTorch's GPU builds, or by `pip install triton`"
    if dtype is not None and dtype not in DTYPES:
        return f'{dtype} is not among {DTYPES}: cast, or use impl="reference"'
    if interpreting():
        if device is not None and device.type not in ("cpu", "cuda"):
            return f'the tensors are on "{device.type}": move them to the CPU or a GPU'
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies the raw bits of bfloat16: use float16 or float32, or a GPU"
        return None
    if device is not None and device.type != "cuda":
        return f'the tensors are on "{device.type}": move them to a GPU, or set TRITON_INTERPRET=1 before the start'
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU: use one, or set TRITON_INTERPRET=1 before the start to run on the CPU"
    if _is_old():
        return (
            f"Triton {version()} lacks products that the kernels take; from 3.6 on it has them, which comes with "
            'PyTorch 2.10: update both, or use impl="reference"'
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return f'{name} has compute capability {major}.{minor}, the kernels need 8.0: use impl="reference"'
    return None


def description() -> str:
    """What serves, in a few words."""
    where = "interpreter" if interpreting() else torch.cuda.get_device_name()
    return f"Triton {version()}, {where}"
