"""Strides, padding, emptiness, repeatability and wrong arguments, for every back end."""

import pytest
import torch
from support import (
    device_of,
    every_backend,
    forced,
    lengths_mask,
    normal,
    offsets,
    relative_error,
    skip_unless_served,
    strided,
    value_and_gradients,
)
from test_autograd_and_compile import CALLS, TOKENS, each_call, run
from torch import Tensor

import safr_fast as sf
from safr_fast import reference


def reversed_axes(x: Tensor) -> Tensor:
    """The same values, the first axis the closest in memory."""
    backwards = range(x.dim() - 1, -1, -1)
    return x.permute(*backwards).contiguous().permute(*backwards)


@every_backend()
@each_call
def test_strided_inputs_give_the_same(name: str, backend: str) -> None:
    inputs = CALLS[name].on(device_of(backend))
    layouts = {
        "gaps": [strided(x) for x in inputs],
        "transposed": [x.mT.contiguous().mT for x in inputs],
        "reversed axes": [reversed_axes(x) for x in inputs],
        "sliced": [torch.nn.functional.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2] for x in inputs],
    }
    with forced(backend) as impl:
        expected = run(name, impl, inputs)
        for layout, views in layouts.items():
            for result, same in zip(run(name, impl, tuple(views)), expected, strict=True):
                assert relative_error(result, same) < 1e-6, layout


@every_backend()
@pytest.mark.parametrize("layout", ["expanded", "transposed", "gaps"])
def test_strided_incoming_gradients_give_the_same(backend: str, layout: str) -> None:
    device = device_of(backend)
    h = normal(3, TOKENS, 8, device=device).requires_grad_()
    weights = {
        "expanded": torch.tensor(0.3, device=device).expand(3, TOKENS),
        "transposed": normal(TOKENS, 3, seed=5, device=device).mT,
        "gaps": strided(normal(3, TOKENS, seed=5, device=device)),
    }[layout]
    with forced(backend) as impl:
        outputs = sf.row_energy(h, impl=impl)
        (actual,) = torch.autograd.grad(outputs, h, [weights, weights], retain_graph=True)
        (expected,) = torch.autograd.grad(outputs, h, [weights.contiguous(), weights.contiguous()])
        assert torch.equal(actual, expected)
        q = normal(3, 2, TOKENS, 8, seed=6, device=device).requires_grad_()
        loss = sf.interaction_loss_from_qk(q, q.detach(), reduction="none", impl=impl)
        incoming = normal(2, 3, seed=7, device=device).mT
        (actual,) = torch.autograd.grad(loss, q, incoming, retain_graph=True)
        (expected,) = torch.autograd.grad(loss, q, incoming.contiguous())
        assert torch.equal(actual, expected)


@every_backend()
def test_leading_dimensions_of_hidden(backend: str) -> None:
    h = normal(2, 3, TOKENS, 8, device=device_of(backend))
    mask = (normal(2, 3, TOKENS, seed=1) > 0).to(h.device)
    with forced(backend) as impl:
        whole = sf.capacity(h, mask, impl=impl)
        assert whole.shape == (2, 3, TOKENS)
        assert relative_error(whole[1, 2], sf.capacity(h[1, 2], mask[1, 2], impl=impl)) < 1e-6


@every_backend()
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e38], ids=str)
def test_padding_may_hold_anything(backend: str, filler: float) -> None:
    device = device_of(backend)
    mask = lengths_mask([TOKENS, 5, 0], TOKENS).to(device)
    h = normal(3, TOKENS, 8, device=device)
    q, k = normal(3, 2, TOKENS, 8, seed=1, device=device), normal(3, 2, TOKENS, 8, seed=2, device=device)
    pairs = (mask[:, None, :, None] & mask[:, None, None, :]).expand(3, 2, TOKENS, TOKENS)
    a = normal(3, 2, TOKENS, TOKENS, seed=3, device=device).softmax(-1)
    rows = mask[:, None, :, None]

    def everything(h: Tensor, a: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            sf.importance_loss(h, mask, reduction="none", impl=impl),
            sf.interaction_loss(a, mask, reduction="none", impl=impl),
            sf.interaction_loss_from_qk(q, k, mask, reduction="none", impl=impl),
        )

    with forced(backend) as impl:
        clean = value_and_gradients(everything, [h * mask[..., None], a * pairs, q * rows, k * rows])
        filled = value_and_gradients(
            everything,
            [
                h.masked_fill(~mask[..., None], filler),
                a.masked_fill(~pairs, filler),
                q.masked_fill(~rows, filler),
                k.masked_fill(~rows, filler),
            ],
        )
    for dirty, expected in zip(filled, clean, strict=True):
        assert torch.equal(dirty, expected)
    for gradient, real in zip(filled[3:], (mask[..., None], pairs, rows, rows), strict=True):
        assert (gradient.masked_select(~real.expand_as(gradient)) == 0).all()


