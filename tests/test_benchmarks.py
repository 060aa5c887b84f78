"""The harness of the benchmarks: what is related to what, and that a loss cannot be overlooked."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import charts, tables
from benchmarks.measuring import Comparison, Entry, Missing, Result, Spread, relate


def waiting(seconds):
    def wait(x):
        time.sleep(seconds)
        return x

    return Entry(wait, jit=False)


def test_every_function_has_its_row_in_order():
    comparison = Comparison(
        "sleep",
        "short",
        1,
        {"first": waiting(1e-4), "gone": Missing("why"), "ours": waiting(1e-4)},
        lambda: (jnp.ones(3),),
    )
    first, gone, ours = comparison.measure(quick=True)
    assert [first.name, gone.name, ours.name] == ["first", "gone", "ours"]
    assert gone.quantities == {"result": "why"}
    assert first.quantities["relative"] == (1, 1, 1)
    # Nothing sleeps for less than it is told to.
    assert ours.quantities["time"].median >= 1e-4
    assert len(ours.quantities["samples"]) == 1


def test_compiled_functions_tell_their_memory_and_are_not_run_if_not_asked():
    def sorted_twice(x):
        return jnp.sort(x) + jnp.sort(-x)

    entries = {"a": Entry(sorted_twice, "b"), "b": Entry(lambda x: x)}
    (a, b) = Comparison(
        "sort", "", 1, entries, lambda: (jnp.ones(2**18, jnp.float32),), compile_only=True
    ).measure(quick=False)
    # A sorted array has to be held; a few bytes count as 64 kB.
    assert a.quantities["memory"] >= 2**20 > 2**16 > b.quantities["memory"]
    assert a.quantities["ours_memory"] == 2**16 / a.quantities["memory"]
    assert "time" not in a.quantities


def test_a_ratio_is_formed_within_each_round():
    peer = {"samples": np.array([1.0, 10.0, 2.0])}
    relate(peer, {"samples": np.array([3.0, 20.0, 2.0])})
    assert peer["ours_time"] == Spread.of(np.array([3.0, 2.0, 1.0]))
    assert peer["ours_time"].median == 2


@pytest.mark.parametrize(
    ("ratio", "cell", "loses"),
    [(1.004, "1.00 (0.90–1.30)", False), (1.006, "**1.01** (0.90–1.30)", True)],
)
def test_what_loses_is_bold_and_listed(ratio, cell, loses):
    quantities = {"ours_time": Spread(0.9, ratio, 1.3)}
    results = [Result("run", "far", 1, "theirs", "ours", quantities=quantities)]
    assert f"| {cell} |" in tables.table(results)
    assert ("ours against theirs, time" in tables.losses(results)) == loses
    assert ("Nowhere" in tables.losses(results)) != loses


@pytest.mark.parametrize(
    ("seconds", "cell"),
    [(2.5, "2.50 s"), (0.01234, "12.3 ms"), (9.99e-5, "99.9 µs"), (1e-9, "0.00 µs")],
)
def test_times_have_their_unit(seconds, cell):
    quantities = {"compile": seconds}
    assert f"| {cell} |" in tables.table([Result("run", "", 1, "f", quantities=quantities)])


def test_charts_show_what_was_found(tmp_path):
    results = [
        Result("run", str(x), x, name, ours, quantities={"time": Spread(t, t, t), "ours_time": 0.5})
        for x in (1, 10)
        for name, ours, t in (("theirs", "ours", 2.0 * x), ("ours", "", 1.0 * x))
    ]
    panels = (
        charts.Growth("growth", "run", "time", "x", "ms"),
        charts.Ratios("ratios", "{name}, {size}", "{quantity}", ("ours_time",), "relative"),
    )
    charts.save(tmp_path / "chart.png", panels, results)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
