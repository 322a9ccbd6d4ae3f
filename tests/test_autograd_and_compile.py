"""What PyTorch expects of a function: derivatives, compilation, autocast, registration; for every back end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import (
    backend_names,
    device_of,
    every_backend,
    forced,
    lengths_mask,
    normal,
    offsets,
    relative_error,
    skip_unless_served,
    value_and_gradients,
)
from torch import Tensor, library
from torch._dynamo.exc import TorchDynamoException

import safr_fast as sf
from safr_fast.ops import first_derivative

TOKENS = 21


@dataclass(frozen=True)
class Call:
    """A public function applied to inputs that it can take."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]

    def on(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(x.to(device, dtype, copy=True) for x in self.inputs)


def hidden() -> tuple[Tensor]:
    return (normal(2, TOKENS, 16, seed=1),)


def attention() -> tuple[Tensor]:
    return (normal(2, 2, TOKENS, TOKENS, seed=2).softmax(-1),)


def query_key() -> tuple[Tensor, Tensor]:
    return normal(2, 4, TOKENS, 16, seed=3), normal(2, 2, TOKENS, 16, seed=4)


def mask_like(x: Tensor) -> Tensor:
    return lengths_mask([TOKENS, 7], TOKENS).to(x.device)


def packed(x: Tensor) -> Tensor:
    return offsets([TOKENS, 0, TOKENS], x.device.type)


def long_hidden() -> tuple[Tensor]:
    """Narrow enough for the C++ back end to go by the feature moment."""
    return (normal(2, 60, 8, seed=5),)


CALLS = {
    "row_energy": Call(lambda h, impl: sf.row_energy(h, impl=impl), hidden()),
    "polysemanticity": Call(lambda h, impl: sf.polysemanticity(h, mask_like(h), eps=1e-5, impl=impl), hidden()),
    "capacity": Call(lambda h, impl: sf.capacity(h, mask_like(h), impl=impl), hidden()),
    "importance_loss": Call(lambda h, impl: sf.importance_loss(h, mask_like(h), impl=impl), hidden()),
    "importance_loss packed": Call(
        lambda h, impl: sf.importance_loss(h.flatten(0, 1), cu_seqlens=packed(h), impl=impl), hidden()
    ),
    "importance_loss by the feature moment": Call(
        lambda h, impl: sf.importance_loss(h, lengths_mask([60, 44], 60).to(h.device), impl=impl), long_hidden()
    ),
    "importance_loss by the feature moment, packed": Call(
        lambda h, impl: sf.importance_loss(h.flatten(0, 1), cu_seqlens=offsets([50, 5, 60], h.device.type), impl=impl),
        long_hidden(),
    ),
    "interaction_loss": Call(
        lambda a, impl: sf.interaction_loss(a, mask_like(a), reduction="none", impl=impl), attention()
    ),
    "interaction_loss_from_qk": Call(
        lambda q, k, impl: sf.interaction_loss_from_qk(q, k, mask_like(q), is_causal=True, reduction="none", impl=impl),
        query_key(),
    ),
    "interaction_loss_from_qk packed": Call(
        lambda q, k, impl: sf.interaction_loss_from_qk(
            *(x.transpose(1, 2).flatten(0, 1) for x in (q, k)), cu_seqlens=packed(q), impl=impl
        ),
        query_key(),
    ),
}
each_call = pytest.mark.parametrize("name", CALLS)
# Where the compiler sees only which back end it is: one level of the C++ one stands for all.
one_backend_of_each = pytest.mark.parametrize(
    "backend", {name.partition(":")[0]: name for name in backend_names() if name != "reference"}.values()
)


def run(name: str, impl: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return value_and_gradients(lambda *x: CALLS[name].function(*x, impl=impl), inputs)


@each_call
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    inputs = [x.double().requires_grad_() for x in CALLS[name].inputs]

    def function(*x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return CALLS[name].function(*x, impl="reference")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every_backend(fused=True)
@each_call
def test_second_derivative_raises_and_says_what_to_use(name: str, backend: str) -> None:
    inputs = [x.requires_grad_() for x in CALLS[name].on(device_of(backend))]
    with forced(backend) as impl:
        outputs = CALLS[name].function(*inputs, impl=impl)
        loss = outputs.sum() if isinstance(outputs, Tensor) else outputs[0].sum()
        for gradient in torch.autograd.grad(loss, inputs, create_graph=True):
            for x in inputs:  # by one of them alone: ∂L/∂q depends on k, too
                with pytest.raises(RuntimeError, match=r'differentiates once.*impl="reference"'):
                    torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)


@every_backend()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_call
def test_gradients_of_many_outputs_at_once(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs = [x.requires_grad_() for x in CALLS[name].on(device_of(backend), dtype)]
    with forced(backend) as impl:
        outputs = CALLS[name].function(*inputs, impl=impl)
        output = outputs if isinstance(outputs, Tensor) else outputs[0]
        weights = normal(3, *output.shape, seed=6).to(output)
        batched = torch.autograd.grad(output, inputs, weights, is_grads_batched=True, retain_graph=True)
        single = [torch.autograd.grad(output, inputs, weight, retain_graph=True) for weight in weights]
        if impl != "reference":
            with pytest.raises(RuntimeError, match=r'differentiates once.*impl="reference"'):
                torch.autograd.grad(output, inputs, weights, is_grads_batched=True, create_graph=True)
    for found, expected in zip(batched, zip(*single, strict=True), strict=True):
        assert relative_error(found, torch.stack(expected)) < (1e-6 if dtype == torch.float32 else 1e-2)


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def check_forward_mode(name: str, backend: str, way: Callable[..., Any]) -> None:
    inputs = CALLS[name].on(device_of(backend))
    tangents = tuple(normal(*x.shape, seed=9).to(x.device) for x in inputs)

    def total(impl: str) -> Callable[..., Tensor]:
        def function(*x: Tensor) -> Tensor:
            outputs = CALLS[name].function(*x, impl=impl)
            return outputs.sum() if isinstance(outputs, Tensor) else outputs[0].sum()

        return function

    with forced(backend) as impl:
        with pytest.raises(
            (sf.BackendUnavailable, TorchDynamoException), match=r'forward-mode .* need impl="reference"'
        ):
            way(lambda *x: torch.func.jvp(total(impl), x, tangents))(*inputs)
        with pytest.warns(UserWarning, match='safr_fast uses impl="reference"'):
            _, derivative = way(lambda *x: torch.func.jvp(total("auto"), x, tangents))(*inputs)
    leaves = [x.requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(total("reference")(*leaves), leaves)
    expected = sum((gradient * tangent).sum().item() for gradient, tangent in zip(gradients, tangents, strict=True))
    assert derivative.item() == pytest.approx(expected, rel=1e-4)


@every_backend(fused=True)
@each_call
def test_derivatives_that_only_the_reference_has_are_its_own_or_refused(name: str, backend: str) -> None:
    check_forward_mode(name, backend, eagerly)


@one_backend_of_each
@pytest.mark.parametrize("name", ["importance_loss", "interaction_loss", "interaction_loss_from_qk"])
def test_forward_mode_compiled_is_the_references_or_refused(name: str, backend: str) -> None:
    check_forward_mode(name, backend, compiled)


def check_vmap(backend: str, way: Callable[..., Any]) -> None:
    h = normal(3, TOKENS, 16, device=device_of(backend)).requires_grad_()
    with forced(backend) as impl:
        served = way(torch.vmap(lambda x: sf.importance_loss(x, impl=impl)))
        with pytest.raises((sf.BackendUnavailable, TorchDynamoException), match=r'of a gradient need impl="reference"'):
            served(h)
        with pytest.warns(UserWarning, match='safr_fast uses impl="reference"'):
            losses = way(torch.vmap(sf.importance_loss))(h)
        with pytest.warns(UserWarning, match='safr_fast uses impl="reference"'):
            each = way(torch.vmap(torch.func.grad(sf.importance_loss)))(h.detach())
        (gradient,) = torch.autograd.grad(losses.sum(), h)
        with torch.no_grad():  # what takes no gradient is served
            plain = served(h)
    expected_losses = torch.stack([sf.importance_loss(x, impl="reference") for x in h])
    (expected,) = torch.autograd.grad(expected_losses.sum(), h)
    for result in (gradient, each):
        assert relative_error(result, expected) < 1e-5
    for result in (losses, plain):
        assert relative_error(result, expected_losses) < 1e-5


@every_backend(fused=True)
def test_gradients_through_vmap_are_the_references_or_refused(backend: str) -> None:
    check_vmap(backend, eagerly)


@one_backend_of_each
def test_gradients_through_vmap_compiled_are_the_references_or_refused(backend: str) -> None:
    check_vmap(backend, compiled)


@every_backend(fused=True)
def test_a_vmap_over_masks_or_queries_alone_is_the_references(backend: str) -> None:
    device = device_of(backend)
    h = normal(TOKENS, 16, device=device).requires_grad_()
    masks = torch.stack([lengths_mask([n], TOKENS)[0] for n in (3, TOKENS)]).to(device)
    qs, k = normal(2, 1, 2, TOKENS, 8, seed=1, device=device), normal(1, 2, TOKENS, 8, device=device).requires_grad_()
    calls: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
        "masks": (lambda mask, impl: sf.importance_loss(h, mask, impl=impl), masks, h),
        "queries": (lambda q, impl: sf.interaction_loss_from_qk(q, k, impl=impl), qs, k),
    }
    for function, over, leaf in calls.values():
        with forced(backend), pytest.warns(UserWarning, match='safr_fast uses impl="reference"'):
            together = torch.vmap(lambda x, call=function: call(x, "auto"))(over)
        apart = torch.stack([function(x, "reference") for x in over])
        results = [torch.autograd.grad(losses.sum(), leaf)[0] for losses in (together, apart)]
        assert relative_error(*results) < 1e-5


@every_backend()
@each_call
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole_forward_and_backward(name: str, backend: str, dynamic: bool) -> None:
    inputs = CALLS[name].on(device_of(backend))
    with forced(backend) as impl:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *x: CALLS[name].function(*x, impl=impl), fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        actual = value_and_gradients(compiled, inputs)
        expected = run(name, impl, inputs)
    for result, plain in zip(actual, expected, strict=True):
        assert relative_error(result, plain) < 1e-6


@every_backend()
@pytest.mark.parametrize("packed", [False, True])
def test_importance_is_not_specialised_on_the_number_of_samples_or_tokens(backend: str, packed: bool) -> None:
    """Long enough for the moments, of which each sample has one."""

    def sample(n: int) -> tuple[Tensor, ...]:
        h = normal(n, 300, 24, device=device_of(backend))
        return (h.flatten(0, 1), offsets([300] * n, device_of(backend))) if packed else (h,)

    with forced(backend) as impl:
        torch.compiler.reset()

        def loss(h: Tensor, *cu_seqlens: Tensor) -> Tensor:
            return sf.importance_loss(h, impl=impl, **({"cu_seqlens": cu_seqlens[0]} if packed else {}))

        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for n, again in ((2, False), (3, True)):
            h, *rest = sample(n)
            with torch._dynamo.config.patch(error_on_recompile=again):
                actual = value_and_gradients(lambda h, rest=rest: compiled(h, *rest), (h,))
            for result, plain in zip(
                actual, value_and_gradients(lambda h, rest=rest: loss(h, *rest), (h,)), strict=True
            ):
                assert relative_error(result, plain) < 1e-6


@every_backend()
def test_max_seqlen_is_not_specialised_on(backend: str) -> None:
    (q, k) = (x.transpose(1, 2).flatten(0, 1) for x in CALLS["interaction_loss_from_qk"].on(device_of(backend)))
    cu_seqlens = offsets([len(q) - 5, 5], device_of(backend))
    with forced(backend) as impl:
        torch.compiler.reset()

        def loss(q: Tensor, k: Tensor, max_seqlen: int) -> Tensor:
            return sf.interaction_loss_from_qk(q, k, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, impl=impl)

        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        first = value_and_gradients(lambda *x: compiled(*x, len(q)), (q, k))
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = value_and_gradients(lambda *x: compiled(*x, len(q) - 5), (q, k))
        expected = value_and_gradients(lambda *x: loss(*x, len(q)), (q, k))
    for plain, *results in zip(expected, first, second, strict=True):
        assert all(relative_error(result, plain) < 1e-6 for result in results)


@every_backend()
def test_max_seqlen_may_be_what_only_the_device_knows(backend: str) -> None:
    (q, k) = (x.transpose(1, 2).flatten(0, 1) for x in CALLS["interaction_loss_from_qk"].on(device_of(backend)))
    with forced(backend) as impl:
        torch.compiler.reset()

        def loss(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
            longest = cu_seqlens.diff().max().item()
            return sf.interaction_loss_from_qk(q, k, cu_seqlens=cu_seqlens, max_seqlen=longest, impl=impl)

        cu_seqlens = offsets([len(q) - 5, 5], device_of(backend))
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k, cu_seqlens)
        assert relative_error(compiled, loss(q, k, cu_seqlens)) < 1e-6


@every_backend()
def test_exports_for_any_batch_and_length(backend: str) -> None:
    class Measures(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))  # what asks for gradients keeps moments from some length on

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return sf.capacity(h * self.scale, impl=impl), sf.importance_loss(h * self.scale, impl=impl)

    h = normal(4, TOKENS, 16, device=device_of(backend))
    model = Measures().to(h.device)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=4096)}
    with forced(backend) as impl:
        program = torch.export.export(model, (h,), dynamic_shapes=(sizes,)).module()
        other = normal(2, TOKENS + 9, 16, device=device_of(backend))
        for result, expected in zip(program(other), model(other), strict=True):
            assert relative_error(result, expected) < 1e-6


