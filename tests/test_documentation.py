"""The code that the documents print runs as printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import lengths_mask

ROOT = Path(__file__).parents[1]


def code_of(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_first_example_of_the_readme() -> None:
    names = run(code_of("README.md")[0])
    assert names["loss"].isfinite()
    assert all(names[name].grad.any() for name in ("hidden", "q", "k"))


def test_the_readme_trains_a_model_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the pretrained weights."""
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **size))
    batch = {"input_ids": torch.randint(3, 100, (2, 9)), "attention_mask": lengths_mask([9, 4], 9).long()}
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: lambda texts, **_: batch)
    names = run(code_of("README.md")[1])
    closed = (names["hidden"] == 0).all(-1)  # in training a gate is 0 or 1
    assert closed.any()
    assert not closed.all()
    for parameter in ("bert.embeddings.vmask.to_logits.weight", "bert.embeddings.word_embeddings.weight",
                      "bert.encoder.layer.1.attention.self.query.weight"):  # fmt: skip
        assert model.get_parameter(parameter).grad.any()


def test_every_recipe_runs_and_gives_what_it_says() -> None:
    packed, layers, dictionary, terms, deletion = map(run, code_of("docs/recipes.md"))
    assert packed["cu_seqlens"].tolist() == [0, 5, 125, 142]
    assert packed["hidden"].grad.any()
    assert layers["by_layer"].shape == (3,)
    assert not layers["capacity"][:, 1, 7:].any()
    assert dictionary["dimensionality"].shape == (16_384,)
    assert terms["total"] == terms["task"] + terms["importance"] + terms["interaction"]
    assert deletion["low"] <= deletion["srs"].mean() <= deletion["high"]
    assert deletion["between"] == 1.0
    assert 0 <= deletion["p"] <= 1
