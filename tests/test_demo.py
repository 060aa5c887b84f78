"""`python -m jaxsoftmax`: its numbers, its page, its errors, and what it leaves behind."""

import html.parser
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax._demo import (
    cli,
    comparison,
    digits,
    evaluation,
    figures,
    gallery,
    interrupts,
    network,
    table,
    training,
    usage,
    verdict,
    wording,
)
from jaxsoftmax._demo.models import MODELS

ROOT = Path(__file__).parents[1]
NAMES = [model.name for model in MODELS]


@pytest.fixture(autouse=True)
def strict_float64():
    """Takes the place of the fixture for all tests: a program runs in float32, as users run it."""


@pytest.fixture(scope="module")
def data():
    return digits.load(seed=0)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "report"


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


class Page(html.parser.HTMLParser):
    """What a browser would load, show and read out."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.alts, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href", "srcset") if name in attrs]
        if tag == "img":
            self.alts.append(attrs["alt"])

    def handle_data(self, data):
        self.text += data


def assert_self_contained(page):
    assert "://" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert page.addresses
    assert all(re.match(r"data:image/(svg\+xml|png);base64,", a) for a in page.addresses)


def fake_result(model, probs, labels, temperature=1.0):
    judgement = evaluation._judge(jnp.asarray(probs), jnp.asarray(labels))
    trained = training.Trained({}, [training.Epoch(1.0, 0.5)])
    scores = np.log(np.asarray(probs) + 1e-3)
    return evaluation.Result(
        model, trained, scores, temperature, before=judgement, after=judgement, vector=judgement
    )


# The whole of it


@pytest.mark.thorough
def test_default_run(out):
    done = python("-m", "jaxsoftmax", "--out", str(out), timeout=300)
    assert done.returncode == 0, done.stderr

    table_shown, _, told = done.stdout.partition("\nHere ")
    lines = [line for line in table_shown.splitlines() if line.startswith(tuple(NAMES))]
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == [name for name in NAMES for _ in range(3)]
    shown = []
    for name, scaling, *numbers in rows:
        assert scaling in ("none", "vector") or float(scaling.removeprefix("T=")) > 0
        accuracy, likelihood, expected, smooth, brier, support = (
            float(number.rstrip("%")) for number in numbers
        )
        assert 88 <= accuracy <= 94
        assert likelihood > 0
        # Two measures of one thing.
        assert 0 < expected < 6
        assert abs(smooth - expected) < 2
        assert 0.1 < brier < 0.2
        shown.append((brier, name, scaling, expected))
        assert (support == 10) == (name == "softmax")
        assert f"{name.ljust(9)} 100%" in done.stderr
    # Trained with cross-entropy, the network is too sure of itself, and a temperature helps.
    assert float(rows[1][1].removeprefix("T=")) > 1.3
    assert shown[1][3] < shown[0][3] / 2
    best = min(shown)
    told = " ".join(told.split())
    assert re.match(rf"{best[1]} with[^:]* is best: its Brier score is {best[0]:.4f} ", told)
    assert done.stdout.endswith(f"The page is at {out / 'index.html'}\n")
    assert os.listdir(out) == ["index.html"]

    page = Page(out / "index.html")
    assert_self_contained(page)
    assert "prefers-color-scheme:dark" in page.source
    assert f"Here {best[1]} with" in page.text
    assert page.text.index("The verdict") < page.text.index("The numbers")
    assert f"probs = jsm.{best[1]}(new_scores" in page.text
    sentences = re.findall(r"[A-Z][^.<>{}]{50,}\.", page.source)
    assert len(sentences) > 30
    assert len(sentences) == len(set(sentences))
    for name in NAMES:
        assert name in page.text
        assert sum(f"Reliability diagram of {name}." in alt for alt in page.alts) == 3
        (panel,) = (alt for alt in page.alts if f"one digit under {name}, by" in alt)
        assert re.search(r"At 0: \d 100%\. At 10: \d \d+%, \d \d+%", panel)
    assert sum("Validation accuracy" in alt for alt in page.alts) == 1
    assert sum("Training loss" in alt for alt in page.alts) == 1
    assert sum(alt.startswith("A handwritten") for alt in page.alts) == gallery.SIZE + 2


def test_quiet_run_of_one_mapping_replaces_the_page_and_says_nothing(out, capfd):
    out.mkdir(parents=True)
    (out / "index.html").write_text("old")
    options = ["--mapping", "sparsemax", "--mapping", "sparsemax", "--epochs", "1", "--quiet"]
    assert cli.main([*options, "--out", str(out)]) == 0
    assert capfd.readouterr() == ("", "")
    assert os.listdir(out) == ["index.html"]
    page = Page(out / "index.html")
    assert_self_contained(page)
    assert "sparsemax" in page.text
    assert "softmax " not in page.text.replace("jaxsoftmax", "")
    assert "--mapping sparsemax" in page.text


def test_library_does_without_the_extra():
    code = "import jaxsoftmax, sys; print({'sklearn', 'matplotlib', 'tqdm'} & set(sys.modules))"
    assert python("-c", code).stdout == "set()\n"


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mapping", "softermax"], "'softermax'"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "-3"], "--epochs"),
        (["--epochs", "many"], "'many'"),
        (["--epochs", "1.5"], "--epochs"),
        (["--epochs", "1000000"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "4294967296"], "--seed"),
        (["--out", ""], "--out"),
        (["--colour"], "--colour"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_argument(arguments, told, capsys):
    assert cli.main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    assert told in error


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_folder_that_cannot_be_written(below, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("trained in vain"))
    (tmp_path / "file").write_text("kept")
    assert cli.main(["--out", str(tmp_path / "file" / below)]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(r"jaxsoftmax: cannot write to --out .*: Not a directory\n", error)
    assert (tmp_path / "file").read_text() == "kept"


def test_page_that_is_a_folder(out, capsys):
    (out / "index.html").mkdir(parents=True)
    assert cli.main(["--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "module"),
    [("sklearn", "digits"), ("matplotlib", "figures"), ("tqdm", "comparison")],
)
def test_missing_extra(extra, module, out, capsys, monkeypatch):
    for name in ("digits", "figures", "page", "gallery", "comparison"):
        monkeypatch.delitem(sys.modules, f"jaxsoftmax._demo.{name}", raising=False)
        monkeypatch.delattr(f"jaxsoftmax._demo.{name}", raising=False)
    for name in list(sys.modules):
        if name.partition(".")[0] == extra:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, extra, None)
    assert cli.main(["--out", str(out)]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    assert extra in error
    assert 'pip install "jaxsoftmax[demo]"' in error
    assert not out.parent.exists()


# Ctrl-C


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_interrupted_while_it_computes(stage, out, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "train", lambda *_, **__: None)
    monkeypatch.setattr(comparison, stage, interrupt)
    assert cli.main(["--out", str(out), "--quiet"]) == 130
    assert capsys.readouterr() == ("", "jaxsoftmax: interrupted\n")
    assert not out.parent.exists()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("culprit", ["os.replace", "jaxsoftmax._demo.folder._write"])
def test_interrupted_while_it_writes(culprit, existing, out, monkeypatch):
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: [])
    monkeypatch.setattr(verdict, "rank", lambda _: [])
    monkeypatch.setattr("jaxsoftmax._demo.page.page", lambda *_, **__: "new")
    monkeypatch.setattr("jaxsoftmax._demo.folder.check", lambda _: None)
    monkeypatch.setattr(culprit, interrupt)
    if existing:
        out.mkdir(parents=True)
        (out / "index.html").write_text("old")
    assert cli.main(["--out", str(out), "--quiet"]) == 130
    if existing:
        assert os.listdir(out) == ["index.html"]
        assert (out / "index.html").read_text() == "old"
    else:
        assert not out.parent.exists()


@pytest.fixture
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_signal_waits_until_it_is_let_through():
    reached = []

    def work():
        with interrupts.held() as let_through:
            let_through()
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the signal")
            let_through()
            reached.append("after it was let through")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_handler")
@pytest.mark.parametrize("signals", [1, 2])
def test_signal_is_raised_at_the_end_of_the_block_and_a_second_one_at_once(signals):
    reached = []

    def work():
        with interrupts.held():
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
            reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == (["end"] if signals == 1 else [])


# The parts


def test_splits_share_no_digit_and_are_stratified(data):
    assert sum(split.size for split in data) == 1797
    images = np.concatenate([split.images for split in data]).reshape(1797, -1)
    assert len(np.unique(images, axis=0)) == 1797
    assert images.min() == 0
    assert images.max() == 1
    assert [split.size for split in data] == [150, 600, 1047]
    for split in data:
        assert np.ptp(np.bincount(split.labels)) <= 0.06 * split.size / 10 + 2


def test_seed_decides_the_split(data):
    assert np.array_equal(data.test.labels, digits.load(seed=0).test.labels)
    assert not np.array_equal(data.test.labels, digits.load(seed=1).test.labels)


def test_same_seed_trains_the_same(data):
    loss = MODELS[0].loss
    first, again, other = (
        training.train(loss, data, epochs=1, seed=seed).epochs for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_convolution_agrees_with_lax():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5, 8, 8, 3))
    params = {
        "it/weight": jax.random.normal(keys[1], (3, 3, 3, 7)),
        "it/bias": jax.random.normal(keys[2], (7,)),
    }
    ours = network._convolve(params, "it", x)
    dimensions = ("NHWC", "HWIO", "NHWC")
    wanted = jax.lax.conv_general_dilated(
        x, params["it/weight"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    np.testing.assert_allclose(ours, wanted + params["it/bias"], rtol=1e-4, atol=1e-4)


def test_every_digit_is_seen_at_most_once_an_epoch():
    rows = np.asarray(training._batches(jax.random.key(0), 170)).ravel()
    assert len(rows) == 3 * training.BATCH_SIZE
    assert len(np.unique(rows)) == len(rows)


def test_likelihood_is_infinite_with_a_zero_and_tells_how_many():
    probs = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]])
    finite = evaluation._likelihood(probs, np.array([0, 1, 0]))
    assert finite == pytest.approx((np.log(8) / 3, 0, np.log(8) / 3))
    infinite = evaluation._likelihood(probs, np.array([0, 0, 0]))
    assert infinite == pytest.approx((np.inf, 1, np.log(8) / 2))


def test_table_is_aligned_fits_80_columns_and_explains_infinity():
    probs = np.eye(10)[[3, 3, 4]]
    results = [fake_result(model, probs, [3, 3, 3], temperature=123.456) for model in MODELS]
    lines = table.table(results).splitlines()
    assert max(map(len, lines)) <= 80
    rows = lines[3 : 3 + 3 * len(NAMES)]
    assert len({len(line) for line in (*lines[1:3], *rows)}) == 1
    assert [row.split()[:2] for row in rows] == [
        [name, scaling] for name in NAMES for scaling in ("none", "T=123.456", "vector")
    ]
    assert all(row.split()[3] == "inf" for row in rows)
    assert wording.INFINITY in lines
    assert sum("1 of 3 digits" in line for line in lines) == 3 * len(NAMES)


def test_table_without_infinity_has_no_notes():
    result = fake_result(MODELS[0], np.full((2, 10), 0.1), [0, 1])
    assert wording.INFINITY not in table.table([result])


@pytest.mark.parametrize(
    ("temperature", "before", "after", "words"),
    [
        (0.5, 0.02, 0.01, ["0.500 sharpens", "falls from 2.00% to 1.00%"]),
        (2.0, 0.02, 0.01, ["2.000 softens", "falls from 2.00% to 1.00%"]),
        (2.0, 0.01, 0.02, ["2.000 softens", "rises from 1.00% to 2.00%"]),
        (1.001, 0.01, 0.01, ["changes nothing", "stays at 1.00%"]),
    ],
)
def test_effect_of_scaling_follows_the_numbers(temperature, before, after, words):
    result = fake_result(MODELS[0], np.full((2, 10), 0.1), [0, 1], temperature)
    result = result._replace(
        before=result.before._replace(calibration_error=before),
        after=result.after._replace(calibration_error=after),
        vector=result.vector._replace(calibration_error=0.03),
    )
    effect = wording.scaling_effect(result)
    assert all(word in effect for word in [*words, "vector scaling, it is 3.00%"])


# The verdict


def with_squares(result, **squares):
    """A result whose judgements have these Brier scores, digit by digit."""
    return result._replace(
        **{
            name: getattr(result, name)._replace(squares=np.asarray(values))
            for name, values in squares.items()
        }
    )


@pytest.fixture(scope="module")
def ranking():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 1, 2000)  # what all find hard: it must not widen the differences
    result = fake_result(MODELS[0], np.full((2, 10), 0.1), [0, 1])
    result = with_squares(
        result,
        before=hard + 0.1 + rng.normal(0, 0.1, 2000),
        after=hard,
        vector=hard + rng.normal(0.001, 0.1, 2000),
    )
    return verdict.rank([result])


def test_ranking_is_by_the_mean_with_intervals_of_paired_differences(ranking):
    assert [candidate.scaling for candidate in ranking] == ["temperature", "vector", "none"]
    best, close, far = ranking
    assert best.excess == (0, 0, 0)
    assert (best.may_be_as_good, close.may_be_as_good, far.may_be_as_good) == (True, True, False)
    for candidate in ranking:
        squares, differences = (
            candidate.judgement.squares,
            candidate.judgement.squares - best.judgement.squares,
        )
        for estimate, values in ((candidate.brier, squares), (candidate.excess, differences)):
            assert estimate.mean == pytest.approx(values.mean())
            # What the normal approximation says of the mean of so many.
            half = 1.96 * values.std() / np.sqrt(len(values))
            np.testing.assert_allclose(estimate.low, values.mean() - half, atol=0.1 * half + 1e-12)
            np.testing.assert_allclose(estimate.high, values.mean() + half, atol=0.1 * half + 1e-12)


def test_verdict_names_the_best_and_those_that_may_be_as_good(ranking):
    first, second = wording.verdict(ranking)
    score = f"{ranking[0].brier.mean:.4f}"
    assert f"softmax with a temperature of 1.000 is best: its Brier score is {score}" in first
    assert second.startswith("By chance alone, softmax with vector scaling could be as good.")
    assert second.endswith("The other one is worse by more than chance explains.")
    assert "All others are worse" in wording.verdict([ranking[0], ranking[2]])[1]
    assert "other" not in wording.verdict(ranking[:2])[1]


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
@pytest.mark.parametrize("scaling", ["none", "temperature", "vector"])
def test_code_on_the_page_gives_what_the_page_shows(model, scaling, data):
    params = network.init(jax.random.key(0))
    score = lambda split: network.apply(params, split.images)  # noqa: E731
    result = evaluation.evaluate(model, training.Trained(params, []), data)
    (candidate,) = (each for each in verdict.rank([result]) if each.scaling == scaling)
    code = usage.code(candidate)
    assert f"{result.temperature:.3f}" in code
    names = {
        "scores": score(data.train),
        "labels": data.train.labels,
        "held_out_scores": score(data.validation),
        "held_out_labels": data.validation.labels,
        "new_scores": score(data.test),
    }
    exec(code, names)
    np.testing.assert_allclose(names["probs"], candidate.judgement.probs, atol=1e-5)
    wanted = jnp.mean(model.loss(names["scores"], names["labels"]))
    np.testing.assert_allclose(names["loss"], wanted, rtol=1e-6)


def test_pictures_have_no_colour_that_the_page_cannot_darken():
    result = fake_result(MODELS[1], np.full((20, 10), 0.1), np.arange(20) % 10)
    for picture in (
        figures.reliability_diagram(result.before.curve, MODELS[1].colour),
        figures.temperature_panel(result, 0, np.linspace(0, 10, 5, dtype=np.float32)),
        figures.accuracy_curves([result]),
    ):
        head, _, body = picture.decode().partition("</style>")
        assert "--orange:#d55e00" in head
        assert "prefers-color-scheme:dark" in head
        assert re.findall(r"#[0-9a-f]{6}\b", body) == []
        assert "var(--orange)" in body


# What is shown


def test_panel_goes_from_one_class_to_many():
    temperatures = np.array([0.0, 1.0, 10.0], np.float32)
    rows = np.array([[0.5, 0.3, 0.2, 0, 0], [0.4, 0.39, 0.21, 0, 0]])
    results = [fake_result(model, rows, [0, 1]) for model in MODELS]
    assert gallery.most_ambiguous(results) == 1
    for result in results:
        probs = figures.panel_probabilities(result, 0, temperatures)
        np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
        np.testing.assert_array_equal(probs[0], np.eye(5)[0])
        assert np.all(np.diff(probs[:, 0]) < 0)
        picture = figures.temperature_panel(result, 0, temperatures)
        assert picture.startswith(b"<?xml")


def test_gallery_shows_the_hardest_digits_and_marks_zeros(data):
    labels = np.asarray(data.test.labels)
    probs = np.eye(10)[labels]
    hard = [7, 70]
    probs[hard] = 0.75 * np.eye(10)[(labels[hard] + 1) % 10] + 0.25 * probs[hard]
    result = fake_result(MODELS[0], probs, labels)
    cards = gallery.gallery([result], data.test).split("</article>")[:-1]
    assert len(cards) == gallery.SIZE
    for card, row in zip(cards, hard, strict=False):
        assert f"This is a {labels[row]}<" in card
        assert f"{(labels[row] + 1) % 10} at 75% ✗" in card
        assert card.count('class="none"') == 8
        assert "height:25.0%" in card
    assert all("misread" in card for card in cards[:2])
    assert all("read correctly" in card for card in cards[2:])


def test_percentages_do_not_round_to_certainty():
    assert [gallery._percent(p) for p in (0.0, 0.001, 0.499, 0.999, 1.0)] == [
        "0%",
        "under 1%",
        "50%",
        "over 99%",
        "100%",
    ]