def test_what_an_older_dynamo_calls_an_export_keeps_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's before 2.12 calls every compilation one."""
    x = torch.ones(1, requires_grad=True)
    monkeypatch.setattr(first_derivative, "_DYNAMO_KNOWS_EXPORTS", False)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not first_derivative.is_differentiated(x)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert first_derivative.is_differentiated(x)


@every_backend()
def test_compiles_with_the_default_compiler(backend: str) -> None:
    (h,), (q, k) = (CALLS[name].on(device_of(backend)) for name in ("importance_loss", "interaction_loss_from_qk"))
    logits, target = normal(2, 2, device=h.device.type), torch.tensor([0, 1], device=h.device)
    with forced(backend) as impl:
        torch.compiler.reset()
        loss_fn = sf.SAFRLoss(variant="released", impl=impl)

        def loss(h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return loss_fn(logits, target, hidden=h, qk=(q, k), mask=mask_like(h))

        actual = value_and_gradients(torch.compile(loss, fullgraph=True), (h, q, k))
        expected = value_and_gradients(loss, (h, q, k))
    for result, plain in zip(actual, expected, strict=True):
        assert relative_error(result, plain) < 1e-5


@every_backend(fused=True)
@pytest.mark.parametrize("save_moments", [False, True])
@pytest.mark.parametrize("layout", ["padded", "masked", "packed"])
def test_opcheck_row_energy(backend: str, save_moments: bool, layout: str) -> None:
    device = device_of(backend)
    h = normal(2, 40, 8, device=device)
    mask = lengths_mask([40, 30], 40).to(device) if layout == "masked" else None
    cu_seqlens = None
    if layout == "packed":
        h, cu_seqlens = h.flatten(0, 1), offsets([40, 30], device)
    with forced(backend) as impl:
        ops = torch.ops.safr_fast
        library.opcheck(ops.row_energy.default, (h, mask, cu_seqlens, save_moments, impl))
        energy, squared_norm, moments = ops.row_energy(h, mask, cu_seqlens, True, impl)
        saved = (energy, squared_norm, moments, torch.ones_like(energy), torch.ones_like(energy))
        library.opcheck(ops.row_energy_backward.default, (h, mask, cu_seqlens, *saved, impl))


@every_backend(fused=True)
@pytest.mark.parametrize("need_grad", [False, True])
def test_opcheck_interaction(backend: str, need_grad: bool) -> None:
    device = device_of(backend)
    (a,), (q, k) = (CALLS[name].on(device) for name in ("interaction_loss", "interaction_loss_from_qk"))
    with forced(backend) as impl:
        ops = torch.ops.safr_fast
        library.opcheck(ops.interaction.default, (a, mask_like(a), True, False, need_grad, impl))
        form = (0.25, False, True, False, need_grad, impl)
        library.opcheck(ops.interaction_from_qk.default, (q, k, mask_like(q), None, *form))
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        cu_seqlens = offsets([q.shape[2]] * q.shape[0], device)
        library.opcheck(ops.interaction_from_qk.default, (*tokens, None, cu_seqlens, *form, None, q.shape[2]))
        factor = torch.ones(q.shape[:2], device=device)
        library.opcheck(ops.scaled.default, (q, factor, 1, torch.bfloat16, impl))
        library.opcheck(ops.scale_.default, (q.clone(), factor, impl))


@every_backend()
@each_call
def test_gradients_are_made_only_where_asked(name: str, backend: str) -> None:
    inputs = CALLS[name].on(device_of(backend))
    with forced(backend) as impl:
        outputs = CALLS[name].function(*inputs, impl=impl)
        alone = (outputs,) if isinstance(outputs, Tensor) else outputs
        assert not any(out.requires_grad for out in alone)
        assert all(out.dtype == torch.float32 for out in alone)
        everything = run(name, impl, inputs)
        for out, beside_gradients in zip(alone, everything, strict=False):
            assert relative_error(out, beside_gradients) < 1e-6
        for i, x in enumerate(inputs):
            leaf = x.clone().requires_grad_()
            outputs = CALLS[name].function(*(leaf if j == i else y for j, y in enumerate(inputs)), impl=impl)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            loss = sum((out * normal(*out.shape, seed=99 + n).to(out)).sum() for n, out in enumerate(outputs))
            (gradient,) = torch.autograd.grad(loss, leaf)
            assert torch.equal(gradient, everything[len(outputs) + i])


@every_backend()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["row_energy", "importance_loss", "interaction_loss", "interaction_loss_from_qk"])
def test_autocast_casts_what_enters_products(name: str, backend: str, dtype: torch.dtype) -> None:
    skip_unless_served(backend, dtype)
    device = device_of(backend)
    inputs = CALLS[name].on(device)
    kept = name == "interaction_loss"

    def under_autocast(*x: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(device, dtype):
            return CALLS[name].function(*x, impl=impl)

    with forced(backend) as impl:
        actual = value_and_gradients(under_autocast, inputs)
        expected = run(name, impl, inputs if kept else CALLS[name].on(device, dtype))
        uncast = run(name, impl, inputs)
    for result, same, exact in zip(actual, expected, uncast, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, same.float())
        assert torch.equal(result, exact) == kept


@every_backend()
def test_float16_gradients_survive_a_loss_scale(backend: str) -> None:
    """Entries near 1e-10 are scaled before they are rounded to 16 bits."""
    q, k = (x.half().requires_grad_() for x in CALLS["interaction_loss_from_qk"].on(device_of(backend)))
    with forced(backend) as impl:
        loss = sf.interaction_loss_from_qk(q, k, impl=impl)
        (scaled,) = torch.autograd.grad(loss * 2.0**16, q)
    q64, k64 = (x.detach().double().requires_grad_() for x in (q, k))
    (expected,) = torch.autograd.grad(sf.interaction_loss_from_qk(q64, k64, impl="reference") * 2.0**16, q64)
    assert relative_error(scaled, expected) < 1e-2
