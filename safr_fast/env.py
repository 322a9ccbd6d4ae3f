"""What this installation is and can do, for the reader and for bug reports."""

import importlib.metadata
import os
import platform

import torch

import safr_fast
from safr_fast.precision import matmul_precision

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tyro", "tqdm", "datasets", "transformers")
_VARIABLES = ("SAFR_FAST_", "OMP_", "MKL_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")


def describe() -> str:
    """Versions, back ends with what serves or why not, devices, threads, and environment variables that matter."""
    sections = {
        "versions": _versions(),
        "back ends": [
            (backend.name, f"{'yes' if backend.available else 'no'}: {backend.detail}")
            for backend in safr_fast.available_backends()
        ],
        "machine": _machine(),
        "environment": [(name, value) for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
        or [("", "nothing set that matters here")],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join(lines)


def _versions() -> list[tuple[str, str]]:
    rows = [("safr-fast", safr_fast.__version__), ("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("system", platform.platform()),
        ("processor", f"{_processor()}, {os.cpu_count()} CPUs"),
        ("instruction set", f"{torch.backends.cpu.get_cpu_capability()} in PyTorch"),
        ("threads", f"{torch.get_num_threads()} in PyTorch"),
        ("float32 products", f"{matmul_precision('cpu')} on the CPU, {matmul_precision('cuda')} on a GPU"),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none that PyTorch can use")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        rows.append(
            (f"GPU {index}", f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}")
        )
    return rows


def _processor() -> str:
    """Linux tells the model in a file alone."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
