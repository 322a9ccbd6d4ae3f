"""Queries and keys taken from models as they run: the loss of what was recorded is that of the model's own weights."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import lengths_mask, normal
from torch import Tensor, nn

import safr_fast as sf

TOKENS = 12


def same(qk: list[tuple[Tensor, Tensor]], weights: list[Tensor], mask: Tensor | None = None, **form: bool) -> None:
    """Of recorded queries and keys, and of the weights of as many layers."""
    for (q, k), attention in zip(qk, weights, strict=True):
        torch.testing.assert_close(
            sf.interaction_loss_from_qk(q, k, mask, impl="reference", **form),
            sf.interaction_loss(attention, mask, impl="reference"),
        )


@pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 16}, {"bias": False}], ids=["", "other keys", "no bias"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["alone", "batch"])
def test_multi_head_attention(batch: tuple[int, ...], options: dict) -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True, **options)
    x = normal(*batch, TOKENS, 32)
    other = normal(*batch, TOKENS, layer.kdim)
    with sf.record_qk() as qk:
        _, weights = layer(x, other, other, average_attn_weights=False)
    weights = weights.view(-1, 4, TOKENS, TOKENS)
    same(qk, [weights])
    losses = sf.interaction_loss_from_qk(*qk[0], impl="reference"), sf.interaction_loss(weights, impl="reference")
    for parameter in layer.parameters():
        recorded, plain = (
            torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True) for loss in losses
        )
        torch.testing.assert_close(recorded, plain)


def test_a_layer_compiles_whole_and_differentiates_by_torch_func() -> None:
    layer, x = nn.MultiheadAttention(32, 4, batch_first=True), normal(2, TOKENS, 32)

    def loss(parameters: dict[str, Tensor], layer: nn.Module = layer) -> Tensor:
        with sf.record_qk() as qk:
            torch.func.functional_call(layer, parameters, (x, x, x), {"need_weights": False})
        return sf.interaction_loss_from_qk(*qk[0], impl="reference")

    parameters = dict(layer.named_parameters())
    expected = torch.autograd.grad(loss(parameters), layer.in_proj_weight)[0]
    torch.testing.assert_close(torch.func.grad(loss)(parameters)["in_proj_weight"], expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with sf.record_qk() as qk:
        compiled(x, x, x, need_weights=False)
    result = sf.interaction_loss_from_qk(*qk[0], impl="reference")
    torch.testing.assert_close(torch.autograd.grad(result, layer.in_proj_weight)[0], expected)


def test_weights_changed_before_backward_are_noticed() -> None:
    layer, x = nn.MultiheadAttention(32, 4, batch_first=True), normal(2, TOKENS, 32).requires_grad_()
    with sf.record_qk() as qk:
        layer(x, x, x)
    with torch.no_grad():
        layer.in_proj_weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sf.interaction_loss_from_qk(*qk[0]).backward()


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_of_no_token_are_refused(option: str) -> None:
    layer, x = nn.MultiheadAttention(32, 4, **{option: True}), normal(TOKENS, 2, 32)
    with pytest.raises(ValueError, match=option), sf.record_qk():
        layer(x, x, x)


def test_every_layer_of_an_encoder_is_seen_in_training_and_evaluation() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3)
    x = normal(2, TOKENS, 32)
    with sf.record_qk() as qk:
        encoder(x)
    assert [q.requires_grad for q, _ in qk] == [True] * 3
    with torch.no_grad(), sf.record_qk() as qk:
        encoder.eval()(x)
    assert [tuple(k.shape) for _, k in qk] == [(2, 4, TOKENS, 8)] * 3


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_the_scale_of_dot_product_attention_goes_into_the_queries(scale: float | None) -> None:
    q, k, v = (normal(2, 4, TOKENS, 16, seed=seed) for seed in range(3))
    with sf.record_qk() as qk:
        F.scaled_dot_product_attention(q, k, v, scale=scale)
        F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], scale=scale)
        F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0], scale=scale)
        F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)
    weights = ((0.25 if scale is None else scale) * q @ k.mT).softmax(-1)
    same(qk, [weights, weights[:, :1], weights[:1, :1], weights])


def test_attention_to_another_length_is_left_out() -> None:
    q, k = normal(2, 4, TOKENS, 8), normal(2, 4, 5, 8)
    with sf.record_qk() as qk:
        F.scaled_dot_product_attention(q, k, k)
        F.scaled_dot_product_attention(k, k, k)
    assert [tuple(q.shape) for q, _ in qk] == [(2, 4, 5, 8)]
    with pytest.raises(ValueError, match="1 calls between sequences of two lengths"), sf.record_qk():
        F.scaled_dot_product_attention(q, k, k)


def test_nothing_seen_is_an_error_unless_one_is_on_its_way() -> None:
    with pytest.raises(ValueError, match=r"no self-attention was seen: .*attn_implementation=\"sdpa\""), sf.record_qk():
        normal(2, 2).softmax(-1)
    with pytest.raises(KeyError), sf.record_qk():
        raise KeyError


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.flip(-1), x, scale=1.0)


@pytest.mark.parametrize(
    "layer", [nn.TransformerEncoderLayer(8, 4, 64, dropout=0.0), attend], ids=["module", "function"]
)
def test_checkpointed_layers_have_the_same_gradients_or_raise(layer: Callable[[Tensor], Tensor]) -> None:
    x = normal(2, TOKENS, 8).requires_grad_()

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        with sf.record_qk() as qk:
            out = run(x)
        return torch.autograd.grad(out.sum() + 100 * sf.interaction_loss_from_qk(*qk[0]), x)[0]

    checkpointed = gradient(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    torch.testing.assert_close(checkpointed, gradient(layer))
    with pytest.raises(RuntimeError, match="use_reentrant=False where it is checkpointed"):
        gradient(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True))


def hugging_face(name: str) -> nn.Module:
    import transformers

    size = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    deep = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**size, **deep))
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **size))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **size, **deep))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_models_of_hugging_face(name: str, compiled: bool) -> None:
    """With positions, grouped keys and causality as each has them; the last two by its attention mask's shape."""
    model = hugging_face(name).eval()
    ids = torch.randint(3, 100, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = lengths_mask([TOKENS, 8, 3], TOKENS)
    model.set_attn_implementation("sdpa")
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with sf.record_qk() as qk:
        run(input_ids=ids, attention_mask=mask.long())
    model.set_attn_implementation("eager")
    weights = model(input_ids=ids, attention_mask=mask.long(), output_attentions=True).attentions
    same(qk, weights, mask, is_causal=name != "bert")
    assert all(q.requires_grad for q, _ in qk)
