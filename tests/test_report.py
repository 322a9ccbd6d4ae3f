"""The page of a run: self-contained, escaped, and true to what the model gives."""

import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

import safr_fast as sf
from safr_fast.data import synthetic
from safr_fast.data.corpus import Split
from safr_fast.evaluation import EvaluationConfig, Predictor, evaluate_run
from safr_fast.evaluation.places import exact_capacity, hidden_states
from safr_fast.report import Report, content, drawn, figures, page, report_run
from safr_fast.training import ModelConfig, OptionError, RunError, TrainConfig, load_run, loop, train
from safr_fast.training.run import RunFolder

NASTY = """<script>alert(1)</script> <br /> $x_1$ "quoted" {{7*7}} &amp; ' </td> naïve 日本語 $$ %s good bad good
\b\uffffA"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with VMASK, evaluated and with gradient norms, and a baseline as it was trained."""
    corpus = synthetic(0, {"train": 64, "dev": 20, "test": 20})
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.data, "load", lambda *_, **__: corpus)
        for gate, name in ((True, "vmask"), (False, "baseline")):
            model = ModelConfig(gate=gate, dim=16, heads=2, feedforward=16, mask_hidden=8)
            config = TrainConfig(
                out=folder / name, model=model, epochs=2, device="cpu", log_every=1, log_gradients=True, max_len=300
            )
            train(config, report=lambda _: None)
        evaluate_run(folder / "vmask", EvaluationConfig(k=(20, 30), normalised=0))
    return {name: folder / name for name in ("vmask", "baseline")}