@every_backend()
@each_call
def test_repeats_are_equal_to_the_bit(name: str, backend: str) -> None:
    inputs = CALLS[name].on(device_of(backend))
    with forced(backend) as impl:
        first = run(name, impl, inputs)
        for again in (run(name, impl, inputs), run(name, impl, inputs)):
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@every_backend(fused=True)
@each_call
def test_every_element_of_an_output_is_written(name: str, backend: str) -> None:
    """``torch.empty`` filled with NaN instead of what memory happened to hold."""
    inputs = CALLS[name].on(device_of(backend))
    with forced(backend) as impl:
        expected = run(name, impl, inputs)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory
            poisoned = run(name, impl, inputs)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(poisoned, expected, strict=True))


@every_backend()
@each_call
def test_inputs_are_left_alone(name: str, backend: str) -> None:
    inputs = CALLS[name].on(device_of(backend))
    before = [x.clone() for x in inputs]
    with forced(backend) as impl:
        outputs = CALLS[name].function(*(x.requires_grad_() for x in inputs), impl=impl)
        loss = outputs.sum() if isinstance(outputs, Tensor) else outputs[0].sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@every_backend(fused=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_takes_the_memory_of_what_was_saved_for_it(dtype: torch.dtype, backend: str) -> None:
    """Where the graph is freed: the attention's is as large as what the plain formula is avoided for."""
    skip_unless_served(backend, dtype)
    attention = normal(2, 3, TOKENS, TOKENS, device=device_of(backend)).softmax(-1).to(dtype).requires_grad_()
    with forced(backend) as impl:
        loss = sf.interaction_loss(attention, impl=impl)
        saved = loss.grad_fn.saved_tensors[1]
        before = saved.clone()
        (kept,) = torch.autograd.grad(loss, attention, retain_graph=True)
        assert torch.equal(saved, before)
        (last,) = torch.autograd.grad(loss, attention)
    assert last.data_ptr() == saved.data_ptr()
    assert torch.equal(last, kept)


@every_backend(fused=True)
@pytest.mark.parametrize("heads", [6, 2])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_gradient_is_scaled_by_what_arrives_for_each_head(
    heads: int, dtype: torch.dtype, out_dtype: torch.dtype, backend: str
) -> None:
    """Also where the factor has no memory of its own for each head, and a head's numbers end within a block."""
    skip_unless_served(backend, out_dtype)
    device = device_of(backend)
    gradient = normal(2, 6, 75, 70, dtype=dtype, device=device)
    own, common = normal(2, 6, seed=1, device=device), normal(1, 6, seed=1, device=device).expand(2, 6)
    scaled = torch.ops.safr_fast.scaled
    with forced(backend) as impl:
        for factor in (own, own.mT.contiguous().mT, common):
            expected = (gradient.double() * factor[:, :, None, None]).reshape(2, heads, 6 // heads, 75, 70).sum(2)
            actual = scaled(gradient, factor, heads, out_dtype, impl)
            torch.testing.assert_close(actual, expected.to(out_dtype))
            assert torch.equal(scaled(strided(gradient), factor, heads, out_dtype, impl), actual)
            if heads == 6 and dtype == out_dtype:
                in_place = gradient.clone()
                torch.ops.safr_fast.scale_(in_place, factor, impl)
                assert torch.equal(in_place, actual)
        assert scaled(gradient[:0], own[:0], heads, out_dtype, impl).shape == (0, heads, 75, 70)


@every_backend()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (2, 1, 4)], ids=str)
def test_empty_and_one_token_hidden(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    skip_unless_served(backend, dtype)
    h = normal(*shape, dtype=dtype, device=device_of(backend)).requires_grad_()
    with forced(backend) as impl:
        assert (sf.row_energy(h, impl=impl)[0] == 0).all()
        for reduction in ("mean", "sum"):
            loss = sf.importance_loss(h, reduction=reduction, impl=impl)
            (gradient,) = torch.autograd.grad(loss, h)
            assert loss == 0
            assert gradient.shape == h.shape
            assert (gradient == 0).all()


@every_backend()
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0)], ids=str)
def test_empty_attention(backend: str, shape: tuple[int, ...]) -> None:
    q, k = (normal(*shape, seed=i, device=device_of(backend)).requires_grad_() for i in range(2))
    a = (q @ k.mT).softmax(-1).detach().requires_grad_()
    with forced(backend) as impl:
        for loss, leaves in (
            (sf.interaction_loss_from_qk(q, k, impl=impl), (q, k)),
            (sf.interaction_loss(a, impl=impl), (a,)),
        ):
            assert loss.isfinite()
            if 0 in shape[:3]:
                assert loss == 0
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                assert gradient.shape == leaf.shape
                assert gradient.isfinite().all()


