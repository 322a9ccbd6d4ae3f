"""How many times the device is asked to do something: at short lengths that is what a loss costs."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from support import lengths_mask, needs_interpreter, normal, offsets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import safr_fast as sf

pytestmark = [needs_interpreter, pytest.mark.usefixtures("uninitialised_is_nan")]
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
    """Of the counter itself: the gradient of energies by the feature moment takes its norm with PyTorch."""

    def total(h: Tensor) -> Tensor:
        energy, norm = sf.row_energy(h, impl="triton")
        return (energy + norm).sum()

    _, backward = forward_and_backward(total, [normal(2, 300, 16)], monkeypatch)
    assert "linalg_vector_norm" in backward


@pytest.fixture
def ticket() -> None:
    """Made by the first launch of a stream, for all that follow."""
    from safr_fast.kernels import importance_launch

    importance_launch._ticket(torch.device("cpu"))


def importance_launches(
    layout: str, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> tuple[list[str], list[str]]:
    """Of two sequences, the second of which is short unless the layout is dense."""
    h = normal(2, tokens, width, dtype=dtype)
    mask = cu_seqlens = None
    if layout == "masked":
        mask = lengths_mask([tokens, 7], tokens)
    elif layout == "packed":
        h, cu_seqlens = h.flatten(0, 1)[: tokens + 7], offsets([tokens, 7])

    def loss(h: Tensor) -> Tensor:
        return sf.importance_loss(h, mask, cu_seqlens=cu_seqlens, impl="triton")

    return forward_and_backward(loss, [h], monkeypatch)


each_layout = pytest.mark.parametrize("layout", ["dense", "masked", "packed"])


@each_layout
@pytest.mark.parametrize(("tokens", "width"), [(64, 32), (300, 160)], ids=["a block", "tiles"])
def test_the_importance_loss_takes_one_launch_each_way(
    tokens: int, width: int, layout: str, ticket: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = importance_launches(layout, tokens, width, monkeypatch)
    assert forward == ["row_energy_wide_kernel"]
    assert backward == ["row_energy_wide_backward_kernel"]


@each_layout
def test_sixteen_bits_take_no_more_up_to_512_tokens(layout: str, ticket: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = importance_launches(layout, 505 if layout == "packed" else 512, 16, monkeypatch, torch.float16)
    assert forward == ["row_energy_token_kernel"]
    assert backward == ["row_energy_wide_backward_kernel"]


def test_kernels_that_keep_whole_rows_take_no_more(ticket: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from safr_fast.kernels import configs

    monkeypatch.setattr(configs, "keeps_rows", lambda bits, width: True)  # bfloat16's backward, in the interpreter
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs._OVERRIDES["interpreter"], ("token", 32), configs._CONFIGS["token", 16])
        patch.setitem(configs._OVERRIDES["interpreter"], ("token_backward", 32), configs._CONFIGS["token_backward", 16])
        forward, backward = importance_launches("dense", 64, 32, monkeypatch)
    assert forward == ["row_energy_token_kernel"]
    assert backward == ["row_energy_token_backward_kernel"]


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_feature_moment_takes_three_launches_each_way(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = importance_launches(layout, 530 if dtype == torch.float16 else 270, 32, monkeypatch, dtype)
    and_short = "" if layout == "dense" else "_and_short"
    assert forward == [f"moment{and_short}_kernel", "moment_total_kernel", "quadratic_form_kernel"]
    assert backward == [f"weighted_moment{and_short}_kernel", "moment_total_kernel", "moment_backward_kernel"]


@each_layout
def test_it_takes_two_where_the_samples_fill_a_gpu(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from safr_fast.kernels import configs

    monkeypatch.setattr(configs, "PROGRAMS", 1)
    forward, backward = importance_launches(layout, 300, 32, monkeypatch)
    and_short = "" if layout == "dense" else "_and_short"
    assert forward == [f"moment{and_short}_kernel", "quadratic_form_kernel"]
    assert backward == [f"weighted_moment{and_short}_kernel", "moment_backward_kernel"]


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


def test_packed_interaction_takes_launches_by_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``max_seqlen`` a strip is as wide as all tokens, and ever fewer fit the workspace."""

    def launches(sequences: int, max_seqlen: int | None) -> int:
        q, cu_seqlens = normal(16 * sequences, 1, 8), offsets([16] * sequences)
        form = {"workspace_bytes": 1 << 20, "max_seqlen": max_seqlen, "reduction": "sum", "impl": "triton"}
        with counted(monkeypatch) as names:
            sf.interaction_loss_from_qk(q, q, cu_seqlens=cu_seqlens, **form)
        return names.count("packed_gram_kernel")

    assert launches(16, None) == 3
    assert launches(32, None) == 10
    assert launches(16, 16) == 1
    assert launches(32, 16) == 2
