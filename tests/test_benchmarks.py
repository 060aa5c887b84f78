"""The harness of the benchmarks: what is related to what, and that a loss cannot be overlooked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as jsm
from benchmarks import (
    accelerators,
    bundles,
    charts,
    instructions,
    kernels_on_device,
    measuring,
    on_device,
    passes,
    tables,
)
from benchmarks.accelerators import Program
from benchmarks.measuring import Comparison, Entry, Missing, Result, Spread, relate


@pytest.fixture
def taking(monkeypatch):
    """Makes functions that take so many seconds, of a clock that only they turn."""
    now = [0.0]

    def entry(seconds, **options):
        def take(x):
            now[0] += seconds
            return x

        return Entry(take, jit=False, **options)

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    return entry


def arguments():
    return (np.ones(3),)


def test_every_function_has_its_row_in_order(taking):
    entries = {"theirs": taking(0.5, ours="ours"), "gone": Missing("why"), "ours": taking(0.25)}
    theirs, gone, ours = Comparison("take", "", 1, entries, arguments).measure(quick=True)
    assert [theirs.name, gone.name, ours.name] == ["theirs", "gone", "ours"]
    assert gone.quantities == {"result": "why"}
    assert theirs.quantities["time"] == Spread(0.5, 0.5, 0.5)
    assert theirs.quantities["ours_time"] == ours.quantities["relative"] == Spread(0.5, 0.5, 0.5)
    assert len(ours.quantities["samples"]) == 1


def test_slow_functions_take_part_in_fewer_rounds(taking):
    entries = {"fast": taking(2**-7), "slow": taking(2.0)}
    comparison = Comparison("take", "", 1, entries, arguments, seconds=2**-2)
    fast, slow = (len(r.quantities["samples"]) for r in comparison.measure(quick=False))
    assert (fast, slow) == (16, 3)


def test_functions_that_are_measured_apart_are_told_as_one(taking):
    entries = {"first": taking(1.0), "one": taking(2.0), "two": taking(4.0)}
    pairs = [
        Comparison("take", "", 1, {"first": entries["first"], name: entries[name]}, arguments)
        for name in ("one", "two")
    ]
    results = measuring.Apart("take", "", pairs).measure(quick=True)
    assert [r.name for r in results] == ["first", "one", "two"]
    assert [r.quantities["relative"].median for r in results] == [1, 2, 4]


def test_the_limit_counts_as_often_as_its_work_fits(taking):
    entries = {"ours": taking(1.0), "limit": taking(0.125, times=2.0, is_limit=True)}
    ours, limit = Comparison("take", "", 1, entries, arguments).measure(quick=True)
    assert ours.quantities["share"] == limit.quantities["time"].median == 0.25


def test_a_call_lasts_until_its_result_or_only_until_it_returns(taking, monkeypatch):
    entry = taking(0.25)

    def wait(x):
        return entry.function(x)

    monkeypatch.setattr(measuring.jax, "block_until_ready", wait)
    for waits, seconds in ((True, 0.5), (False, 0.25)):
        comparison = Comparison("take", "", 1, {"a": entry}, arguments, waits=waits)
        (result,) = comparison.measure(quick=True)
        assert result.quantities["time"].median == seconds


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
    # A round in which the peer did not take part counts for nothing.
    relate(peer, {"samples": np.array([3.0, 20.0, 2.0, 1000.0])})
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
    assert ("ours compared with theirs, time" in tables.losses(results)) == loses
    assert ("Nowhere" in tables.losses(results)) != loses


@pytest.mark.parametrize(
    ("seconds", "cell"),
    [(2.5, "2.50 s"), (0.01234, "12.3 ms"), (9.99e-5, "99.9 µs"), (1e-9, "0.00 µs")],
)
def test_times_have_their_unit(seconds, cell):
    quantities = {"compile": seconds}
    assert f"| {cell} |" in tables.table([Result("run", "", 1, "f", quantities=quantities)])


@pytest.mark.parametrize(
    ("names", "ending"),
    [
        (["trace, forward", "trace, lower, forward"], ", forward"),
        (["forward", "trace, forward"], ""),
        (["call, forward", "call, value and vjp"], ""),
    ],
)
def test_legends_leave_out_what_all_share(names, ending):
    assert charts.shared_ending(names) == ending


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


@pytest.mark.parametrize(
    ("actual", "wanted", "error"),
    [
        (np.float32([1, 2.5]), np.array([1, 2]), 0.25),
        ((np.zeros(2), np.ones(2)), (np.zeros(2), np.full(2, 4.0)), 0.75),
        (np.array([np.nan, -np.inf]), np.array([np.nan, -np.inf]), 0),
        (np.array([np.nan, 1]), np.array([0, 1]), np.inf),
        (np.ones(2), np.ones(3), np.inf),
        (np.array(1e-9), np.array(0), 1e-3),  # as good as nothing
    ],
)
def test_errors_on_a_device(actual, wanted, error):
    assert on_device.error(actual, wanted) == pytest.approx(error)


def test_what_does_not_work_on_a_device_is_a_line():
    def broken(x):
        raise ValueError("not | here")

    entries = {"first": Entry(jnp.negative), "broken": Entry(broken, "first")}
    program = Program("negate", entries, (jnp.ones(3, jnp.float32),))
    first, line = on_device.measured(program, quick=True, deadline=np.inf)
    assert line.quantities == {"result": "not measured: ValueError: not / here"}
    assert first.quantities["time"].median > 0
    late = on_device.measured(program, quick=True, deadline=0)
    assert all("no time was left" in result.quantities["result"] for result in late)


def test_kernels_on_a_device_are_right_or_named(monkeypatch):
    """On a processor they are interpreted by no one: XLA computes what they would."""
    (text,) = kernels_on_device.kernels(quick=False, deadline=np.inf)
    assert "There are none for the platform cpu." in text
    cases = [("rows, softmax", functools.partial(kernels_on_device._rows, "softmax"))]
    monkeypatch.setattr(kernels_on_device, "_cases", lambda platform: cases)
    (text,) = kernels_on_device.kernels(quick=True, deadline=np.inf)
    assert "All of them are right." in text
    monkeypatch.setitem(kernels_on_device.TOLERANCES, "bfloat16", 1e-9)
    (text,) = kernels_on_device.kernels(quick=True, deadline=np.inf)
    assert "Not right: rows, softmax." in text
    (text,) = kernels_on_device.kernels(quick=True, deadline=0)
    assert "not reached" in text


def test_mappings_by_kernels_are_measured_where_there_are_some(monkeypatch):
    program = accelerators.mapped("value and vjp", (8, 64), "float32")
    assert on_device.row_kernels(program) == {}
    monkeypatch.setattr(on_device.jax, "default_backend", lambda: "tpu")
    found = on_device.row_kernels(program)
    names = {"softmax", "log_softmax", "sparsemax", "entmax15", "entmax(1.3)"}
    assert set(found) == {f"jsm.{name}, kernels" for name in names}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), np.float32)
    p, back = found["jsm.sparsemax, kernels"].function(x, x)
    wanted, pull_back = jax.vjp(jsm.sparsemax, x)
    np.testing.assert_allclose(p, wanted)
    np.testing.assert_allclose(back, pull_back(x)[0])


def test_bundles_of_a_kernel_are_those_of_its_loops():
    """A grid with one loop over tiles, which jumps back from address 6 to 3; and a search."""
    text = """
       0   : > { %p0 = start }  /* Start region 1 */
     0x1 LB: > { %p1 = nop }  /* Start region 2 */
     0x3 LB: >> { %p2 = nop }  /* Start region 3 */
     0x6   : >> { %p3 = sbr target = $region3 }
     0x8   : > { %p4 = sbr target = $region2 }
    """
    assert bundles.loops(text) == [8, 4]
    assert bundles.of_a_row([8, 4], tiles=3) == 8 + 2 * 4
    few, passes = bundles.STEPS_OF_FEW, bundles.PASSES
    search = 100 - (10 + 20 + 30 + 40) + 3 * 10 + few * 20 + passes * (30 - 5 + 3 * 5) + 3 * 40
    assert bundles.of_a_row([100, 10, 20, 30, 5, 40], tiles=3) == search


def test_instructions_of_a_kernel_are_those_of_its_loops():
    """A loop from address 10 to 60, out of which a wait jumps to behind the end and back again."""
    text = """
_kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
.L_x_0:
   -:-:-:Y:01        /*0010*/              @!P1 BRA `(.L_x_2)
.L_x_1:
   2:-:-:Y:05        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24
   -:-:-:Y:01        /*0030*/               @P0 FMNMX R2, R2, R3, !PT
   -:-:-:Y:01        /*0040*/              @UP1 MUFU.EX2 R2, R2
   -:-:-:Y:01        /*0050*/                   LDS.128 R4, [R2]
   -:-:-:Y:05        /*0060*/               @P1 BRA `(.L_x_0)
   1:-:-:Y:05        /*0070*/                   EXIT
.L_x_2:
   2:-:-:Y:05        /*0080*/              @!P1 BRA `(.L_x_2)
   -:-:-:Y:05        /*0090*/                   BRA `(.L_x_1)
"""
    whole, (loop,) = instructions.loops(text)
    flops = 2 * 64 * 128 * 16
    assert loop == instructions.Work(6, special=1, slow=1, shared=1, flops=flops)
    assert whole == loop._replace(instructions=8)
    low, high = loop.cycles()
    product = flops / (989e12 / 132) * 1.98e9
    assert low == pytest.approx(product)
    assert high == pytest.approx(4 + 2 + 8 + product)
    # Registers, or shared memory, let five blocks of 128 threads, or three, on a core at once.
    kernel = instructions.Kernel(whole, [loop], registers=90, spilled=0, threads=128, shared=0)
    assert [dataclasses.replace(kernel, shared=x).at_once for x in (0, 64000)] == [5, 3]
    # The first of the 32.5 tiles that queries see on average is in the whole.
    low, _ = instructions.Work(*(x + 31.5 * y for x, y in zip(whole, loop, strict=True))).cycles()
    assert instructions.estimate(kernel, 1)[0] == pytest.approx(4 * 8 * 64 * low / 132 / 1.98e9)


def test_passes_of_a_search_are_counted():
    """One score that has it all is where a search starts; equal scores are one step from there."""
    one, equal = np.array([[9.0, 0, 0, 0]]), np.zeros((1, 4))
    assert [passes.passes(jsm.sparsemax, scores, starts=True) for scores in (one, equal)] == [1, 2]
    assert passes.passes(jsm.softmax, equal, starts=True) == 0