@every_backend()
def test_packed_input_without_a_sequence(backend: str) -> None:
    device = device_of(backend)
    h, q = normal(4, 8, device=device).requires_grad_(), normal(4, 2, 8, device=device).requires_grad_()
    none = offsets([], device)
    with forced(backend) as impl:
        loss = sf.importance_loss(h, cu_seqlens=none, impl=impl) + sf.interaction_loss_from_qk(
            q, q.detach(), cu_seqlens=none, impl=impl
        )
        assert loss == 0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (h, q)))


@every_backend()
def test_zero_rows_are_ordinary(backend: str) -> None:
    """Hard gates make them all the time: no measure and no gradient may be NaN."""
    h = normal(2, TOKENS, 8, device=device_of(backend))
    h[0, ::2] = 0
    h[1] = 0
    h.requires_grad_()
    with forced(backend) as impl:
        outputs = [
            sf.polysemanticity(h, impl=impl),
            sf.capacity(h, impl=impl),
            sf.importance_loss(h, reduction="none", impl=impl),
        ]
        for output in outputs:
            assert (output[1] == 0).all()
            assert (output[0, ::2] == 0).all()
            (gradient,) = torch.autograd.grad(output.sum(), h)
            assert gradient.isfinite().all()
            assert (gradient[1] == 0).all()


@every_backend()
def test_nan_in_a_real_token_is_not_hidden(backend: str) -> None:
    """A run that has diverged must not look well: only padding may hold NaN unseen."""
    h = normal(2, TOKENS, 8, device=device_of(backend))
    h[0, 3, 2] = float("nan")
    attention = normal(2, 2, TOKENS, TOKENS, device=h.device).softmax(-1)
    attention[0, 1, 4, 5] = float("nan")
    q = normal(2, 2, TOKENS, 8, seed=1, device=h.device)
    q[0, 1, 4, 5] = float("nan")
    with forced(backend) as impl:
        for measure in (sf.polysemanticity, sf.capacity):
            assert measure(h, impl=impl)[0].isnan().all()
        tokens = sf.importance_loss(h, reduction="none", impl=impl)
        heads = sf.interaction_loss(attention, reduction="none", impl=impl)
        heads_from_qk = sf.interaction_loss_from_qk(q, normal(*q.shape).to(q), reduction="none", impl=impl)
    assert tokens[0].isnan().all()
    assert tokens[1].isfinite().all()
    for losses in (heads, heads_from_qk):
        assert losses.isnan().tolist() == [[False, True], [False, False]]


@every_backend()
@pytest.mark.parametrize("tokens", [TOKENS, 200])
def test_a_sample_of_nan_alone_is_not_hidden(backend: str, tokens: int) -> None:
    """By either path: one NaN weight of a model makes all of a sample NaN."""
    h = normal(2, tokens, 8, device=device_of(backend)).requires_grad_()
    spoilt = torch.where(torch.arange(2, device=h.device)[:, None, None] == 0, float("nan"), h)
    with forced(backend) as impl:
        energy, squared_norm = sf.row_energy(spoilt, impl=impl)
        losses = sf.importance_loss(spoilt, reduction="none", impl=impl)
        total = sf.importance_loss(spoilt, impl=impl)
        (gradient,) = torch.autograd.grad(losses[1].sum(), h)
    for values in (energy, squared_norm, losses):
        assert values[0].isnan().all()
        assert values[1].isfinite().all()
    assert total.isnan()
    assert gradient[1].isfinite().all()


@every_backend()
def test_huge_scores_are_one_hot(backend: str) -> None:
    device = device_of(backend)
    q, k = (normal(1, 2, TOKENS, 8, seed=seed, device=device) for seed in (1, 2))
    expected = reference.interaction_total_from_qk(
        q.double(), k.double(), scale=1e9, is_causal=False, squared=True, exclude_diagonal=False
    )
    with forced(backend) as impl:
        total, *gradients = value_and_gradients(
            lambda q, k: sf.interaction_loss_from_qk(q, k, scale=1e9, reduction="none", impl=impl), [q, k]
        )
    assert relative_error(total * TOKENS**2, expected) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_backend()
