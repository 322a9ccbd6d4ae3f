"""The package as installed: what it exports, what importing it costs, and which back ends must be there."""

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import backend_names

import safr_fast as sf
from safr_fast.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_every_public_name_is_there_and_explained() -> None:
    for name in sf.__all__:
        assert getattr(sf, name).__doc__, name


@pytest.mark.parametrize("name", ["", ".evaluation", ".nn", ".report", ".training"])
def test_names_are_listed_before_they_are_loaded(name: str) -> None:
    module = importlib.import_module(f"safr_fast{name}")
    assert set(module.__all__) <= set(dir(module))


def test_a_missing_extra_is_named() -> None:
    code = """
import sys
sys.modules["scipy"] = None
try:
    from safr_fast.evaluation import bootstrap
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code) == 'scipy is not installed: pip install "safr-fast[evaluation]"'


def test_import_loads_no_torch_triton_or_extension() -> None:
    heavy = ("torch", "triton", "safr_fast._cpu")
    loaded = python(f"import sys, safr_fast; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]"


def test_a_call_on_the_cpu_does_not_load_triton() -> None:
    code = "import sys, torch, safr_fast; safr_fast.capacity(torch.ones(3, 2)); print('triton' in sys.modules)"
    assert python(code) == "False"


def test_the_kernels_folder_shadows_no_other_package() -> None:
    """transformers imports a package named `kernels` from PyPI."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: the package works through the reference")
def test_the_extension_was_built() -> None:
    """An install falls back to pure Python where the build fails: here it must not have."""
    assert any(name.startswith("cpp:") for name in backend_names())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_serves_in_its_interpreter_or_on_a_gpu() -> None:
    assert "triton" in backend_names()


def test_available_backends_explain_themselves() -> None:
    backends = {backend.name: backend for backend in sf.available_backends()}
    assert list(backends) == ["reference", "cpp", "triton"]
    assert all(backend.detail for backend in backends.values())


def test_a_named_back_end_never_falls_back() -> None:
    with pytest.raises(sf.BackendUnavailable, match=r'impl="cpp" cannot serve: .*float64.*impl="reference"'):
        sf.capacity(torch.ones(3, 2, dtype=torch.float64), impl="cpp")
    code = """
import torch, safr_fast
try:
    safr_fast.capacity(torch.ones(3, 2), impl="triton")
except safr_fast.BackendUnavailable as error:
    print(error)
"""
    message = python(code)
    assert 'impl="triton" cannot serve' in message
    assert "move them to a GPU" in message


def test_auto_says_so_once_when_it_must_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: "it was not built")
    dispatch._resolve.cache_clear()
    try:
        with pytest.warns(UserWarning, match='uses impl="reference".*it was not built'):
            assert dispatch.resolve("auto", torch.device("cpu"), torch.float32) == "reference"
        assert dispatch.resolve("auto", torch.device("cpu"), torch.float64) == "reference"
    finally:
        dispatch._resolve.cache_clear()


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has one way to say it")
@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_gpu"),
    [
        ("torch.set_float32_matmul_precision('medium')", "medium", "medium"),
        ("torch.backends.fp32_precision = 'tf32'", "high", "high"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "highest", "high"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "medium", "highest"),
        ("torch.backends.fp32_precision = 'ieee'", "highest", "highest"),
        (
            "torch.set_float32_matmul_precision('high'); torch.backends.mkldnn.matmul.fp32_precision = 'ieee'",
            "highest",
            "high",
        ),
    ],
)
def test_every_way_to_set_the_precision_is_understood(setting: str, on_cpu: str, on_gpu: str) -> None:
    code = f"""
import torch, safr_fast
from safr_fast.precision import matmul_precision
{setting}
h = torch.randn(2, 40, 16, requires_grad=True)
q = torch.randn(1, 2, 9, 4, requires_grad=True)
(safr_fast.importance_loss(h) + safr_fast.interaction_loss_from_qk(q, q)).backward()
assert h.grad.isfinite().all() and q.grad.isfinite().all()
assert "float32 products" in __import__("safr_fast.env").env.describe()
print(matmul_precision("cpu"), matmul_precision("cuda"))
"""
    assert python(code).split() == [on_cpu, on_gpu]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Two GPUs, the first too old, as far as asking for them goes."""
    from safr_fast.kernels import availability

    monkeypatch.setattr(availability, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (9, 0))[device.index])
    monkeypatch.setattr(torch.version, "hip", None)
    yield monkeypatch
    dispatch._resolve.cache_clear()


def test_each_gpu_is_judged_by_itself(gpus: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for order in ((0, 1), (1, 0)):
        dispatch._resolve.cache_clear()
        for index in order:
            device = torch.device("cuda", index)
            if index:
                assert dispatch.resolve("auto", device, torch.float32) == "triton"
            else:
                with pytest.warns(UserWarning, match=r"GPU 0 has compute capability 7.5, the kernels need 8.0"):
                    assert dispatch.resolve("auto", device, torch.float32) == "reference"


def test_a_triton_without_the_products_is_refused(gpus: pytest.MonkeyPatch) -> None:
    from safr_fast.kernels import availability

    for version, served in (("3.5.1", False), ("3.6.0+git1", True), ("4.0.0", True)):
        gpus.setattr(availability, "version", lambda version=version: version)
        reason = availability.unavailable_reason(torch.device("cuda", 1), torch.float32)
        assert (reason is None) == served
        assert served or "Triton 3.5.1 lacks products that the kernels take" in str(reason)


def test_triton_is_known_by_whatever_distribution_it_came_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from safr_fast.kernels import availability

    original = importlib.metadata.version

    def renamed(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return original("triton") if name == "triton-rocm" else original(name)

    monkeypatch.setattr(importlib.metadata, "version", renamed)
    for names in ({"triton": ["triton-rocm"]}, {}):
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda names=names: names)
        availability.version.cache_clear()
        assert availability.version() == original("triton")
    availability.version.cache_clear()
