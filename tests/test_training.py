"""Runs: what they measure and keep, stopping and restoring, going on after a kill."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SIZES, TINY
from ranks import train as run
from run_support import assert_same_runs, contents, records, script_accuracy
from support import offsets
from torch import Tensor

import safr_fast as sf
from safr_fast.data import Truth, Vocabulary, synthetic
from safr_fast.data.batches import Batch, EncodedSplit, by_length, token_buckets
from safr_fast.nn import ClassifierOutput, TransformerClassifier
from safr_fast.training import (
    OptionError,
    RunError,
    TrainConfig,
    load_run,
    loop,
    measure,
    meter,
    train,
)
from safr_fast.training.agreement import Agreement, above
from safr_fast.training.measure import evaluate
from safr_fast.training.model import build_model
from safr_fast.training.plan import Step, share, steps
from safr_fast.training.protocol import MASKED
from safr_fast.training.run import RunFolder, write_atomically, write_json

pytestmark = pytest.mark.usefixtures("small_corpus")


def test_metrics_hold_every_term_weighted_and_not(tmp_path: Path) -> None:
    result = run(tmp_path / "run", lambda_importance=0.5, lambda_interaction=0.25)
    epochs = records(result.out, "epoch")
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    for record in epochs:
        trained, dev = record["train"], record["dev"]
        assert trained["importance_weighted"] == pytest.approx(0.5 * trained["importance"])
        assert trained["interaction_weighted"] == pytest.approx(0.25 * trained["interaction"])
        assert set(dev) == {"accuracy", "cross_entropy", "importance", "interaction", "gate"}
        assert 0 < trained["gate"] < 1
        assert record["seconds"] > 0
        assert record["tokens_per_second"] > 0
    assert epochs[-1]["train"]["total"] < epochs[0]["train"]["total"]
    assert [record["step"] for record in records(result.out, "step")] == [2, 4, 6, 8, 10, 12, 14, 16]
    (end,) = records(result.out, "end")
    assert end["test"] == result.test
    assert json.loads((result.out / "summary.json").read_text())["test"] == result.test


# The total is a mean over samples, and the released importance one over tokens: in one batch they agree.
@pytest.mark.parametrize(("variant", "batch_size"), [("paper", 32), ("released", SIZES["train"])])
def test_the_total_is_the_sum_of_its_terms(tmp_path: Path, variant: str, batch_size: int) -> None:
    result = run(tmp_path / "run", variant=variant, batch_size=batch_size, lambda_importance=0.5, epochs=1)
    (trained,) = (record["train"] for record in records(result.out, "epoch"))
    terms = [trained[name] for name in ("cross_entropy", "importance_weighted", "interaction_weighted")]
    assert min(terms) > 0
    assert trained["total"] == pytest.approx(sum(terms))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_measures_of_a_split_do_not_depend_on_the_evaluation_batch(
    monkeypatch: pytest.MonkeyPatch, variant: Any
) -> None:
    corpus = synthetic(0, SIZES)
    vocabulary = Vocabulary.of(corpus.train.texts)
    split = EncodedSplit.of(corpus.test, vocabulary)
    torch.manual_seed(0)
    model = build_model(len(vocabulary), TINY)
    measured = []
    for size in (1, 100, int(split.lengths.sum())):
        monkeypatch.setattr(measure, "_EVALUATION_TOKENS", size)
        measured.append(evaluate(model, split, TrainConfig(variant=variant)))
    assert measured[0] == pytest.approx(measured[2], rel=1e-5)
    assert measured[1] == pytest.approx(measured[2], rel=1e-5)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_training_weighs_the_released_importance_by_tokens(variant: Any) -> None:
    """Two batches: one text of three tokens, and two texts of one."""
    means = measure.Means(variant, MASKED)
    for lengths, importance in (([3], 1.0), ([1, 1], 2.0)):
        labels = torch.zeros(len(lengths), dtype=torch.int64)
        output = ClassifierOutput(torch.zeros(len(lengths), 2), torch.zeros(sum(lengths), 1), (), None)
        terms = dict.fromkeys(("importance", "importance_weighted", "interaction"), torch.tensor(importance))
        ids = torch.zeros(sum(lengths), dtype=torch.int64)
        batch = Batch(ids, offsets(lengths), labels, max(lengths), list(range(len(lengths))))
        means.add_batch(batch, output, terms)
    by_samples, by_tokens = (1 * 1.0 + 2 * 2.0) / 3, (3 * 1.0 + 2 * 2.0) / 5
    expected = by_tokens if variant == "released" else by_samples
    values = means.read()
    assert values["importance"] == values["importance_weighted"] == pytest.approx(expected)
    assert values["interaction"] == pytest.approx(by_samples)


@pytest.mark.parametrize("log_every", [2, 1_000])
def test_a_diverged_run_is_an_error_and_says_what_to_do(tmp_path: Path, log_every: int) -> None:
    with pytest.raises(RunError, match=r"has diverged, \w+ is (nan|inf) in training.* lower --learning-rate"):
        run(tmp_path / "run", learning_rate=1e30, log_every=log_every)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_whose_last_step_diverges_is_an_error(tmp_path: Path) -> None:
    """The only batch is measured before the step that ruins the weights."""
    with pytest.raises(RunError, match=r"has diverged, \w+ is (nan|inf) in evaluation after epoch 1"):
        run(tmp_path / "run", learning_rate=1e30, batch_size=SIZES["train"])


def test_json_is_never_written_with_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": math.nan})
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).append_metrics({"loss": math.inf})
    assert not (tmp_path / "file.json").exists()


@pytest.fixture
def trained() -> tuple[TransformerClassifier, EncodedSplit]:
    """A model whose gates and dropout are at rest, and texts."""
    corpus = synthetic(0, SIZES)
    vocabulary = Vocabulary.of(corpus.train.texts)
    torch.manual_seed(0)
    return build_model(len(vocabulary), TINY).eval(), EncodedSplit.of(corpus.train, vocabulary)


def test_a_text_has_the_same_loss_whatever_its_batch_mates(
    trained: tuple[TransformerClassifier, EncodedSplit],
) -> None:
    model, split = trained

    def losses(rows: list[int]) -> list[Tensor]:
        """Cross-entropy and interaction of each text, and the importance of each of its tokens."""
        batch = split.batch(rows)
        output = model(batch.ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        form: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens, "reduction": "none"}
        importance = sf.importance_loss(output.hidden, eps=1e-5, **form)
        interaction = sf.interaction_loss_from_qk(*output.qk[0], squared=False, exclude_diagonal=True, **form)
        cross_entropy = torch.nn.functional.cross_entropy(output.logits, batch.labels, reduction="none")
        per_token = importance.split(batch.cu_seqlens.diff().tolist())
        return [torch.cat((cross_entropy[i : i + 1], interaction[i], per_token[i])) for i in range(len(rows))]

    alone = [losses([row])[0] for row in range(len(split))]
    for batches in ([list(range(len(split)))], by_length(split.lengths, 100), token_buckets(split.lengths, 60, 0, 1)):
        for rows in batches:
            for row, own in zip(rows, losses(rows), strict=True):
                torch.testing.assert_close(own, alone[row])


def gradients(model: TransformerClassifier, split: EncodedSplit, planned: list[Step], variant: Any) -> list[Tensor]:
    loss = sf.SAFRLoss(0.5, 0.25, variant=variant)
    model.zero_grad()
    for step in planned:
        for rows in step.batches:
            batch = split.batch(rows)
            share(step, batch, loss, measure.forward(model, loss, batch, MASKED)[1]).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("batches", [{"batch_size": 7}, {"batch_tokens": 120}], ids=["by texts", "by tokens"])
def test_accumulated_batches_are_one_step(
    trained: tuple[TransformerClassifier, EncodedSplit], batches: dict[str, int], variant: Any
) -> None:
    model, split = trained
    planned = steps(split.lengths, TrainConfig(accumulate=1_000, **batches), 1)
    assert len(planned) == 1
    assert len(planned[0].batches) > 5
    whole = steps(split.lengths, TrainConfig(batch_size=len(split)), 1)
    pairs = zip(gradients(model, split, planned, variant), gradients(model, split, whole, variant), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_every_text_weighs_the_same_in_an_epoch_of_batches_by_tokens(
    trained: tuple[TransformerClassifier, EncodedSplit], variant: Any
) -> None:
    model, split = trained
    planned = steps(split.lengths, TrainConfig(batch_tokens=120), 1)
    assert len({len(step.batches[0]) for step in planned}) > 3
    (whole,) = steps(split.lengths, TrainConfig(batch_size=len(split)), 1)
    pairs = zip(gradients(model, split, planned, variant), gradients(model, split, [whole], variant), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, len(planned) * expected, rtol=1e-4, atol=1e-5)


BOTH = pytest.mark.parametrize("protocol", [{}, {"protocol": "released", "max_len": 24}], ids=["masked", "released"])


@BOTH
def test_bfloat16_trains_by_nearly_the_same_terms(tmp_path: Path, protocol: dict[str, Any]) -> None:
    exact, rounded = (
        records(run(tmp_path / str(bf16), bf16=bf16, epochs=1, log_every=1, **protocol).out, "step")
        for bf16 in (False, True)
    )
    for ours, expected in zip(rounded, exact, strict=True):
        for name in ("cross_entropy", "importance", "interaction"):
            assert ours["train"][name] == pytest.approx(expected["train"][name], rel=0.05)
            assert ours["train"][name] != expected["train"][name]


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_has_the_precision_and_the_back_end_of_its_run(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def forward(model: Any, loss: sf.SAFRLoss, *arguments: Any) -> Any:
        output, parts = original(model, loss, *arguments)
        seen.append((output.logits.dtype, loss.impl))
        return output, parts

    original = measure.forward
    monkeypatch.setattr(measure, "forward", forward)
    corpus = synthetic(0, SIZES)
    vocabulary = Vocabulary.of(corpus.test.texts)
    config = TrainConfig(model=TINY, bf16=bf16, impl="reference")
    evaluate(build_model(len(vocabulary), TINY), EncodedSplit.of(corpus.test, vocabulary), config)
    assert set(seen) == {(torch.bfloat16 if bf16 else torch.float32, "reference")}


@BOTH
def test_compiled_steps_are_the_steps_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: dict[str, Any]
) -> None:
    """Without random numbers, which a compiler draws in its own way, and without generating code, which takes long."""
    compiled: list[torch.nn.Module] = []

    def compile(model: torch.nn.Module, **options: Any) -> Any:
        compiled.append(model)
        return original(model, backend="aot_eager", **options)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    still = dataclasses.replace(TINY, gate=False, dropout=0.0)
    for name in ("eager", "compiled"):
        run(tmp_path / name, epochs=1, log_every=1, model=still, compile=name == "compiled", **protocol)
    assert len(compiled) == 1
    for a, b in zip(records(tmp_path / "eager", "step"), records(tmp_path / "compiled", "step"), strict=True):
        assert a["train"] == pytest.approx(b["train"], rel=1e-4)


def test_full_length_cuts_nothing(tmp_path: Path) -> None:
    config = TrainConfig(dataset="imdb", full_length=True).resolved()
    assert (config.max_len, config.batch_tokens) == (0, 8192)
    assert TrainConfig(full_length=True, batch_tokens=100).resolved().batch_tokens == 100
    with pytest.raises(OptionError, match="full_length cuts no text, but max_len is 512"):
        TrainConfig(full_length=True, max_len=512)
    said: list[str] = []
    config = TrainConfig(out=tmp_path / "run", epochs=1, full_length=True, model=TINY, device="cpu", accumulate=2)
    result = train(config, report=said.append)
    (epoch,) = records(result.out, "epoch")
    assert epoch["step"] == 1
    assert said[-1].startswith("peak memory: process ")
    assert result.peak_memory["process"] > 2**20


def test_an_epoch_without_a_terminal_says_its_speed_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter([0.0, 30.0, 60.0, 90.0, 120.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    with meter.Meter(2, 10_000, 2_000, said.append) as progress:
        for _ in range(4):
            progress.add(1_000)
    assert said == [
        "epoch   2 |  40% of 10,000 tokens | 33 tokens/s | 3 min left of it",
        "epoch   2 |  60% of 10,000 tokens | 33 tokens/s | 2 min left of it",
    ]


def test_a_term_of_weight_zero_is_not_computed_in_training_but_measured_in_evaluation(tmp_path: Path) -> None:
    result = run(tmp_path / "run", lambda_importance=0.0, lambda_interaction=0.0, epochs=1)
    (epoch,) = records(result.out, "epoch")
    assert not {"importance", "interaction"} & set(epoch["train"])
    assert epoch["dev"]["importance"] > 0
    assert epoch["dev"]["interaction"] > 0


def test_the_plain_transformer_trains_without_a_gate(tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=1, model=dataclasses.replace(TINY, gate=False))
    assert "gate" not in result.test
    assert set(result.agreement) == {"pair_attention"}
    assert load_run(result.out)[0].gate is None


def test_two_runs_of_one_configuration_are_equal_to_the_bit(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "c", seed=1)
    assert contents(tmp_path / "c")[1] != contents(tmp_path / "a")[1]


def test_the_best_epoch_is_restored_and_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = script_accuracy(monkeypatch, 0.6, 0.8, 0.8, 0.7)
    result = run(tmp_path / "run", epochs=20, patience=2)
    assert (result.best_epoch, result.epochs) == (2, 4)
    first, second, _, last, final_dev, final_test = seen
    for restored in (final_dev, final_test, RunFolder(result.out).load_model()):
        assert all(torch.equal(restored[name], second[name]) for name in second)
    for other in (first, last):
        assert any(not torch.equal(other[name], second[name]) for name in second)


def test_training_stops_after_patience_epochs_without_a_strict_improvement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = {"cross_entropy": 0.0, "importance": 0.0, "interaction": 0.0}
    monkeypatch.setattr(loop, "evaluate", lambda *_: terms | {"accuracy": 0.5})
    result = run(tmp_path / "run", epochs=20, patience=3)
    assert (result.best_epoch, result.epochs) == (1, 4)


def test_a_run_comes_back_from_its_folder(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    model, vocabulary, config = load_run(result.out)
    assert (config.learning_rate, config.lambda_importance) == (1e-3, 0.1)
    corpus = synthetic(0, SIZES)
    assert vocabulary.words == Vocabulary.of(corpus.train.texts).words
    split = EncodedSplit.of(corpus.test, vocabulary)
    assert evaluate(model, split, config) == result.test


@pytest.mark.parametrize("max_len", [1, 3])
def test_max_len_cuts_texts_and_with_them_the_planted_pairs(tmp_path: Path, max_len: int) -> None:
    result = run(tmp_path / "run", max_len=max_len, epochs=1)
    (epoch,) = records(result.out, "epoch")
    assert epoch["tokens_per_second"] * epoch["seconds"] == pytest.approx(max_len * SIZES["train"])
    assert "pair_attention" not in result.agreement


def test_the_callers_threads_and_random_numbers_are_left_as_they_were(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(tmp_path / "run", epochs=1, threads=threads + 1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="rights by user, group and others")
def test_weights_are_readable_by_whom_the_other_files_are(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_model({"w": torch.zeros(1)})
    write_json(folder.config_file, {})
    assert folder.model_file.stat().st_mode == folder.config_file.stat().st_mode


def test_accuracy_is_a_count_whatever_the_batches() -> None:
    """Early stopping asks whether one is above another, and means times sizes add up to a count only nearly."""
    labels = (torch.arange(90) % 3 == 0).long()  # the model says 0 of each
    for size in (1, 7, 13, 30, 49, 90):
        means = measure.Means("released", MASKED)
        for part in labels.split(size):
            n = len(part)
            batch = Batch(torch.zeros(n, dtype=torch.int64), offsets([1] * n), part, 1, list(range(n)))
            means.add_batch(batch, ClassifierOutput(torch.zeros(n, 2), torch.zeros(n, 1), (), None), {})
        assert means.collected()["accuracy"] == (60.0, 90)


def test_above_counts_pairs_with_ties_half() -> None:
    a, b = torch.randint(0, 5, (50,)).float(), torch.randint(0, 5, (70,)).float()
    pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    assert above(a, b) == pytest.approx(pairs.mean().item())


def test_agreement_reads_gates_by_role_and_attention_on_pairs() -> None:
    truth = [Truth(("filler", "negator", "sentiment"), ((1, 2),)), Truth(("sentiment",), ())]
    gate = torch.tensor([0.1, 0.9, 0.8, 0.6])
    q, k = torch.zeros(4, 1, 1), torch.zeros(4, 1, 1)
    q[2], k[1] = 1.0, math.log(2.0)
    batch = Batch(torch.zeros(4, dtype=torch.int64), offsets([3, 1]), torch.tensor([0, 1]), 3, [0, 1])
    agreement = Agreement(truth)
    output = ClassifierOutput(torch.zeros(2, 2), torch.zeros(4, 1), ((q, k),), gate)
    for row, text in zip(batch.rows, MASKED.texts(output, batch), strict=True):
        agreement.add(row, text)
    summary = agreement.summary()
    assert summary["gate_filler"] == pytest.approx(0.1)
    assert summary["gate_negator"] == pytest.approx(0.9)
    assert summary["gate_sentiment"] == pytest.approx(0.7)
    assert summary["gate_auc"] == 1.0
    assert summary["pair_attention"] == pytest.approx(3 * 2 / 4)
