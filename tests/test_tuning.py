"""Configurations chosen by time: by an injected timer in the interpreter, and what is kept of the choice on disk."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import lengths_mask, needs_interpreter, normal
from torch import Tensor

pytestmark = needs_interpreter
if sys.platform == "linux":
    from safr_fast.kernels import configs, launch, tuning
    from safr_fast.kernels.configs import Config

    GPU = tuning.Device("A GPU (40 GB)", "9.0", "3.7.1", "0123456789ab", 232_448, True)


class PretendTimer:
    """Times what a step launches with by a price list, and counts."""

    def __init__(self, price: Callable[["Config"], float]) -> None:
        self.price, self.timed = price, 0

    def milliseconds(self, step: Callable[[], object]) -> float:
        self.timed += 1
        with watching_configurations() as used:
            step()
        return sum(map(self.price, used.values()))


@contextmanager
def watching_configurations() -> Iterator[dict[str, "Config"]]:
    """Which configurations are launched with, by kernel."""
    used: dict[str, Config] = {}
    config = configs.config

    def watched(kernel: str, *where: object) -> Config:
        used[kernel] = config(kernel, *where)
        return used[kernel]

    configs.config = watched
    try:
        yield used
    finally:
        configs.config = config


def tuner(folder: Path, price: Callable[["Config"], float] = lambda config: 1.0, device=None, **options):
    return tuning.Tuner(device or GPU, folder, PretendTimer(price), **options)


def most_stages(config: "Config") -> float:
    return 1.0 / config.num_stages


def pretend(kernel: str = "moment", result: Callable[["Config"], Tensor] = lambda config: torch.ones(3)):
    """A launcher of two kernels that does nothing with them."""

    def launched() -> tuple[Tensor, ...]:
        configs.config("interaction", 32, 16, torch.device("cpu"))
        return (result(configs.config(kernel, 32, 16, torch.device("cpu"))),)

    return launched


X = torch.zeros(4, 16)


def test_the_fastest_is_chosen_and_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernels themselves, which give the same but for rounding."""
    monkeypatch.setattr(tuning, "EXECUTION", {"num_warps": (8,)})
    monkeypatch.setattr(tuning, "VARIED", {"interaction": ("rows",)})
    q, k = normal(1, 1, 70, 16, seed=1), normal(1, 1, 70, 16, seed=2)

    def interact() -> tuple[Tensor, ...]:
        return launch.interaction_from_qk(
            q, k, None, None, scale=0.3, is_causal=False, squared=True, exclude_diagonal=False, need_grad=True
        )

    table = interact()
    with tuning.using(tuner(tmp_path, lambda config: 1000.0 / config.num_warps - config.rows)):
        first = interact()
        with watching_configurations() as used:
            second = interact()
    assert {kernel: (config.rows, config.num_warps) for kernel, config in used.items()} == {
        "softmax": (64, 8), "interaction": (128, 8), "gram": (64, 8), "query_key_gradient": (64, 8)
    }  # fmt: skip
    for one, again, by_table in zip(first, second, table, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, by_table, rtol=1e-4, atol=1e-6)


def test_another_process_takes_what_one_chose_and_tries_nothing(tmp_path: Path) -> None:
    tuner(tmp_path, most_stages).run(pretend(), X, 70)
    later = tuner(tmp_path)
    with watching_configurations() as used:
        later.run(pretend(), X, 80)  # of a kind with 70
    assert later.timer.timed == 0
    assert {config.num_stages for config in used.values()} == {4}


