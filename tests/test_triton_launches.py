"""How many times the device is asked to do something: at short lengths that is what a loss costs."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from support import DEVICE, lengths_mask, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import safr_fast as sf

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or not any(backend.name == "triton" and backend.available for backend in sf.available_backends()),
    reason="Triton's interpreter is not at hand",
)
# What PyTorch does on the host alone.
FREE = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "reshape", "detach", "expand", "alias", "transpose",
        "slice", "select", "unsqueeze", "squeeze", "as_strided", "t", "unbind", "split", "empty_strided"}  # fmt: skip

LAUNCHERS = ("row_energy", "row_energy_backward", "importance", "importance_backward", "interaction",
             "interaction_from_qk")  # fmt: skip


class Launches(TorchDispatchMode):
    """Names of the operations of PyTorch that start a kernel, and of the kernels of Triton."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.interpreting = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE and function.namespace != "safr_fast" and not self.interpreting:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def inside(self, launcher: Callable[..., object]) -> Callable[..., object]:
        """``launcher`` with its operations counted where it runs beneath an operation of ours, which hides them."""

        def counting(*args: object, **kwargs: object) -> object:
            with contextlib.nullcontext() if _get_current_dispatch_mode() is self else self:
                return launcher(*args, **kwargs)

        return counting


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    from safr_fast.kernels import launch
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__
    with Launches() as launches, monkeypatch.context() as patch:

        def count(self: GridExecutor, *args: object, **kwargs: object) -> None:
            launches.names.append(self.fn.__name__)
            launches.interpreting = True
            run(self, *args, **kwargs)
            launches.interpreting = False

        patch.setattr(GridExecutor, "__call__", count)
        for name in LAUNCHERS:
            patch.setattr(launch, name, launches.inside(getattr(launch, name)))
        yield launches.names


def forward_and_backward(
    function: Callable[..., Tensor], inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    leaves = [x.requires_grad_() for x in inputs]
    with counted(monkeypatch) as forward:
        loss = function(*leaves)
    one = torch.ones_like(loss)
    with counted(monkeypatch) as backward:
        torch.autograd.grad(loss, leaves, one)
    return forward, backward


def test_what_an_operation_launches_inside_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the counter itself: the feature moment takes its norm with PyTorch."""
    forward, _ = forward_and_backward(lambda h: sf.importance_loss(h, impl="triton"), [normal(2, 300, 16)], monkeypatch)
    assert "linalg_vector_norm" in forward


@pytest.mark.parametrize(("tokens", "width"), [(64, 32), (300, 160)])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_importance_loss_takes_six_launches(
    tokens: int, width: int, masked: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = lengths_mask([tokens, 7], tokens) if masked else None
    forward, backward = forward_and_backward(
        lambda h: sf.importance_loss(h, mask, reduction=reduction, impl="triton"),
        [normal(2, tokens, width)],
        monkeypatch,
    )
    find_tokens = ["span_kernel"] if masked else []
    assert forward == [*find_tokens, "row_energy_wide_kernel", "importance_kernel"]
    assert backward == ["importance_backward_kernel", *find_tokens, "row_energy_wide_backward_kernel"]


def test_sixteen_bits_take_no_more_up_to_512_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    h = normal(1, 512, 16, dtype=torch.float16)
    forward, backward = forward_and_backward(lambda h: sf.importance_loss(h, impl="triton"), [h], monkeypatch)
    assert forward == ["row_energy_token_kernel", "importance_kernel"]
    assert backward == ["importance_backward_kernel", "row_energy_wide_backward_kernel"]


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_the_interaction_of_short_samples_takes_one_launch(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from safr_fast.kernels import launch

    mask = lengths_mask([40, 7], 40) if masked else None
    q, attention = normal(2, 2, 40, 16), normal(2, 2, 40, 40).softmax(-1)
    form = {"squared": True, "exclude_diagonal": False, "need_grad": True}
    with counted(monkeypatch) as launches:
        launch.interaction_from_qk(q, q, mask, None, scale=0.3, is_causal=False, **form)
    assert launches == ["interaction_block_kernel"]
    with counted(monkeypatch) as launches:
        launch.interaction(attention, mask, **form)
    assert launches == ["attention_block_kernel"]