class Reader(html.parser.HTMLParser):
    """Tags, addresses, and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def own_source(page: Path) -> str:
    """Of a page, without the library that draws its figures."""
    source, library = page.read_text(encoding="utf-8"), get_plotlyjs()
    assert source.count(library) == 1
    return source.replace(library, "")


def plots(page: Path) -> dict[str, dict[str, Any]]:
    (found,) = re.findall(r'<script type="application/json" id="plots">(.*?)</script>', own_source(page), re.DOTALL)
    return json.loads(found)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def reports(runs: dict[str, Path]) -> dict[str, Report]:
    return {name: report_run(run, [NASTY]) for name, run in runs.items()}


@pytest.mark.parametrize("name", ["vmask", "baseline"])
def test_a_page_escapes_every_word_and_asks_for_nothing(reports: dict[str, Report], name: str) -> None:
    report = reports[name]
    reader = read(report.page)
    assert reader.tags.count("script") == 3
    assert "br" not in reader.tags
    assert not reader.addresses
    assert not re.search(r"https?://|@import|url\(", own_source(report.page))
    words = NASTY.replace("\b", "\ufffd").replace("\uffff", "\ufffd").split()
    assert set(words) <= {text.strip() for text in reader.text}
    for file in report.figures.iterdir():
        root = ET.fromstring(file.read_bytes())  # well-formed, whatever the words
        assert not root.findall(".//{http://www.w3.org/2000/svg}script")
    labels = plots(report.page)["text1-allocation-ffn1-before-relu"]["data"][0]["text"]
    assert {"&lt;br", "&lt;/td&gt;", "$x_1$", "&amp;amp;", "日本語"} <= set(labels)  # what plotly would take for markup
    graph = (report.figures / "text1-allocation-ffn1-before-relu.svg").read_text(encoding="utf-8")
    assert "$x_1$" in graph
    assert "日本語" in graph


def test_a_page_shows_every_part(reports: dict[str, Report]) -> None:
    text = " ".join(read(reports["vmask"].page).text)
    for part in (
        "Capacity by layer and word",
        "Neuron allocation",
        "Interference and polysemanticity",
        "Accuracy after deleting k % of the words",
        "Average capacity",
        "Every term as weighted",
        "Gradient norm of each weighted term",
        "Words of the vocabulary",
    ):
        assert part in text, part
    assert "This run has not been evaluated" in " ".join(read(reports["baseline"].page).text)


@pytest.mark.parametrize(
    ("name", "ranked"), [("vmask", "VMASK probability"), ("baseline", "capacity at the embedding")]
)
def test_importance_is_called_what_it_is(reports: dict[str, Report], name: str, ranked: str) -> None:
    text = " ".join(read(reports[name].page).text)
    assert f"Each word on its {ranked}:" in text
    assert f"Colour: importance, by {ranked}." in text
    graph = (reports[name].figures / "text1-allocation-ffn1-before-relu.svg").read_text(encoding="utf-8")
    assert ranked in graph


def test_numbers_on_a_page_are_said_to_be_what_they_are(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "vmask"
    shutil.copytree(runs["vmask"], run)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"epochs": 9, "best_epoch": 6}
    (run / "summary.json").write_text(json.dumps(summary))
    text = " ".join(read(report_run(run, ["good film", "good good film"]).page).text)
    assert ", of epoch 6 of 9" in text
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"protocol": "released"}))
    assert ", of epoch 9 of 9" in " ".join(read(report_run(run, ["good film"]).page).text)
    assert "At k = 30 %, AOPC over all k:" in text
    assert text.count("the strongest only.") == text.count("the strongest only, each once.") == 1
    assert text.count("of every pair,") == text.count("of every pair, each once,") + 1 == 2


def test_unknown_words_are_marked_and_counted(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "vmask"
    shutil.copytree(runs["vmask"], run)
    known = " ".join(load_run(run)[1].words[2:4])
    report = report_run(run, [f"{known} zzz qqq", known])
    source = report.page.read_text(encoding="utf-8")
    assert source.count("<span class=unknown") == 2
    assert "; 2 (dotted) are unknown to the model" in source
    assert len(list(report.figures.glob("text2-*.svg"))) > 1
    report_run(run, [known])
    assert not list(report.figures.glob("text2-*.svg"))  # nothing of a page that is gone


def test_the_curve_of_deletion_goes_from_left_to_right() -> None:
    by_k = {k: {"accuracy": [float(k) / 100, 0.0, 1.0]} for k in ("50", "10", "30")}
    figure = content.deletion({"accuracy": [0.9, 0.8, 1.0], "reference": "random", "rankers": {"random": {"k": by_k}}})
    (line,) = figure.paper.axes[0].get_lines()
    assert np.asarray(line.get_xydata()).tolist() == [[0, 90], [10, 10], [30, 30], [50, 50]]
    low, high, middle = figure.page.data
    assert (middle.x, middle.y) == ((0, 10, 30, 50), (90, 10, 30, 50))
    assert (low.y, high.y) == ((80, 0, 0, 0), (100, 100, 100, 100))


def test_gradient_norms_stand_at_the_epochs_they_are_of() -> None:
    steps = [
        {"event": "step", "epoch": epoch, "train": {"gradient_cross_entropy": norm}}
        for epoch, norm in ((3, 0.7), (5, 0.6), (5, 0.8), (7, 0.5))
    ]
    assert content._gradient_norms(steps) == {"cross-entropy": pytest.approx({3: 0.7, 5: 0.7, 7: 0.5})}
    (line,) = figures.curves({"a": {3: 0.7, 5: 0.7}}, "norm").axes[0].lines
    assert line.get_xdata().tolist() == [3, 5]


@pytest.mark.parametrize("values", [(0.7, 0.5, 0.31), (0.58, 0.69), (2.3, 4.4), (0.5, 30.0, 400.0)])
def test_a_logarithmic_axis_has_numbers(values: tuple[float, ...]) -> None:
    both = drawn.curves({"a": dict(enumerate(values, 1))}, "norm", log=True)
    texts = [
        text for element in ET.fromstring(figures.svg(both.paper)).iter() if (text := (element.text or "").strip())
    ]
    ticks = [float(text) for text in texts if re.fullmatch(r"[\d.]+", text)]
    within = [tick for tick in ticks if min(values) <= tick <= max(values)]
    assert len({tick for tick in within if tick not in (1, 2, 3)}) >= 2
    axis = both.page.layout.yaxis
    assert axis.type == "log"
    assert [float(text) for text in axis.ticktext] == pytest.approx(axis.tickvals)
    assert len([tick for tick in axis.tickvals if min(values) <= tick <= max(values)]) >= 2


def test_of_several_layers_the_page_begins_at_the_last_ones_ffn1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: synthetic(0, {"train": 32, "dev": 8, "test": 8}))
    model = ModelConfig(dim=16, heads=2, feedforward=16, mask_hidden=8, layers=2)
    train(TrainConfig(out=tmp_path / "run", model=model, epochs=1, device="cpu"), report=lambda _: None)
    (tmp_path / "run" / "figures").mkdir()
    (tmp_path / "run" / "figures" / "deletion.svg").touch()
    text = report_run(tmp_path / "run", ["a good film"]).page.read_text()
    chosen = re.findall(r"<option value=\"\d+\" selected>([^<]+)<", text)
    assert set(chosen) == {"layer2 FFN1 before ReLU"}
    assert not (tmp_path / "run" / "figures" / "deletion.svg").exists()


def test_a_page_of_a_killed_run_shows_what_is_whole(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "killed"
    shutil.copytree(runs["baseline"], run)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "ep')
    assert "Every term as weighted" in report_run(str(run), [NASTY]).page.read_text(encoding="utf-8")
    (run / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"evaluation.json cannot be read"):
        report_run(run, [NASTY])


def test_an_evaluation_of_other_weights_is_not_shown_for_these(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "vmask"
    shutil.copytree(runs["vmask"], run)
    assert "At k = 30 %" in " ".join(read(report_run(run, ["good film"]).page).text)
    model = load_run(run)[0]
    with torch.no_grad():
        model.classify.bias += 1
    RunFolder(run).save_model(model.state_dict())
    text = " ".join(read(report_run(run, ["good film"]).page).text)
    assert "This run was evaluated with other weights, or by an older version; after safr-fast evaluate" in text
    assert "At k = 30 %" not in text


def test_a_vocabulary_without_words_has_no_highest(runs: dict[str, Path]) -> None:
    model = load_run(runs["vmask"])[0]
    model.embedding = torch.nn.Embedding(2, model.embedding.embedding_dim)
    assert content.vocabulary(model, []) == {"highest": [], "lowest": []}


def test_a_text_without_words_is_named(runs: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="text must hold words, got ' '"):
        report_run(runs["baseline"], ["good", " "])


def test_unknown_rankers_are_named_before_the_work(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: synthetic(0, {"train": 64, "dev": 20, "test": 20}))
    monkeypatch.setattr("safr_fast.evaluation.run._bar", lambda name: pytest.fail(name))
    with pytest.raises(OptionError, match=r"rankers must be among capacity:embedding, .* got vmsk"):
        evaluate_run(runs["vmask"], EvaluationConfig(rankers=("vmsk",)))


def test_data_that_a_run_was_not_trained_on_are_refused(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: synthetic(1, {"train": 64, "dev": 20, "test": 20}))
    before = (runs["vmask"] / "evaluation.json").read_bytes()
    for look in (evaluate_run, report_run):
        with pytest.raises(RunError, match=r"the data are not those that .* began with, .*: give those .* --data-dir"):
            look(runs["vmask"], data_dir="other")
    assert (runs["vmask"] / "evaluation.json").read_bytes() == before
    assert capsys.readouterr().out == ""  # nothing was said to be replaced


def test_the_page_takes_a_text_of_each_class_that_is_neither_short_nor_long() -> None:
    middle = "a b c d e f g h i j k"
    assert page._examples(Split(["x", f"0 {middle}", f"1 {middle}", f"2 {middle}"], [1, 0, 1, 0])) == [
        f"0 {middle}",
        f"1 {middle}",
    ]
    assert page._examples(Split(["", "x", "y"], [0, 0, 1])) == ["x", "y"]


def test_a_review_of_two_thousand_words_stays_a_page(runs: dict[str, Path]) -> None:
    words = [word for text in synthetic(1, {"train": 400, "dev": 0, "test": 0}).train.texts for word in text.split()][
        :2_000
    ]
    report = report_run(runs["vmask"], [" ".join(words)])
    assert len(own_source(report.page)) < 1_000_000  # beside the library's 5
    assert "lie past the model's window" in " ".join(read(report.page).text)
    assert read(report.page).tags.count("tr") < 500


def test_what_is_shown_of_a_text_is_what_the_model_gives(runs: dict[str, Path]) -> None:
    model, vocabulary, config = load_run(runs["vmask"])
    predictor = Predictor(model, vocabulary, config)
    text = "the plot was not good , we watched it twice"
    shown = content.of_text(model, predictor, text)
    batch = predictor.encode([text]).batch([0])
    output, states = hidden_states(model, batch.ids, batch.mask)
    assert [word.text for word in shown.words] == text.split()
    for p, h in enumerate(states.values()):
        expected = exact_capacity(h, batch.mask)[0].tolist()
        assert [word.values[p] for word in shown.words] == pytest.approx(expected)
        assert shown.largest[p] == pytest.approx(max(expected))
    assert output.gate is not None
    assert [word.gate for word in shown.words] == pytest.approx(output.gate[0].tolist())
    assert shown.positive == pytest.approx(predictor([text.split()])[0, 1].item(), rel=1e-5)


def test_words_of_the_vocabulary_are_ranked_by_capacity_among_all(runs: dict[str, Path]) -> None:
    model, vocabulary, _ = load_run(runs["vmask"])
    found = content.vocabulary(model, vocabulary.words)
    with torch.no_grad():
        x = model.embedding.weight[2:] * 4.0
        assert model.gate is not None
        h = (model.gate(x)[:, None] * x).double()
    values = sf.capacity(h, impl="reference")
    best = values.argsort(descending=True)[:20].tolist()
    assert [row.word for row in found["highest"]] == [vocabulary.words[2 + i] for i in best]
    assert [row.capacity for row in found["highest"]] == pytest.approx(values[best].tolist(), rel=1e-4)
    assert found["lowest"][0].capacity <= found["highest"][-1].capacity


def test_edges_show_the_sign_and_near_words_are_the_strong_pairs() -> None:
    """Two pairs, one aligned and one opposed, at right angles to each other."""
    h = np.array([[3.0, 0.1], [3.0, -0.1], [0.1, 3.0], [-0.1, -3.0]])
    both = drawn.allocation(["a", "b", "c", "d"], h @ h.T, np.full(4, 0.5), np.linspace(0, 1, 4), "VMASK probability")
    figure = both.paper
    edges, dots = figure.axes[0].collections
    xy = np.asarray(dots.get_offsets())
    colors = {}
    for line, color in zip(edges.get_segments(), edges.get_colors(), strict=True):
        i, j = (int(np.abs(xy - end).sum(1).argmin()) for end in line)
        colors[min(i, j), max(i, j)] = "red" if color[0] > color[2] else "blue"
    assert (colors[0, 1], colors[2, 3]) == ("red", "blue")
    assert figure.axes[1].get_ylabel() == "VMASK probability"

    def distance(i: int, j: int) -> float:
        return float(np.linalg.norm(xy[i] - xy[j]))

    assert max(distance(0, 1), distance(2, 3)) < min(distance(i, j) for i in (0, 1) for j in (2, 3))
    sizes = dots.get_sizes()
    assert sizes[0] == sizes[1]
    lines = both.page.layout.shapes
    assert len(lines) == len(edges.get_segments())
    for line, (start, end), color in zip(lines, edges.get_segments(), edges.get_colors(), strict=True):
        assert [line.x0, line.y0, line.x1, line.y1] == pytest.approx([*start, *end], rel=1e-3)
        assert line.line.color == ("#b2182b" if color[0] > color[2] else "#2166ac")
    (circles,) = both.page.data
    assert np.column_stack([circles.x, circles.y]) == pytest.approx(xy, rel=1e-3)
    assert circles.hovertext[3] == "d<br>capacity 0.5<br>VMASK probability 1"


def test_a_matrix_shows_every_pair_and_long_words_leave_it_room() -> None:
    words = ["good", "https://example.org/" + "a" * 300, "bad"]
    values = np.array([[9.0, 4.0, 1.0], [4.0, 9.0, 0.0], [1.0, 0.0, 9.0]])
    both = drawn.interference(words, values, np.array([5.0, 4.0, 1.0]))
    heat, bars = both.page.data
    assert heat.z == ([None, 2.0, 1.0], [2.0, None, 0.0], [1.0, 0.0, None])  # the root, which is what colours show
    assert list(heat.customdata) == values.tolist()
    assert (heat.zmin, heat.zmax) == (0, 2.0)
    assert list(heat.colorbar.tickvals) == [0, 1, 2]
    assert list(heat.colorbar.ticktext) == ["0", "1", "4"]
    assert bars.x == (5.0, 4.0, 1.0)
    labels = ["good", "https://example.o…", "bad"]
    assert list(both.page.layout.xaxis.ticktext) == labels
    assert [tick.get_text() for tick in both.paper.axes[0].get_xticklabels()] == labels
    strip = figures.capacities(words, {"embedding": np.ones(3)})
    assert [tick.get_text() for tick in strip.axes[0].get_xticklabels()] == labels


def test_circles_of_small_capacities_are_told_apart() -> None:
    gram, capacity = np.eye(2), np.array([1e-4, 4e-4])
    both = drawn.allocation(["a", "b"], gram, capacity, np.zeros(2), "VMASK probability")
    small, large = both.paper.axes[0].collections[1].get_sizes()
    assert large > 3 * small
    (circles,) = both.page.data
    areas = np.array(circles.marker.size) / circles.marker.sizeref
    assert areas == pytest.approx([38**2 / 8, 38**2 / 2])
    (none,) = drawn.allocation(["a", "b"], gram, np.zeros(2), np.zeros(2), "VMASK probability").page.data
    assert min(none.marker.size) > 0  # which plotly would draw at no size, whatever the least


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (3.4e-4, "3e-04"), (0.0123, "0.01"), (0.5, "0.50"), (1, "1.00")]
)
def test_small_capacities_keep_a_digit(value: float, text: str) -> None:
    assert page._capacity(value) == text


@pytest.mark.parametrize("words", [["only"], ["same", "same"]])
def test_graphs_and_matrices_of_few_words_are_drawn(words: list[str]) -> None:
    n = len(words)
    zero: Any = np.zeros((n, n))
    both = [
        drawn.allocation(words, zero, np.zeros(n), np.zeros(n), "VMASK probability"),
        drawn.interference(words, zero, np.zeros(n)),
    ]
    for figure in both:
        figures.svg(figure.paper)
        json.loads(figure.page.to_json())
