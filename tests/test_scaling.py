"""What crosses devices, counted in compiled programs."""

import dataclasses

import pytest

from benchmarks import scaling
from benchmarks.collectives import collectives

CASES = {case.name: case for case in scaling.CASES}


def test_guide_has_what_is_counted_and_formulas_agree():
    guide = scaling.GUIDE.read_text(encoding="utf-8")
    assert scaling.written(guide) == guide


def test_a_wrong_formula_is_found(monkeypatch):
    wrong = dataclasses.replace(CASES["`softmax`"], numbers=lambda n: 13)
    monkeypatch.setattr(scaling, "CASES", [wrong])
    with pytest.raises(ValueError, match=r"`softmax` on 2 devices has 12 numbers and 0 a pass, by"):
        scaling.counts()


def test_operations_are_fused():
    rows = 6
    for name, wanted in {
        "`softmax`": [(rows,)] * 2,
        "`linear_cross_entropy`, both gradients": [(rows,), (rows,) * 3, (rows * 16,)],
    }.items():
        found = collectives(CASES[name].compiled(8))
        assert sorted(c.sizes for c in found) == sorted(wanted)
        assert all(c.kind == "all-reduce" for c in found)
    for name, sums in {"`sparsemax`": 2, "`entmax15`": 2, "`entmax`": 3}.items():
        found = collectives(CASES[name].compiled(8))
        assert [c.sizes for c in found if c.passes is None] == [(rows,) * sums]
