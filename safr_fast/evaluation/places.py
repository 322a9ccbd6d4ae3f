"""Hidden representations at each place of the classifier, and the capacity of tokens there."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from safr_fast import functional
from safr_fast.nn import ClassifierOutput, TransformerClassifier
from safr_fast.nn.classifier import TransformerLayer

PLACES = {
    "embedding": "embedding · √E",
    "vmask": "VMASK output",
    "attention": "attention output",
    "norm": "after the first norm",
    "ffn1_pre": "FFN1 before ReLU",
    "ffn1_post": "FFN1 after ReLU",
    "ffn2": "FFN2",
    "block": "block output",
}
"""Every place, in the order of the computation, and how it is called in print."""


def title(place: str) -> str:
    """A place's name in print; of several layers each has its own places, such as ``layer2.ffn1_pre``."""
    layer, _, name = place.rpartition(".")
    return f"{layer} {PLACES[name]}".strip()


@contextmanager
def recorded(model: TransformerClassifier) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass of ``model`` leaves here what each place held: ``(B, T, width)`` by place."""
    seen: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def watch(module: nn.Module, place: str) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[place] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))

    def first(_: nn.Module, inputs: tuple[Tensor, ...], output: ClassifierOutput) -> None:
        weights = model.embedding.weight  # which the model itself may look up once for each word type
        seen["embedding"] = F.embedding(inputs[0], weights) * math.sqrt(weights.shape[-1])
        if output.gate is not None:
            seen["vmask"] = output.hidden

    handles.append(model.register_forward_hook(first))
    for i, layer in enumerate(cast("list[TransformerLayer]", list(model.layers)), 1):
        prefix = f"layer{i}." if len(model.layers) > 1 else ""
        watch(layer.attention, f"{prefix}attention")
        watch(layer.norm_attention, f"{prefix}norm")
        for part, place in zip(layer.feedforward, ("ffn1_pre", "ffn1_post", "ffn2"), strict=True):
            watch(part, f"{prefix}{place}")
        watch(layer.norm_feedforward, f"{prefix}block")
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(
    model: TransformerClassifier, ids: Tensor, mask: Tensor
) -> tuple[ClassifierOutput, dict[str, Tensor]]:
    """One forward pass in evaluation mode, with what each place held, in the order of :data:`PLACES`."""
    training = model.training
    try:
        with torch.no_grad(), recorded(model.eval()) as seen:
            output = model(ids, mask)
    finally:
        model.train(training)
    rank = {place: i for i, place in enumerate(PLACES)}

    def position(place: str) -> tuple[int, str, int]:
        layer, _, name = place.rpartition(".")
        return len(layer), layer, rank[name]  # layer10 after layer9

    return output, {place: seen[place] for place in sorted(seen, key=position)}


def exact_capacity(h: Tensor, mask: Tensor) -> Tensor:
    r""":func:`safr_fast.capacity` of real tokens, ``(B, T)`` float64, whatever the scale of a row.

    :math:`(h_i \cdot h_j)^2` goes with the fourth power of a mask probability; in float64, none that a float32 softmax
    gives underflows.
    """
    return functional.capacity(h.double(), mask, impl="reference")
