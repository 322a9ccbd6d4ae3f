"""Runs that are interrupted, killed or damaged: they end as if nothing had been, or say why they cannot."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ranks
from ranks import TINY
from ranks import train as run
from run_support import assert_same_runs, contents, count_steps, interrupt_at_step, records
from support import forkserver

from safr_fast import data
from safr_fast.training import RunError, TrainConfig, load_run, loop, train
from safr_fast.training.lock import locked
from safr_fast.training.run import RunFolder

pytestmark = pytest.mark.usefixtures("small_corpus")


@pytest.mark.parametrize("checkpoint_every", [1, 3, 1_000])
@pytest.mark.parametrize("step", [1, 4, 5, 11], ids=lambda step: f"interrupted at step {step}")
def test_a_resumed_run_ends_as_if_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, checkpoint_every: int
) -> None:
    run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", checkpoint_every=checkpoint_every)
    with monkeypatch.context() as patched:
        steps = count_steps(patched)
        run(tmp_path / "parts", resume=True)
    assert len(steps) == 16 - max((step - 1) // 4 * 4, (step - 1) // checkpoint_every * checkpoint_every)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / "state.safetensors").exists()


def test_a_resumed_run_with_pads_that_count_ends_as_if_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"protocol": "released", "max_len": 24, "epochs": 2, "checkpoint_every": 3}
    run(tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", **options)
    run(tmp_path / "parts", resume=True, **options)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_run_killed_at_random_moments_ends_as_if_never_killed(tmp_path: Path) -> None:
    """At least 10 kills, at moments spread over all a run still has to do, its start and its end too.

    How many of them meet a run that had already been killed depends on the machine's load: it goes on until 2 have.
    """
    options = {"epochs": 2, "checkpoint_every": 2, "log_every": 3, "batch_tokens": 150}
    in_process(tmp_path / "warm", False, options).join()
    started = time.perf_counter()
    in_process(tmp_path / "whole", False, options).join()
    seconds = time.perf_counter() - started
    random = Random(0)
    kills, resumed, runs = 0, 0, [tmp_path / "0"]
    while kills < 10 or resumed < 2:
        assert kills + len(runs) < 500
        out = runs[-1]
        begun = (out / "config.json").exists()
        process = in_process(out, begun, options)
        process.join(random.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            resumed += begun
        else:
            assert process.exitcode == 0
            runs.append(tmp_path / str(len(runs)))
    begun = (runs[-1] / "config.json").exists()
    last = in_process(runs[-1], begun, options)
    last.join()
    assert last.exitcode == 0
    for out in runs:
        assert_same_runs(tmp_path / "whole", out)
        assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}


def dying_before(patched: pytest.MonkeyPatch, nth: int) -> list[int]:
    """Before the nth change of the folder: a file put in its place, a record appended, what is left removed.

    Gives their count, which grows.
    """
    count = [0]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == nth:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return changing

    for place, name in ((os, "replace"), (RunFolder, "append_metrics"), (RunFolder, "close")):
        patched.setattr(place, name, counted(getattr(place, name)))
    return count


def test_a_run_ends_as_if_never_killed_whatever_it_was_about_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 2, "checkpoint_every": 4, "log_every": 7, "batch_tokens": 150}
    with monkeypatch.context() as patched:
        count = dying_before(patched, 0)
        run(tmp_path / "whole", **options)
    assert count[0] > 10
    for nth in range(1, count[0] + 1):
        out = tmp_path / str(nth)
        with monkeypatch.context() as patched:
            dying_before(patched, nth)
            with pytest.raises(KeyboardInterrupt):
                run(out, **options)
        run(out, resume=(out / "config.json").exists(), **options)
        assert_same_runs(tmp_path / "whole", out)
        assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}


def in_process(*arguments: Any) -> ForkServerProcess:
    process = forkserver().Process(target=ranks.train_alone, args=arguments)
    process.start()
    return process


def test_a_kill_between_weights_and_state_repeats_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    saves = iter(range(1, 100))
    original = RunFolder.save_state

    def save_state(*arguments: Any) -> None:
        if next(saves) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save_state", save_state)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "st\xffp", "step": 1}\n3\n{"\xc3\xa9vent": "step"}\n{"event": "step", "ep')
    run(tmp_path / "parts", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_kill_between_the_end_and_the_summary_leaves_one_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_summary(*_: Any) -> None:
        raise KeyboardInterrupt

    run(tmp_path / "whole", epochs=2)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_json", interrupted_summary)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", epochs=2)
    assert len(records(tmp_path / "parts", "end")) == 1
    run(tmp_path / "parts", epochs=2, resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_kill_after_the_summary_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", epochs=1)
    (tmp_path / "run" / ".tmpAbCdEf").touch()
    run(tmp_path / "run", epochs=1, resume=True)
    kept = {"config.json", "metrics.jsonl", "model.safetensors", "summary.json", "vocabulary.json"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == kept


def test_a_folder_with_nothing_but_half_written_files_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".config.json.17.tmp").touch()
    assert run(tmp_path, epochs=1).epochs == 1


def test_resuming_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=1)
    before = contents(tmp_path / "run")[1]
    assert run(tmp_path / "run", resume=True, epochs=1) == result
    assert contents(tmp_path / "run")[1] == before


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 6)
        with pytest.raises(KeyboardInterrupt):
            run(out)


def test_resuming_takes_the_runs_own_options_and_refuses_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", monkeypatch)
    with pytest.raises(RunError, match=r"began with seed 0 \(now 3\), model.dim 16 \(now 32\)"):
        run(tmp_path / "run", resume=True, seed=3, model=dataclasses.replace(TINY, dim=32))
    result = train(TrainConfig(out=tmp_path / "run"), resume=True, report=lambda line: None)
    assert result.epochs == 4


def test_another_machine_may_go_on_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "run", monkeypatch)
    asked: list[TrainConfig] = []
    load_corpus = loop.load_corpus

    def asking(config: TrainConfig) -> data.Corpus:
        asked.append(config)
        return load_corpus(config)

    monkeypatch.setattr(loop, "load_corpus", asking)
    moved: dict[str, Any] = {"data_dir": tmp_path, "threads": 1}
    run(tmp_path / "run", resume=True, **moved)
    (config,) = asked
    assert {name: getattr(config, name) for name in moved} == moved
    assert RunFolder(tmp_path / "run").stored_config() == config


def test_of_two_runs_that_take_the_same_new_folder_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_corpus = loop.load_corpus

    def meanwhile(config: TrainConfig) -> data.Corpus:
        if config.seed == 0:
            run(tmp_path / "run", seed=1, epochs=1)
        return load_corpus(config)

    monkeypatch.setattr(loop, "load_corpus", meanwhile)
    with pytest.raises(RunError, match="exists: go on with it by --resume"):
        run(tmp_path / "run", epochs=1)
    assert RunFolder(tmp_path / "run").stored_config().seed == 1


def test_a_run_that_ended_while_another_process_took_it_up_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", monkeypatch)
    load_corpus, nested = loop.load_corpus, iter([True, False])

    def meanwhile(config: TrainConfig) -> data.Corpus:
        if next(nested):
            run(tmp_path / "run", resume=True)
        return load_corpus(config)

    monkeypatch.setattr(loop, "load_corpus", meanwhile)
    with pytest.raises(RunError, match="exists: go on with it by --resume"):
        run(tmp_path / "run", resume=True)
    assert [record["epoch"] for record in records(tmp_path / "run", "epoch")] == [1, 2, 3, 4]


@pytest.mark.skipif(os.name != "posix", reason="locks of Unix")
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_trains_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    out = tmp_path / "run"
    if resume:
        interrupted(out, monkeypatch)
    out.mkdir(exist_ok=True)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with locked(out), pytest.raises(RunError, match="run is being trained by another process: wait for it"):
        run(out, resume=resume, epochs=4)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert run(out, resume=resume, epochs=4).epochs == 4


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupt_at_the_configuration_leaves_a_folder_that_can_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    def interrupted_write(*_: Any) -> None:
        raise KeyboardInterrupt

    if resume:
        interrupted(tmp_path / "run", monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("safr_fast.training.run.write_json", interrupted_write)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", resume=resume)
    assert run(tmp_path / "run", resume=resume).epochs == 4


def change_vocabulary(out: Path) -> None:
    (out / "vocabulary.json").write_text('["other"]')


def break_config(out: Path) -> None:
    (out / "config.json").write_text('{"dataset": "synthetic"}')


def remove_config(out: Path) -> None:
    (out / "config.json").unlink()


def cut(name: str) -> Callable[[Path], None]:
    """Damage: the file ends in its middle."""

    def damage(out: Path) -> None:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])

    return damage


def change_kind(out: Path) -> None:
    (out / "vocabulary.json").write_text('{"a": 1}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_vocabulary, "the data are not those that"),
        (break_config, "config.json cannot be read"),
        (remove_config, "holds no run"),
        (cut("config.json"), "config.json cannot be read .* put back a copy of it, or start anew by another --out"),
        (cut("vocabulary.json"), "vocabulary.json cannot be read .* put back a copy"),
        (change_kind, "vocabulary.json cannot be read .it must be a list of words.: put back a copy"),
        (cut("state.safetensors"), "state.safetensors cannot be read .* remove it to begin again at the first epoch"),
    ],
)
def test_a_folder_that_cannot_go_on_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "run"
    interrupted(out, monkeypatch)
    damage(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(RunError, match=message):
        run(out, resume=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_run_without_its_state_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    interrupted(tmp_path / "parts", monkeypatch)
    (tmp_path / "parts" / "state.safetensors").unlink()
    run(tmp_path / "parts", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["vocabulary.json", "model.safetensors", "config.json"])
def test_a_damaged_file_of_a_finished_run_is_named(tmp_path: Path, name: str) -> None:
    result = run(tmp_path / "run", epochs=1)
    cut(name)(result.out)
    with pytest.raises(RunError, match=f"{name} cannot be read .* put back a copy"):
        load_run(result.out)


def test_files_of_two_runs_are_not_put_together(tmp_path: Path) -> None:
    out = run(tmp_path / "run", epochs=1).out
    words = json.loads((out / "vocabulary.json").read_text())
    (out / "vocabulary.json").write_text(json.dumps(words[:-3]))
    with pytest.raises(
        RunError, match=r"model.safetensors, vocabulary.json, config.json in .* are not of one run: put b"
    ):
        load_run(out)


WRONG_INSIDE = {"config": [], "texts": 3, "rankers": {}, "capacity": {}}


@pytest.mark.parametrize("content", ["{", "[]", '{"texts": 3}', json.dumps(WRONG_INSIDE)])
def test_an_evaluation_that_is_damaged_is_to_be_made_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(RunError, match=r"evaluation.json cannot be read .*: remove it, and it is made anew"):
        RunFolder(tmp_path).load_evaluation("evaluation.json")


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=1)
    file = tmp_path / "run" / "summary.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"of a later version": 1}))
    assert run(tmp_path / "run", epochs=1, resume=True) == result
    without_seconds = {name: value for name, value in whole.items() if name not in ("seconds", "agreement")}
    for damaged, lacks in (
        (without_seconds, "agreement, seconds"),
        (whole | {"test": {}}, "test.accuracy"),
        (whole | {"dev": 1}, "dev.accuracy"),
    ):
        file.write_text(json.dumps(damaged))
        with pytest.raises(RunError, match=rf"summary.json cannot be read .it lacks {lacks}.: put back a copy"):
            run(tmp_path / "run", epochs=1, resume=True)
    cut("summary.json")(tmp_path / "run")
    with pytest.raises(RunError, match=r"summary.json cannot be read .* put back a copy"):
        run(tmp_path / "run", epochs=1, resume=True)


def test_resuming_nothing_names_the_latest_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"--resume needs --out, the folder of the run to go on with$"):
        train(resume=True)
    interrupted(tmp_path / "runs" / "synthetic-1", monkeypatch)
    with pytest.raises(RunError, match=r"for example --out runs/synthetic-1$"):
        train(resume=True)


def test_loading_a_run_without_a_whole_epoch_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    with pytest.raises(RunError, match="has not finished an epoch"):
        load_run(tmp_path / "run")
