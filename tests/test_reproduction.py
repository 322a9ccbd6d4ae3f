"""Tables: rows, resumption, intervals, and which of the paper's figures stand beside ours."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safr_fast import cli
from safr_fast.data import synthetic
from safr_fast.evaluation.statistics import t_interval
from safr_fast.reproduction import run as module
from safr_fast.reproduction.config import ReproductionConfig
from safr_fast.reproduction.gradients import gradient_shares
from safr_fast.reproduction.run import reproduce
from safr_fast.reproduction.settings import BASELINE, Setting, rows
from safr_fast.reproduction.tables import markdown, summarise
from safr_fast.training import ModelConfig, OptionError, RunError, TrainConfig, loop
from safr_fast.training.run import RunFolder

TINY = ModelConfig(dim=16, heads=2, feedforward=16, mask_hidden=8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small corpus; gives the folders that were trained, in order."""
    corpus = synthetic(0, {"train": 64, "dev": 20, "test": 30})
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: corpus)
    trained: list[str] = []
    original = module.train

    def counted(config: Any, **options: Any) -> Any:
        assert config.out is not None
        if not (config.out / "summary.json").exists():
            trained.append(config.out.name)
        return original(config, **options)

    monkeypatch.setattr(module, "train", counted)
    return trained


def config(out: Path, **options: Any) -> ReproductionConfig:
    defaults: dict[str, Any] = {"dataset": "synthetic", "seeds": 2, "epochs": 1, "device": "cpu", "model": TINY}
    return ReproductionConfig(out=out, **(defaults | options))


def quiet(_: str) -> None:
    pass


def test_a_table_trains_what_is_missing_and_nothing_twice(small: list[str], tmp_path: Path) -> None:
    text = reproduce("table1", config(tmp_path, rows=("baseline", "0.1,0"), seeds=1), report=quiet)
    names = [
        f"synthetic-{protocol}-{row}-seed0"
        for protocol in ("masked", "released")
        for row in ("baseline", "imp0.1-inter0")
    ]
    assert small == names
    assert (tmp_path / "table1-synthetic.md").read_text() == text
    evaluated = {name: (tmp_path / name / "evaluation-tables.json").stat().st_mtime_ns for name in names}
    again = reproduce("table2", config(tmp_path, rows=("0.1,0", "baseline"), protocol="masked", seeds=2), report=quiet)
    assert small[4:] == ["synthetic-masked-imp0.1-inter0-seed1", "synthetic-masked-baseline-seed1"]
    assert {name: (tmp_path / name / "evaluation-tables.json").stat().st_mtime_ns for name in names} == evaluated
    assert "| masked | 0.1,0 | 2 |" in again


def test_an_interrupted_series_keeps_what_is_done(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.evaluate_run
    calls = iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "evaluate_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce("table2", config(tmp_path, rows=("baseline", "0,0"), seeds=1), report=quiet)
    assert json.loads((tmp_path / "table2-synthetic.json").read_text())["rows"][0]["setting"] == "baseline"
    before = list(small)
    reproduce("table2", config(tmp_path, rows=("baseline", "0,0"), seeds=1), report=quiet)
    assert small == before  # both had been trained
    stored = json.loads((tmp_path / "table2-synthetic.json").read_text())
    assert [row["setting"] for row in stored["rows"]] == ["baseline", "0,0"]


def test_a_table_never_shrinks_while_it_is_made_again(small: list[str], tmp_path: Path) -> None:
    wanted = {"rows": ("baseline", "0,0"), "protocol": "masked"}
    reproduce("table2", config(tmp_path, seeds=1, **wanted), report=quiet)
    assert sorted(file.name for file in tmp_path.glob("table2*.json")) == ["table2-synthetic-masked.json"]
    seen = []

    def look(_: str) -> None:
        seen.append(
            [row["seeds"] for row in json.loads((tmp_path / "table2-synthetic-masked.json").read_text())["rows"]]
        )

    reproduce("table2", config(tmp_path, seeds=2, **wanted), report=look)
    assert seen[0] == [[0], [0]]
    assert seen[-1] == [[0, 1], [0]]
    said: list[str] = []
    fewer = config(tmp_path, seeds=1, **(wanted | {"rows": ("baseline",)}))
    for _ in range(2):
        reproduce("table2", fewer, report=said.append)
    file = tmp_path / "table2-synthetic-masked.json"
    assert said == [f"replaces {file}, which also had masked baseline of seed 1; masked 0,0 of seed 0, 1"]
    file.write_text("[]")
    reproduce("table2", fewer, report=said.append)
    assert len(said) == 1


def test_runs_on_other_data_make_no_row_together(small: list[str], tmp_path: Path) -> None:
    wanted = {"rows": ("baseline",), "protocol": "masked"}
    reproduce("table2", config(tmp_path, seeds=2, **wanted), report=quiet)
    file = tmp_path / "synthetic-masked-baseline-seed1" / "evaluation-tables.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"texts": 31}))
    assert ReproductionConfig(rows=["baseline"]).rows == ("baseline",)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"seed0 was evaluated on 30 test texts, .*seed1 on 31: their data are not the"):
        reproduce("table2", config(tmp_path, seeds=2, **wanted), report=quiet)


