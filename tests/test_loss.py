"""SAFRLoss against the formulas of the paper and of the released code, written out."""

from typing import Any

import pytest
import torch
from support import device_of, every_backend, forced, lengths_mask, normal, offsets, relative_error
from torch import Tensor
from torch.nn import functional as F

import safr_fast as sf
from safr_fast import functional


def released_importance(h: Tensor) -> Tensor:
    """Mean over all B·T positions of √(P/E), P_i = Σ_{j≠i} (h_i/(‖h_i‖+1e-5) · h_j)²."""
    direction = h / (h.norm(dim=-1, keepdim=True) + 1e-5)
    overlap = (direction @ h.mT).square()
    overlap = overlap - torch.diag_embed(overlap.diagonal(dim1=-2, dim2=-1))
    return (overlap.sum(-1) / h.shape[-1]).sqrt().mean()


def released_interaction(attention: Tensor) -> Tensor:
    """Mean over B, H and all T² pairs of A_ij (1 − G_ij), the diagonal of G = A Aᵀ set to 0."""
    overlap = attention @ attention.mT
    overlap = overlap - torch.diag_embed(overlap.diagonal(dim1=-2, dim2=-1))
    return (attention * (1 - overlap)).mean()


def paper_importance(h: Tensor) -> Tensor:
    """Σ_i √(P_i/E) of each sample, P_i = Σ_{j≠i} (ĥ_i · h_j)²; mean over samples."""
    direction = h / h.norm(dim=-1, keepdim=True)
    overlap = (direction @ h.mT).square()
    overlap = overlap - torch.diag_embed(overlap.diagonal(dim1=-2, dim2=-1))
    return (overlap.sum(-1) / h.shape[-1]).sqrt().sum(-1).mean()


def paper_interaction(attention: Tensor) -> Tensor:
    """Σ over heads of (1/T²) Σ_ij A_ij (1 − G_ij²); mean over samples."""
    overlap = attention @ attention.mT
    return (attention * (1 - overlap.square())).mean((-1, -2)).sum(-1).mean()


FORMULAS = {"released": (released_importance, released_interaction), "paper": (paper_importance, paper_interaction)}