def test_masks_of_any_strides(backend: str) -> None:
    h = normal(4, TOKENS, 8, device=device_of(backend))
    mask = normal(4, TOKENS, seed=1).to(h.device) > 0
    wide = torch.zeros(4, 2 * TOKENS, dtype=torch.bool, device=h.device)
    wide[:, ::2] = mask
    one = mask[:1].expand(4, TOKENS)
    with forced(backend) as impl:
        expected = sf.importance_loss(h, mask, reduction="none", impl=impl)
        for view in (mask.mT.contiguous().mT, wide[:, ::2]):
            assert torch.equal(sf.importance_loss(h, view, reduction="none", impl=impl), expected)
        assert torch.equal(sf.importance_loss(h, one, impl=impl), sf.importance_loss(h, one.contiguous(), impl=impl))


def test_interference_matrix() -> None:
    h = normal(2, TOKENS, 8)
    mask = lengths_mask([TOKENS, 5], TOKENS)
    signed, matrix = sf.interference(h, mask, signed=True), sf.interference(h, mask)
    assert torch.allclose(signed[0], h[0] @ h[0].mT)
    assert torch.equal(matrix, signed.square())
    assert (matrix[1, 5:] == 0).all()
    assert (matrix[1, :, 5:] == 0).all()
    energy, squared_norm = sf.row_energy(h, mask)
    assert torch.allclose(matrix.sum(-1), energy + squared_norm.square(), rtol=1e-5)