def test_a_table_of_what_is_finished_trains_nothing(small: list[str], tmp_path: Path) -> None:
    wanted = {"rows": ("baseline", "0.1,0.1"), "protocol": "masked", "log_gradients": True}
    with pytest.raises(RunError, match="no run of table2 is finished"):
        reproduce("table2", config(tmp_path, finished_only=True, **wanted), report=quiet)
    reproduce("table2", config(tmp_path, seeds=1, **wanted), report=quiet)
    trained = len(small)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    text = reproduce("table2", config(tmp_path, finished_only=True, **wanted), report=quiet)
    assert len(small) == trained
    assert [line.split(" | ")[1:3] for line in text.splitlines()[-2:]] == [["baseline", "1"], ["0.1,0.1", "1"]]


def test_finished_runs_of_another_machine_stay(small: list[str], tmp_path: Path) -> None:
    wanted = {"rows": ("baseline",), "protocol": "masked", "seeds": 1}
    text = reproduce("table2", config(tmp_path, **wanted), report=quiet)
    trained = len(small)
    assert reproduce("table2", config(tmp_path, threads=3, device="cuda", **wanted), report=quiet) == text
    assert len(small) == trained
    with pytest.raises(RunError, match="log_gradients False"):
        reproduce("table2", config(tmp_path, log_gradients=True, **wanted), report=quiet)