@pytest.mark.parametrize(
    ("kernel", "x", "tokens"),
    [("moment", X, 140), ("moment", X.half(), 70), ("quadratic_form", X, 70)],
    ids=["longer", "another dtype", "another kernel"],
)
def test_what_is_not_of_the_kind_is_tried_for_itself(tmp_path: Path, kernel: str, x: Tensor, tokens: int) -> None:
    tuner(tmp_path).run(pretend(), X, 70)
    later = tuner(tmp_path)
    later.run(pretend(kernel), x, tokens)
    assert later.timer.timed > 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_launches_say_how_long_their_sequences_are(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(launch, "tuned", lambda launch, x, tokens, **_: said.append(tokens) or launch())
    h, cu_seqlens = normal(2, 20, 4), None
    q = k = normal(2, 1, 20, 4)
    if packed:
        h, q, cu_seqlens = h.flatten(0, 1), h.reshape(40, 1, 4), torch.tensor([0, 15, 40], dtype=torch.int32)
        k = q
    energy, norm, moments = launch.row_energy(h, None, cu_seqlens, False)
    launch.row_energy_backward(h, None, cu_seqlens, energy, norm, moments, energy, norm)
    launch.interaction_from_qk(q, k, None, cu_seqlens, 0.3, False, True, False, False)
    assert said == [20, 20, 20]


def test_precision_of_float32_is_a_kind_of_its_own() -> None:
    x = normal(4)
    before = torch.get_float32_matmul_precision()
    kinds = set()
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        kinds.add(tuning.Kind.of(x, 64))
    torch.set_float32_matmul_precision(before)
    assert len(kinds) == 3


def test_candidates_fit_registers_and_shared_memory() -> None:
    found = Config(64, 64, 64)
    tried = tuning.neighbours("interaction", 16, found, GPU)
    assert tried[0] == found
    assert len(tried) == len(set(tried))
    assert Config(128, 64, 64, num_warps=8, num_stages=3, descriptors=True) in tried
    assert all(config.num_warps == 8 for config in tried if config.rows == 128)
    assert any(config.descriptors for config in tuning.neighbours("interaction", 48, found, GPU))
    small = tuning.Device("small", "8.6", "", "", 101_376, False)
    wide = Config(64, 64, 256, num_warps=8)
    assert all((c.rows + c.columns) * 512 * (c.num_stages - 1) <= 101_376
               for c in tuning.neighbours("token", 16, wide, small)[1:])  # fmt: skip
    assert len(tuning.neighbours("token", 16, wide, small)) < len(tuning.neighbours("token", 16, wide, GPU))


def test_tiles_that_other_kernels_rely_on_are_left_as_they_are() -> None:
    for kernel in ("softmax", "query_key_gradient", "weight_product", "interaction_block", "attention_block"):
        found = configs._CONFIGS[kernel, 16]
        for config in tuning.neighbours(kernel, 16, found, GPU):
            assert (config.rows, config.columns, config.features, config.out) == (
                found.rows, found.columns, found.features, found.out
            )  # fmt: skip


def test_a_faster_but_wrong_configuration_is_not_chosen(tmp_path: Path) -> None:
    trials: list[dict] = []
    launched = pretend(result=lambda config: torch.ones(3) * (1.001 if config.num_stages == 4 else 1.0))
    chosen = tuner(tmp_path, most_stages, report=trials.append)
    with watching_configurations() as used:
        chosen.run(launched, X, 70)
    assert used["moment"].num_stages == 3
    assert used["interaction"].num_stages == 4
    assert any("more than rounding" in trial.get("why", "") for trial in trials)


def test_one_that_fails_is_passed_over(tmp_path: Path) -> None:
    def result(config: "Config") -> Tensor:
        if config.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(3)

    trials: list[dict] = []
    chosen = tuner(tmp_path, lambda config: 1.0 / config.num_warps, report=trials.append)
    with watching_configurations() as used:
        chosen.run(pretend(result=result), X, 70)
    assert (used["moment"].num_warps, used["interaction"].num_warps) == (4, 8)
    assert any("shared memory" in trial.get("why", "") for trial in trials)


def test_where_nothing_could_be_timed_nothing_is_chosen(tmp_path: Path) -> None:
    def price(config: "Config") -> float:
        raise RuntimeError("out of memory")

    chosen = tuner(tmp_path, price)
    chosen.run(pretend(), X, 70)
    timed = chosen.timer.timed
    chosen.run(pretend(), X, 70)
    assert chosen.timer.timed == timed > 0  # nor tried at every call
    assert not list(tmp_path.iterdir())


def test_results_that_are_not_finite_choose_nothing(tmp_path: Path) -> None:
    chosen = tuner(tmp_path)
    launched = []

    def not_a_number(config: "Config") -> Tensor:
        launched.append(config)
        return torch.tensor([torch.nan])

    for _ in range(3):
        chosen.run(pretend(result=not_a_number), X, 70)
    assert chosen.timer.timed == 0
    assert len(launched) == 3  # nor is anything launched twice
    assert not chosen.tried
    for _ in range(tuning.MOST_NOT_FINITE):
        chosen.run(pretend(result=not_a_number), X, 70)
    assert len(chosen.tried) == 2  # given up: nothing waits for the device any more
    assert not list(tmp_path.iterdir())


def test_a_ragged_batch_on_the_moment_path_chooses(
    tmp_path: Path, uninitialised_is_nan: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its short sequences have no moment, and nobody writes a norm of it."""
    monkeypatch.setattr(tuning, "EXECUTION", {"num_stages": (4,)})
    monkeypatch.setattr(tuning, "VARIED", {})
    h, mask = normal(2, 300, 32), lengths_mask([300, 7], 300)
    chosen = tuner(tmp_path, most_stages)
    with tuning.using(chosen):
        *_, moment_norm = launch.importance(h, mask, None, 0.0, 1.0, True, True)
    assert moment_norm[1].isnan()
    assert {name.split(" of ")[0] for name in chosen.served} >= {"moment_and_short", "quadratic_form"}


def test_a_packed_batch_that_ends_early_chooses(
    tmp_path: Path, uninitialised_is_nan: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows past its last sequence are of none, and nobody writes them."""
    monkeypatch.setattr(tuning, "EXECUTION", {"num_stages": (4,)})
    monkeypatch.setattr(tuning, "VARIED", {})
    chosen = tuner(tmp_path, most_stages)
    with tuning.using(chosen):
        launch.importance(normal(40, 16), None, torch.tensor([0, 15, 30], dtype=torch.int32), 0.0, 1.0, True, True)
    assert chosen.served


def test_nothing_is_tried_while_a_graph_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_capturing", lambda x: True)
    chosen = tuner(tmp_path)
    (result,) = chosen.run(pretend(), X, 70)
    assert torch.equal(result, torch.ones(3))
    assert chosen.timer.timed == 0


def test_after_the_deadline_the_table_stays(tmp_path: Path) -> None:
    chosen = tuner(tmp_path, most_stages)
    chosen.deadline = 0.0
    chosen.run(pretend(), X, 70)
    assert not chosen.cache.chosen


def test_without_being_asked_for_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_tuner_of", lambda device: pytest.fail("a tuner was made"))
    tuning.tuned(pretend(), X, 70)
    monkeypatch.setenv("SAFR_FAST_AUTOTUNE", "1")
    tuning.tuned(pretend(), X, 70)  # in the interpreter time means nothing


@pytest.mark.parametrize("damage", ["", "[]", '{"format": 1}', "\x00", "another Triton", "another form"])
def test_a_file_that_is_damaged_or_foreign_is_ignored_with_a_warning(tmp_path: Path, damage: str) -> None:
    first = tuner(tmp_path, most_stages)
    first.run(pretend(), X, 70)
    content = json.loads(first.cache.path.read_text())
    if damage == "another Triton":
        damage = json.dumps(content | {"triton": "9.9"})
    elif damage == "another form":
        damage = json.dumps(content | {"chosen": {name: {"tiles": 3} for name in content["chosen"]}})
    first.cache.path.write_text(damage)
    with pytest.warns(UserWarning, match="ignored, and written anew"):
        later = tuner(tmp_path)
    assert not later.cache.chosen
    with pytest.warns(UserWarning, match="ignored, and written anew"):
        later.run(pretend(), X, 70)
    assert tuner(tmp_path).cache.chosen == later.cache.chosen != {}


def test_an_entry_that_would_not_be_tried_is_ignored(tmp_path: Path) -> None:
    """Its tiles might reach beyond the workspace."""
    first = tuner(tmp_path)
    first.run(pretend(), X, 70)
    content = json.loads(first.cache.path.read_text())
    for fields in content["chosen"].values():
        fields["columns"] = 4096
    first.cache.path.write_text(json.dumps(content))
    later = tuner(tmp_path)
    with pytest.warns(UserWarning, match="none that would be tried"), watching_configurations() as used:
        later.run(pretend(), X, 70)
    assert later.timer.timed > 0
    assert all(config.columns != 4096 for config in used.values())


def test_what_others_wrote_meanwhile_is_kept_and_files_are_whole(tmp_path: Path) -> None:
    one, other = tuner(tmp_path), tuner(tmp_path)
    one.cache.add("a", Config(64, 64, 64))
    other.cache.add("b", Config(32, 32, 32))
    assert set(tuner(tmp_path).cache.chosen) == {"a", "b"}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_the_first_choice_of_a_name_serves_every_process(tmp_path: Path) -> None:
    one, other, slow = tuner(tmp_path), tuner(tmp_path), tuner(tmp_path, most_stages)
    first, second = Config(64, 64, 64), Config(32, 32, 32)
    assert one.cache.add("a", first) == first
    assert other.cache.add("a", second) == first  # chosen meanwhile: not written over
    other.cache.add("b", second)
    one.cache.add("c", first)
    assert tuner(tmp_path).cache.chosen == {"a": first, "b": second, "c": first}

    other.run(pretend(), X, 70)
    slow.run(pretend(), X, 70)  # began before there was a file
    assert slow.timer.timed == 0
    assert slow.served == other.served


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:  # a lock of its own for each descriptor, as processes have
        caches = [tuner(tmp_path).cache for _ in range(4)]
        list(pool.map(lambda i: caches[i % 4].add(str(i), Config(64, 64, 64)), range(40)))
    assert len(tuner(tmp_path).cache.chosen) == 40


def test_threads_share_a_tuner(tmp_path: Path) -> None:
    class Stopwatch:
        def milliseconds(self, step: Callable[[], object]) -> float:
            step()
            return 1.0

    trials: list[dict] = []
    chosen = tuning.Tuner(GPU, tmp_path, Stopwatch(), trials.append)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: chosen.run(pretend(), X, 70 << i % 4), range(40)))
    assert len(chosen.served) == 8  # two kernels, four lengths
    assert len({(trial["name"], trial["config"]) for trial in trials}) == len(trials)  # nothing is tried twice


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chosen = tuner(tmp_path / "file" / "folder", most_stages)
    with pytest.warns(UserWarning, match="cannot be written"):
        chosen.run(pretend(), X, 70)
    assert {config.num_stages for config in chosen.cache.chosen.values()} == {4}


def test_devices_and_versions_have_files_of_their_own(tmp_path: Path) -> None:
    others = [tuning.Device(**{**vars(GPU), name: "other"}) for name in ("name", "capability", "triton", "kernels")]
    assert len({device.file_name for device in (GPU, *others)}) == 5
    assert GPU.file_name.startswith("a-gpu-40-gb-")


def test_where_choices_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SAFR_FAST_CACHE_DIR", raising=False)
    assert tuning.folder() == tmp_path / "safr-fast"
    monkeypatch.setenv("SAFR_FAST_CACHE_DIR", str(tmp_path / "here"))
    assert tuning.folder() == tmp_path / "here"
    monkeypatch.delenv("SAFR_FAST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.folder() == Path.home() / ".cache" / "safr-fast"