def batch(tokens: int = 23, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits, target, h, q, k."""
    return (
        normal(3, 2, seed=1, device=device),
        torch.tensor([0, 1, 1], device=device),
        normal(3, tokens, 12, seed=2, device=device),
        normal(3, 4, tokens, 8, seed=3, device=device),
        normal(3, 4, tokens, 8, seed=4, device=device),
    )


def softmax_attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


@every_backend()
@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_terms_equal_the_written_formulas(backend: str, variant: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("only the reference computes in float64")
    logits, target, h, q, k = batch(device=device_of(backend))
    attention = softmax_attention(q, k)
    importance, interaction = FORMULAS[variant]
    expected_leaves = [x.double().requires_grad_() for x in (h, attention)]
    expected = (
        F.cross_entropy(logits.double(), target)
        + 0.7 * importance(expected_leaves[0])
        + 0.3 * interaction(expected_leaves[1])
    )
    leaves = [x.to(dtype).requires_grad_() for x in (h, attention)]
    with forced(backend) as impl:
        loss_fn = sf.SAFRLoss(0.7, 0.3, variant=variant, impl=impl)
        actual = loss_fn(logits.to(dtype), target, hidden=leaves[0], attention=leaves[1])
    allowed = 1e-6 if dtype == torch.float32 else 1e-13
    assert relative_error(actual.detach(), expected.detach()) < allowed
    gradients = zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, expected_leaves), strict=True)
    for gradient, expected_gradient in gradients:
        assert relative_error(gradient, expected_gradient) < allowed


@every_backend()
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_queries_and_keys_stand_for_their_attention(backend: str, variant: str) -> None:
    logits, target, h, q, k = batch(device=device_of(backend))
    expected_leaves = [x.double().requires_grad_() for x in (q, k)]
    expected = FORMULAS[variant][1](softmax_attention(*expected_leaves))
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    with forced(backend) as impl:
        parts = sf.SAFRLoss(variant=variant, impl=impl)(logits, target, hidden=h, qk=tuple(leaves), return_parts=True)
    assert relative_error(parts.interaction.detach(), expected.detach()) < 1e-6
    gradients = torch.autograd.grad(parts.interaction, leaves)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, expected_leaves), strict=True):
        # A softmax in float32, as the reference's is, loses more than the fused back ends do.
        assert relative_error(gradient, expected_gradient) < (1e-5 if backend == "reference" else 1e-6)


def test_documented_correspondence_of_the_importance_weights() -> None:
    logits, target, h, *_ = batch(tokens=20)
    released = sf.SAFRLoss(1.0, 0.0, variant="released")(logits, target, hidden=h, return_parts=True)
    paper = sf.SAFRLoss(1.0 / 20, 0.0, variant="paper")(logits, target, hidden=h, return_parts=True)
    assert torch.isclose(released.total, paper.total, rtol=1e-5)


def test_what_the_loss_is_made_with_reaches_its_terms() -> None:
    logits, target, h, q, k = batch()
    causal = sf.SAFRLoss(0.0, 1.0, variant="released", is_causal=True, scale=0.7)
    parts = causal(logits, target, qk=(q, k), return_parts=True)
    form = {"squared": False, "exclude_diagonal": True, "is_causal": True, "scale": 0.7}
    assert parts.interaction.item() == pytest.approx(sf.interaction_loss_from_qk(q, k, **form).item(), rel=1e-6)
    weights = (q @ k.mT).softmax(-1)
    for given in ({"hidden": h}, {"qk": (q, k)}, {"attention": weights}):
        weight = {"lambda_importance": float("hidden" in given), "lambda_interaction": float("hidden" not in given)}
        double = {name: tuple(x.double() for x in xs) if name == "qk" else xs.double() for name, xs in given.items()}
        with pytest.raises(sf.BackendUnavailable, match='impl="cpp" cannot serve'):
            sf.SAFRLoss(**weight, impl="cpp")(logits, target, **double)
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in (q, k)]
    packed = {"qk": tuple(tokens), "cu_seqlens": offsets([q.shape[2]] * 3), "max_seqlen": q.shape[2] - 1}
    with pytest.raises(ValueError, match="max_seqlen must be at least"):
        sf.SAFRLoss(0.0, 1.0)(logits, target, **packed)


def test_a_term_without_weight_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, h, q, k = batch()
    calls = []
    for name in ("importance_loss", "interaction_loss_from_qk"):
        original = getattr(functional, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(functional, name, counted)
    parts = sf.SAFRLoss(0.0, 0.0)(logits, target, hidden=h, qk=(q, k), return_parts=True)
    assert calls == []
    assert parts.importance is None
    assert parts.interaction is None
    assert torch.equal(parts.total, parts.task)
    sf.SAFRLoss(1.0, 0.0)(logits, target, hidden=h, qk=(q, k))
    assert calls == ["importance_loss"]
    sf.SAFRLoss(0.0, 1.0)(logits, target, hidden=None, qk=(q, k))
    assert calls == ["importance_loss", "interaction_loss_from_qk"]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_layers_are_averaged_or_summed_as_heads_are(variant: str) -> None:
    logits, target, h, q, k = batch()
    loss = sf.SAFRLoss(variant=variant)
    one = [loss(logits, target, hidden=x, qk=(y, k), return_parts=True) for x, y in ((h, q), (2 * h, 2 * q))]
    both = loss(logits, target, hidden=[h, 2 * h], qk=[(q, k), (2 * q, k)], return_parts=True)
    pool = torch.mean if variant == "released" else torch.sum
    assert torch.isclose(both.importance, pool(torch.stack([part.importance for part in one])))
    assert torch.isclose(both.interaction, pool(torch.stack([part.interaction for part in one])))


def test_the_mask_leaves_padding_out() -> None:
    logits, target, h, q, k = batch(tokens=10)
    mask = lengths_mask([10, 4, 0], 10)
    alone = [
        sf.SAFRLoss()(
            logits[i : i + 1],
            target[i : i + 1],
            hidden=h[i : i + 1, :n],
            qk=(q[i : i + 1, :, :n], k[i : i + 1, :, :n]),
            return_parts=True,
        )
        for i, n in enumerate([10, 4])
    ]
    together = sf.SAFRLoss()(logits, target, hidden=h, qk=(q, k), mask=mask, return_parts=True)
    for term in ("importance", "interaction"):
        assert torch.isclose(getattr(together, term) * 3, sum(getattr(part, term) for part in alone))


@every_backend()
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_packed_samples_have_the_loss_of_padded_ones(backend: str, variant: str) -> None:
    device = device_of(backend)
    logits, target, h, q, k = batch(tokens=10, device=device)
    mask = lengths_mask([10, 4, 0], 10).to(device)
    packed = {"hidden": h[mask], "qk": tuple(x.transpose(1, 2)[mask] for x in (q, k))}
    with forced(backend) as impl:
        loss = sf.SAFRLoss(variant=variant, impl=impl)
        padded = loss(logits, target, hidden=h, qk=(q, k), mask=mask, return_parts=True)
        layout = {"cu_seqlens": offsets([10, 4, 0], device), "max_seqlen": 10}
        ours = loss(logits, target, **packed, **layout, return_parts=True)
    torch.testing.assert_close(torch.stack(ours), torch.stack(padded))


@pytest.mark.parametrize("form", ["padded", "packed", "stored"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_compiled_the_loss_is_not_specialised_on_samples_or_tokens(variant: str, form: str) -> None:
    loss_fn = sf.SAFRLoss(1.0, 0.1, variant=variant)

    def loss(logits: Tensor, target: Tensor, hidden: Tensor, q: Tensor, k: Tensor, *lengths: Tensor) -> Tensor:
        if form == "packed":
            return loss_fn(logits, target, hidden=hidden, qk=(q, k), cu_seqlens=lengths[0])
        attended = {"qk": (q, k)} if form == "padded" else {"attention": (q @ k.mT).softmax(-1)}
        return loss_fn(logits, target, hidden=hidden, mask=lengths[0], **attended)

    def batch(samples: int, tokens: int) -> tuple[Tensor, ...]:
        lengths = [tokens - i for i in range(samples)]
        rows = (sum(lengths),) if form == "packed" else (samples, tokens)
        heads = (rows[0], 2, 8) if form == "packed" else (samples, 2, tokens, 8)
        given = offsets(lengths) if form == "packed" else lengths_mask(lengths, tokens)
        target = torch.arange(samples) % 2
        return normal(samples, 2), target, normal(*rows, 16), normal(*heads, seed=1), normal(*heads, seed=2), given

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples, tokens, again in ((3, 9, False), (4, 7, True), (6, 12, True)):
        arguments = batch(samples, tokens)
        with torch._dynamo.config.patch(error_on_recompile=again):
            assert compiled(*arguments).item() == pytest.approx(loss(*arguments).item(), rel=1e-5)


def test_the_loss_exports_for_any_batch_and_length() -> None:
    class Model(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor, h: Tensor, q: Tensor, mask: Tensor) -> Tensor:
            return sf.SAFRLoss(1.0, 0.1)(logits, target, hidden=h, qk=(q, q), mask=mask)

    def inputs(samples: int, tokens: int) -> tuple[Tensor, ...]:
        mask = lengths_mask([tokens - i for i in range(samples)], tokens)
        target = torch.arange(samples) % 2
        return normal(samples, 2), target, normal(samples, tokens, 16), normal(samples, 2, tokens, 8), mask

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    shapes = ({0: batch}, {0: batch}, {0: batch, 1: length}, {0: batch, 2: length}, {0: batch, 1: length})
    exported = torch.export.export(Model(), inputs(3, 9), dynamic_shapes=shapes).module()
    for size in ((3, 9), (5, 14)):
        assert exported(*inputs(*size)).item() == pytest.approx(Model()(*inputs(*size)).item(), rel=1e-5)


def test_another_criterion() -> None:
    logits, _, h, *_ = batch()
    target = normal(3, 2, seed=8)
    loss = sf.SAFRLoss(0, 0, criterion=torch.nn.MSELoss())(logits, target, hidden=h)
    assert torch.equal(loss, F.mse_loss(logits, target))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambda_importance": -1.0}, "lambda_importance must be a finite number, at least 0, got -1.0"),
        ({"lambda_interaction": float("nan")}, "lambda_interaction must be a finite number, at least 0, got nan"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"variant": "poster"}, 'variant must be "paper" or "released", got \'poster\''),
    ],
)
def test_wrong_settings_say_what_is_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.SAFRLoss(**arguments)


def test_missing_input_says_what_to_pass() -> None:
    logits, target, h, q, k = batch()
    attention = (q @ k.mT).softmax(-1)
    loss = sf.SAFRLoss()
    with pytest.raises(ValueError, match="hidden must be given"):
        loss(logits, target, hidden=None, qk=(q, k))
    with pytest.raises(ValueError, match="hidden must be given"):
        loss(logits, target, qk=(q, k))
    assert sf.SAFRLoss(0, 1)(logits, target, qk=(q, k)).isfinite()
    with pytest.raises(ValueError, match="takes attention or qk, got neither"):
        loss(logits, target, hidden=h)
    with pytest.raises(ValueError, match="takes attention or qk, got both"):
        loss(logits, target, hidden=h, qk=(q, k), attention=attention)
    with pytest.raises(ValueError, match="cu_seqlens goes with qk"):
        loss(logits, target, hidden=h.flatten(0, 1), attention=attention, cu_seqlens=offsets([23, 23, 23]))
    with pytest.raises(ValueError, match="cu_seqlens goes with qk"):
        loss(logits, target, hidden=h, attention=attention, max_seqlen=23)
    with pytest.raises(ValueError, match="hidden must hold at least one layer"):
        loss(logits, target, hidden=[], qk=(q, k))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda h, q, k, a: {"hidden": h.transpose(0, 1), "qk": (q, k)}, r"hidden \(23, 3, 12\), q \(3, 4, 23, 8\)"),
        (lambda h, q, k, a: {"hidden": h[:, 0], "qk": (q, k)}, r"hidden \(3, 12\), q"),
        (lambda h, q, k, a: {"hidden": h, "qk": (q.mT, k.mT)}, r"q \(3, 4, 8, 23\)"),
        (lambda h, q, k, a: {"hidden": [h, h[:2]], "qk": (q, k)}, r"hidden \(2, 23, 12\)"),
        (lambda h, q, k, a: {"hidden": h, "attention": a[:, :, 1:, 1:]}, r"attention \(3, 4, 22, 22\)"),
    ],
    ids=["tokens first", "pooled", "heads inside", "two batches", "other tokens"],
)
def test_inputs_of_other_tokens_are_refused_without_a_mask_too(change: Any, got: str) -> None:
    logits, target, h, q, k = batch()
    inputs = change(h, q, k, (q @ k.mT).softmax(-1))
    with pytest.raises(ValueError, match=rf"must be of the same tokens, \(B, T, E\).* got .*{got}"):
        sf.SAFRLoss()(logits, target, **inputs)


def test_queries_and_keys_of_two_layers_are_not_taken_for_pairs() -> None:
    logits, target, h, q, k = batch()
    with pytest.raises(TypeError, match=r"of several layers a list \[\(q, k\), ...\], got tuple of \(tuple"):
        sf.SAFRLoss()(logits, target, hidden=h, qk=((q, q), (k, k)))


def test_settings_may_be_set_anew_and_are_checked() -> None:
    logits, target, h, *_ = batch()
    loss = sf.SAFRLoss(1.0, 0.0)
    loss.lambda_importance = 2.0
    parts = loss(logits, target, hidden=h, return_parts=True)
    assert torch.isclose(parts.total, parts.task + 2 * parts.importance)
    for value in (float("nan"), -0.5):
        with pytest.raises(ValueError, match="lambda_interaction must be a finite number, at least 0"):
            loss.lambda_interaction = value
    with pytest.raises(ValueError, match='variant must be "paper" or "released", got \'Released\''):
        loss.variant = "Released"
    assert (loss.lambda_importance, loss.lambda_interaction) == (2.0, 0.0)


@pytest.mark.parametrize("criterion", ["ce", torch.nn.CrossEntropyLoss])
def test_a_criterion_that_is_none_is_named(criterion: Any) -> None:
    with pytest.raises(TypeError, match="criterion must be a module or function of"):
        sf.SAFRLoss(criterion=criterion)


def test_a_task_loss_of_each_sample_is_refused() -> None:
    logits, target, h, q, k = batch()
    loss = sf.SAFRLoss(criterion=torch.nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"criterion must give a scalar tensor, got float32 \(3,\)"):
        loss(logits, target, hidden=h, qk=(q, k))


def test_a_jagged_tensor_says_what_to_pass_instead() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"h must be a dense tensor.* pass values\(\), .* cu_seqlens"):
        sf.importance_loss(jagged)
    assert sf.importance_loss(jagged.values(), cu_seqlens=jagged.offsets().int()).isfinite()