def test_gradient_shares_are_of_the_mean_norms(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ReproductionConfig.training
    monkeypatch.setattr(ReproductionConfig, "training", lambda *run: replace(training(*run), log_every=1))
    wanted = {"rows": ("baseline", "0.1,0.2"), "protocol": "masked", "log_gradients": True, "seeds": 1}
    reproduce("table2", config(tmp_path, **wanted), report=quiet)
    folder = RunFolder(tmp_path / "synthetic-masked-imp0.1-inter0.2-seed0")
    steps = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    norms = [step["train"] for step in steps if step["event"] == "step"]
    total = {term: sum(n[f"gradient_{term}"] for n in norms) for term in ("cross_entropy", "importance", "interaction")}
    means = {term: 100 * total[term] / total["cross_entropy"] for term in ("importance", "interaction")}
    baseline, row = json.loads((tmp_path / "table2-synthetic-masked.json").read_text())["rows"]
    assert len(norms) > 1
    assert row["gradients"]["importance"][0] == pytest.approx(0.1 * means["importance"])
    assert row["gradients"]["interaction"][0] == pytest.approx(0.2 * means["interaction"])
    assert baseline["gradients"] == {}
    folder.metrics_file.unlink()
    assert gradient_shares(folder) == pytest.approx({term: row["gradients"][term][0] / 100 for term in means})


def test_runs_of_other_settings_are_not_taken_for_the_tables(small: list[str], tmp_path: Path) -> None:
    reproduce("table2", config(tmp_path, rows=("baseline",), seeds=1), report=quiet)
    for options, change in (
        ({"epochs": 2}, r"epochs 1 \(now 2\)"),
        ({"epochs": None}, r"epochs 1 \(now 15\)"),
        ({"model": ModelConfig()}, r"model.dim 16 \(now 256\), model.heads 2 \(now 8\)"),
    ):
        with pytest.raises(RunError, match=f"was trained with {change}.*: give the same options, or another folder"):
            reproduce("table2", config(tmp_path, rows=("baseline",), seeds=1, **options), report=quiet)


def test_an_option_at_its_default_is_one_too(small: list[str], tmp_path: Path) -> None:
    reproduce("table2", config(tmp_path, rows=("baseline",), seeds=1, patience=10), report=quiet)
    with pytest.raises(RunError, match=r"was trained with patience 10 \(now 3\): give the same options"):
        reproduce("table2", config(tmp_path, rows=("baseline",), seeds=2), report=quiet)
    assert len(small) == 1


def test_a_table_says_how_it_was_trained_where_not_as_the_paper(small: list[str], tmp_path: Path) -> None:
    sizes = ", ".join(f"model.{name} {getattr(TINY, name)}" for name in ("dim", "heads", "feedforward", "mask_hidden"))
    text = reproduce("table2", config(tmp_path, rows=("0.1,0",), seeds=1), report=quiet)
    other = reproduce("table2", config(tmp_path, rows=("0.1,0",), seeds=1, variant="paper"), report=quiet)
    assert text.splitlines()[0].endswith(f"(synthetic; epochs 1, {sizes})")
    assert other.splitlines()[0].endswith(f"(synthetic; variant paper, epochs 1, {sizes})")
    assert (tmp_path / "table2-synthetic.md").read_text() == text
    assert (tmp_path / "table2-synthetic-paper.md").read_text() == other
    assert ReproductionConfig().departures() == {}


def test_weights_that_are_gone_and_needed_are_named(small: list[str], tmp_path: Path) -> None:
    wanted = {"rows": ("baseline",), "protocol": "masked", "seeds": 1}
    reproduce("table2", config(tmp_path, normalised=2, **wanted), report=quiet)
    (tmp_path / "synthetic-masked-baseline-seed0" / "model.safetensors").unlink()
    with pytest.raises(
        RunError, match=r"are gone; evaluation-tables.json was made with normalised 2 \(now 3\); leave it out by --fin"
    ):
        reproduce("table2", config(tmp_path, normalised=3, **wanted), report=quiet)
    with pytest.raises(RunError, match=r"evaluation-tables.json was made with texts None \(now 5\); leave it out"):
        reproduce("table2", config(tmp_path, texts=5, **wanted), report=quiet)
    with pytest.raises(RunError, match=r"weights are gone; it has no evaluation-figure3.json"):
        reproduce("figure3", config(tmp_path, **wanted), report=quiet)


def test_a_table_takes_an_evaluation_that_has_more_than_it_asks(small: list[str], tmp_path: Path) -> None:
    wanted = {"rows": ("baseline", "0,0"), "protocol": "masked", "seeds": 1}
    table = reproduce("table2", config(tmp_path, normalised=2, **wanted), report=quiet)
    files = sorted(tmp_path.glob("*/evaluation-tables.json"))
    before = [file.read_bytes() for file in files]
    assert len(before) == 2
    for weights in tmp_path.glob("*/model.safetensors"):
        weights.unlink()
    assert "| masked | 0,0 |" in reproduce("table3", config(tmp_path, **wanted), report=quiet)
    assert reproduce("table2", config(tmp_path, **wanted), report=quiet) == table
    assert [file.read_bytes() for file in files] == before


def test_the_evaluation_takes_the_asked_threads(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, threads = module.evaluate_run, []

    def noting(*arguments: Any, **options: Any) -> Any:
        threads.append(torch.get_num_threads())
        return original(*arguments, **options)

    monkeypatch.setattr(module, "evaluate_run", noting)
    for asked in (1, 3):
        out = tmp_path / str(asked)
        reproduce("table1", config(out, rows=("baseline",), protocol="masked", seeds=1, threads=asked), report=quiet)
    assert threads == [1, 3]


def test_an_evaluation_on_other_texts_is_made_anew(small: list[str], tmp_path: Path) -> None:
    for texts, expected in ((10, 10), (None, 30)):
        reproduce("table2", config(tmp_path, rows=("baseline",), seeds=1, texts=texts), report=quiet)
        assert json.loads((tmp_path / "table2-synthetic.json").read_text())["texts"] == [expected]


def test_figure3_has_curves_with_a_control(small: list[str], tmp_path: Path) -> None:
    text = reproduce("figure3", config(tmp_path, rows=("0.1,0.1",), seeds=2, protocol="masked"), report=quiet)
    assert "| masked | 0.1,0.1 | 2 | capacity |" in text
    assert "| masked | 0.1,0.1 | 2 | random |" in text
    assert (tmp_path / "figure3-synthetic-masked.svg").stat().st_size > 5_000
    (row,) = json.loads((tmp_path / "figure3-synthetic-masked.json").read_text())["rows"]
    assert list(row["rankers"]["random"]) == [str(k) for k in range(10, 100, 10)]


def test_table3_has_every_place(small: list[str], tmp_path: Path) -> None:
    text = reproduce("table3", config(tmp_path, rows=("0,0", "baseline"), seeds=1, protocol="masked"), report=quiet)
    assert text.count("| masked | 0,0 |") == 8
    assert text.count("| masked | baseline |") == 7  # no VMASK output, and nothing called important
    assert "| masked | baseline | FFN2 | " in text


def evaluation(accuracy: float, srs: float) -> dict[str, Any]:
    of_k = {
        "accuracy": [accuracy - srs, 0, 1],
        "srs": [srs, 0, 1],
        "predicted_positive": 0.4,
        "comprehensiveness": [0.1, 0, 1],
    }
    names = ("capacity:ffn1_pre", "capacity:vmask", "random")
    rankers = {name: {"k": {"30": of_k}} for name in names}
    limits = {"texts": 100, "rankers": {name: [0.6, 0, 1] for name in names}}
    return {
        "texts": 1743,
        "one_word_texts": 3,
        "accuracy": [accuracy, 0, 1],
        "rankers": rankers,
        "normalised_aopc": limits,
    }


def test_values_are_means_over_seeds_beside_the_papers_own() -> None:
    results = [
        {"protocol": "released", "setting": setting, "seed": seed, "evaluation": evaluation(value, 0.1)}
        for setting in (Setting(1, 0.1), Setting(0.01, 0.1))
        for seed, value in enumerate((0.70, 0.72, 0.74))
    ]
    known, unknown = summarise("table2", "sst2", results)["rows"]
    assert known["accuracy"] == pytest.approx(t_interval([70.0, 72.0, 74.0]))
    assert known["paper"] == {"accuracy": 72.96, "random": 75.3, "srs": 18.24}
    assert unknown["paper"] is None
    lines = markdown(summarise("table2", "sst2", results)).splitlines()
    assert lines[-2].startswith("| released | 1,0.1 | 3 | 72.00 ± 4.97 | 72.96 |")
    assert lines[-1].startswith("| released | 0.01,0.1 | 3 | 72.00 ± 4.97 |  |")
    assert summarise("table2", "imdb", results)["rows"][0]["paper"] is None
    assert "1,743 test texts (3 of one word, which keep it)" in "\n".join(lines)
    assert summarise("table2", "sst2", results, {"variant": "paper"})["rows"][0]["paper"] is None
    elsewhere = [result | {"evaluation": result["evaluation"] | {"texts": 1821}} for result in results]
    assert summarise("table2", "sst2", elsewhere)["rows"][0]["paper"] is None
    masked = [result | {"protocol": "masked"} for result in results]
    assert summarise("table2", "sst2", masked)["rows"][0]["paper"] is None


def test_normalised_aopc_is_of_all_runs_of_a_row_on_as_many_texts() -> None:
    def shown(*counts: int | None) -> dict[str, Any]:
        runs = [evaluation(0.7, 0.1) for _ in counts]
        for run, count in zip(runs, counts, strict=True):
            run["normalised_aopc"] = {} if count is None else run["normalised_aopc"] | {"texts": count}
        results = [
            {"protocol": "masked", "setting": Setting(1, 0.1), "seed": seed, "evaluation": run}
            for seed, run in enumerate(runs)
        ]
        return summarise("table2", "sst2", results)["rows"][0]["normalised_aopc"]

    assert shown(100, 100)["random"] == pytest.approx((0.6, 0.0))
    assert shown(100, 50) == shown(100, None) == shown(None, 100) == shown(None, None) == {}


def test_rows_hold_the_papers_settings_first_and_each_once() -> None:
    table2 = rows("table2", "sst2")
    assert table2[:5] == (BASELINE, Setting(0, 0), Setting(0, 1), Setting(1, 0), Setting(1, 0.1))
    assert len(set(table2)) == len(table2) == 17
    assert rows("table1", "imdb") == (BASELINE, Setting(), Setting(0.01, 0.01))


def test_a_row_given_twice_is_one_row() -> None:
    """Twice the same runs would make the interval of a mean too narrow."""
    settings = ReproductionConfig(rows=("1,0.1", "0,0", "1.0,.1")).settings("table2")
    assert settings == (Setting(1, 0.1), Setting(0, 0))


def test_options_of_the_training_reach_it() -> None:
    asked = ReproductionConfig(epochs=7, patience=9, threads=2).training("masked", Setting(), 4)
    assert (asked.epochs, asked.patience, asked.threads, asked.seed) == (7, 9, 2, 4)
    assert ReproductionConfig().training("masked", Setting(), 0).patience == TrainConfig().patience


def test_options_of_the_evaluation_are_refused_before_the_training(small: list[str], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="target must be one of table1, table2, table3, figure3, got 'table4'"):
        reproduce("table4", config(tmp_path), report=quiet)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="texts must be at least 1, got 0"):
        reproduce("table2", config(tmp_path, texts=0), report=quiet)
    assert small == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ("1",)}, "rows must be baseline or two weights such as 1,0.1, got '1'"),
        ({"rows": ("a,b",)}, "rows must be baseline or two weights"),
        ({"dataset": "sst3"}, "dataset must be one of synthetic, sst2, imdb, got 'sst3'"),
        ({"protocol": "none"}, "protocol must be one of masked, released, both, got 'none'"),
        ({"variant": None}, "variant must be one of released, paper, got None"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"model": ModelConfig(layers=2)}, "model.layers must be 1, as in the paper, got 2"),
        ({"model": ModelConfig(gate=False)}, "model.gate belongs to the rows: give --rows baseline"),
    ],
)
def test_options_that_make_no_table_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ReproductionConfig(**options)


