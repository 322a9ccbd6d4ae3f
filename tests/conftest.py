import contextlib
import os
from collections.abc import Iterator

# Read when numpy and torch are imported: threads of several workers wait for each other on the cores they share.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton reads this at import: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import interpreted

        interpreted.make_quick()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes goes first, lest one worker be at it when the others are done."""
    items.sort(key=lambda item: item.path.name != "test_triton_compile.py")


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """What is read before it is written shows, whatever lay in memory."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training reads few generated reviews, whatever data set is named."""
    import ranks

    from safr_fast.training import loop

    monkeypatch.setattr(loop.data, "load", ranks.small_corpus)