H, Q, A = torch.zeros(2, 5, 4), torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 5)
WRONG = {
    "a list": (lambda: sf.row_energy([1.0]), TypeError, "h must be a tensor, got list"),
    "several": (lambda: sf.row_energy([H, H]), TypeError, r"got list of \(Tensor, Tensor\): pass torch.stack\(h\)"),
    "a row of sequences": (
        lambda: sf.row_energy(H[:1], cu_seqlens=offsets([5])),
        ValueError,
        r"packed \(N, E\), got \(1, 5, 4\): take the batch of one off, h\[0\]",
    ),
    "heads of a row": (
        lambda: sf.interaction_loss_from_qk(Q[:1], Q[:1], cu_seqlens=offsets([5])),
        ValueError,
        r"packed \(N, H, D\), got .*: take the batch of one off, q\[0\].transpose\(0, 1\)",
    ),
    "mask of a row": (
        lambda: sf.row_energy(H[0], H[..., 0] == 0, cu_seqlens=offsets([5])),
        ValueError,
        "exclude each other",
    ),
    "integers": (lambda: sf.row_energy(H.long()), TypeError, "h must be float32, .* got int64"),
    "a vector": (lambda: sf.row_energy(H[0, 0]), ValueError, r"h must have shape \(..., T, E\), got \(4,\)"),
    "int mask": (lambda: sf.capacity(H, H[..., 0].long()), TypeError, r"mask must be bool .* pass mask.bool\(\)"),
    "float mask": (lambda: sf.capacity(H, H[..., 0]), TypeError, r"mask must be bool .* pass mask == 0 if it is added"),
    "mask shape": (lambda: sf.capacity(H, H[:, :3, 0] == 0), ValueError, r"shape \(2, 5\), got \(2, 3\)"),
    "int64 offsets": (
        lambda: sf.capacity(H[0], cu_seqlens=torch.tensor([0, 5])),
        TypeError,
        "cu_seqlens must be an int32",
    ),
    "both": (lambda: sf.capacity(H[0], H[0, :, 0] == 0, cu_seqlens=offsets([5])), ValueError, "exclude each other"),
    "not packed": (lambda: sf.capacity(H, cu_seqlens=offsets([5])), ValueError, r"packed \(N, E\), got \(2, 5, 4\)"),
    "no offsets": (lambda: sf.capacity(H[0], cu_seqlens=offsets([5])[:0]), ValueError, r"shape \(S \+ 1,\)"),
    "reduction": (lambda: sf.importance_loss(H, reduction="max"), ValueError, "reduction must be one of"),
    "eps": (lambda: sf.polysemanticity(H, eps=-1.0), ValueError, "eps must be a finite number, at least 0, got -1.0"),
    "infinite eps": (lambda: sf.importance_loss(H, eps=float("inf")), ValueError, "eps must be .* got inf"),
    "no eps": (lambda: sf.importance_loss(H, eps=None), TypeError, "eps must be .* got NoneType None"),
    "scale": (
        lambda: sf.interaction_loss_from_qk(Q, Q, scale="1"),
        TypeError,
        "scale must be a finite number, got str",
    ),
    "nan scale": (
        lambda: sf.interaction_loss_from_qk(Q, Q, scale=float("nan")),
        ValueError,
        "scale must be .* got nan",
    ),
    "is_causal": (
        lambda: sf.interaction_loss_from_qk(Q, Q, is_causal="no"),
        TypeError,
        "is_causal must be True or False, got str 'no'",
    ),
    "workspace_bytes": (
        lambda: sf.interaction_loss(A, workspace_bytes=1e6),
        TypeError,
        "workspace_bytes must be None or a whole number of bytes, at least 1, got float 1000000.0",
    ),
    "no workspace": (
        lambda: sf.interaction_loss_from_qk(Q, Q, workspace_bytes=0),
        ValueError,
        "workspace_bytes must be None or a whole number of bytes, at least 1, got 0",
    ),
    "max_seqlen": (
        lambda: sf.interaction_loss_from_qk(Q[0], Q[0], cu_seqlens=offsets([4]), max_seqlen=torch.tensor(4)),
        TypeError,
        r"max_seqlen must be None or a whole number of tokens, got int64 \(\) on cpu: pass max_seqlen.item\(\)",
    ),
    "negative max_seqlen": (
        lambda: sf.interaction_loss_from_qk(Q[0], Q[0], cu_seqlens=offsets([4]), max_seqlen=-1),
        ValueError,
        "max_seqlen must be at least 0, got -1",
    ),
    "max_seqlen below a length": (
        lambda: sf.interaction_loss_from_qk(Q[0], Q[0], cu_seqlens=offsets([1, 3]), max_seqlen=2),
        ValueError,
        "max_seqlen must be at least 3, the tokens of the longest sequence, got 2",
    ),
    "max_seqlen of padded input": (
        lambda: sf.interaction_loss_from_qk(Q, Q, max_seqlen=5),
        ValueError,
        "max_seqlen goes with cu_seqlens",
    ),
    "squared": (lambda: sf.interaction_loss(A, squared=2), TypeError, "squared must be True or False, got int 2"),
    "float8": (lambda: sf.row_energy(H.to(torch.float8_e4m3fn)), TypeError, "h must be float32.* got float8_e4m3fn"),
    "a list of impl": (lambda: sf.row_energy(H, impl=["cpp"]), ValueError, "impl must be one of .* got"),
    "impl": (lambda: sf.row_energy(H, impl="cuda"), ValueError, "impl must be one of .* got 'cuda'"),
    "not square": (lambda: sf.interaction_loss(A[..., :3]), ValueError, r"attention must have shape \(B, H, T, T\)"),
    "q alone": (lambda: sf.interaction_loss_from_qk(Q, Q[:, :3]), ValueError, "heads must divide q's .* got 3 for 4"),
    "lengths": (lambda: sf.interaction_loss_from_qk(Q, Q[:, :, :3]), ValueError, "may differ in heads alone"),
    "dtypes": (lambda: sf.interaction_loss_from_qk(Q, Q.double()), ValueError, "one dtype and device"),
    "q shape": (lambda: sf.interaction_loss_from_qk(Q[0], Q[0]), ValueError, r"must have shape \(B, H, T, D\)"),
    "float64 cpp": (lambda: sf.row_energy(H.double(), impl="cpp"), sf.BackendUnavailable, "float64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_say_what_came_and_what_is_allowed(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


@every_backend()
@pytest.mark.parametrize("values", [[1, 5], [0, 4, 2], [0, 6], [0, -1, 5]], ids=str)
def test_offsets_out_of_range(backend: str, values: list[int]) -> None:
    """They are read before use on a CPU; on a GPU that would stall the device, so they do no harm unread."""
    device = device_of(backend)
    cu_seqlens = torch.tensor(values, dtype=torch.int32, device=device)
    h = normal(5, 4, device=device)
    with forced(backend) as impl:
        if impl != "triton" and device == "cpu":
            with pytest.raises(ValueError, match=r"cu_seqlens must .*(start at 0|never fall|end at or before .* 5)"):
                sf.row_energy(h, cu_seqlens=cu_seqlens, impl=impl)
        else:
            assert sf.row_energy(h, cu_seqlens=cu_seqlens, impl=impl)[0].isfinite().all()


def test_a_device_without_autocast_has_shapes_and_no_fused_back_end() -> None:
    """``meta``, where models are sized before they have weights."""
    h, q = torch.empty(2, TOKENS, 8, device="meta"), torch.empty(2, 2, TOKENS, 8, device="meta")
    assert sf.capacity(h).shape == (2, TOKENS)
    assert sf.importance_loss(h).shape == sf.interaction_loss_from_qk(q, q).shape == ()
    with pytest.raises(sf.BackendUnavailable, match=r'impl="cpp" cannot serve: .*meta'):
        sf.importance_loss(h, impl="cpp")