@pytest.mark.parametrize("text", ["baseline", "0,0", "1,0.1", "0.01,1", "1e-05,10"])
def test_a_setting_comes_back_from_its_name(text: str) -> None:
    assert str(Setting.of(text)) == text


def test_the_commands_run_from_end_to_end(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "--model.dim 16 --model.heads 2 --model.feedforward 16 --model.mask-hidden 8 --device cpu --epochs 1"
    out = tmp_path / "synthetic-masked-baseline-seed0"
    cli.main(["reproduce", "table2", "--dataset", "synthetic", "--seeds", "1", "--rows", "baseline",
              "--protocol", "masked", "--out", str(tmp_path), *tiny.split()])  # fmt: skip
    assert "| masked | baseline | 1 |" in capsys.readouterr().out
    cli.main(["evaluate", str(out), "--k", "30", "--normalised", "2"])
    assert "average capacity" in capsys.readouterr().out
    cli.main(["evaluate", str(out), "--k", "30", "--normalised", "0"])
    assert "evaluation.json, which was made with normalised 2 (now 0)" in capsys.readouterr().out
    for damaged in ("{", json.dumps(json.loads((out / "evaluation.json").read_text()) | {"config": []})):
        (out / "evaluation.json").write_text(damaged)
        cli.main(["evaluate", str(out), "--k", "30", "--normalised", "0"])
        assert f"will replace {out / 'evaluation.json'}, which is damaged" in capsys.readouterr().out
    cli.main(["report", str(out), "--text", "a good film", "--text", "a bad one"])
    assert "report.html" in capsys.readouterr().out
    assert all((out / "figures" / f"text{i}-capacity.svg").exists() for i in (1, 2))
    assert {"evaluation.json", "report.html"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize(
    ("target", "rows"), [("table2", ()), ("table3", ("0,0", "1,0", "1,0.1")), ("figure3", ("baseline", "0,1", "1,0.1"))]
)
def test_committed_results_give_their_tables_without_data_or_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, rows: tuple[str, ...]
) -> None:
    results = Path(__file__).parents[1] / "results" / "sst2-released"
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    for table in tmp_path.glob(f"{target}*"):
        table.unlink()
    options = ["--protocol", "released", "--finished-only", "--out", str(tmp_path)]
    cli.main(["reproduce", target, *options, *(["--rows", *rows] if rows else [])])
    text = (results / f"{target}-sst2.md").read_text(encoding="utf-8")
    assert (tmp_path / f"{target}-sst2.md").read_text(encoding="utf-8") == text
    printed = capsys.readouterr().out
    assert text in printed
    # Figure 3 is of the five runs whose weights were there when it was made.
    assert printed.count("left out: ") == (10 if target == "figure3" else 0)
