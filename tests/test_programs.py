"""How the texts of compiled programs are read: counted by hand, and by algebra."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import ahead, bundles, hlo, kernels
from benchmarks.ahead import TARGETS
from benchmarks.collectives import collectives
from benchmarks.hlo import Array


def program(body, *others):
    """A program of some lines, and other computations."""
    lines = "\n".join(f"  {line}" for line in body)
    return "\n".join(["HloModule m", *others, "ENTRY %main (x: f32[8]) -> f32[8] {", lines, "}"])


def computation(name, *body):
    return "\n".join([f"%{name} (x: f32[8]) -> f32[8] {{", *(f"  {line}" for line in body), "}"])


def read(body, *others, passes=7):
    found = kernels.read(program(body, *others), passes)
    return {kernel.name: kernel for kernel in found.kernels}


X = "%x = f32[64,128]{1,0} parameter(0)"
ROW = "%i = s32[] parameter(1)"


@pytest.mark.parametrize(
    ("dtype", "sizes", "layout", "wanted"),
    [
        ("f32", (3, 5), "1,0", 60),
        ("bf16", (), "", 2),
        ("pred", (9,), "0", 9),
        ("s4", (8,), "0", 4),
        # Tiles of a TPU are filled up, along the axes as they lie in memory.
        ("f32", (9, 130), "1,0:T(8,128)", 16 * 256 * 4),
        ("f32", (9, 130), "0,1:T(8,128)", 136 * 128 * 4),
        ("bf16", (4, 9, 64), "2,1,0:T(8,128)(2,1)", 4 * 16 * 128 * 2),
        ("f32", (9, 130), "1,0:T(8,128)S(1)", 0),  # not in the main memory
    ],
)
def test_bytes_of_an_array(dtype, sizes, layout, wanted):
    assert Array(dtype, sizes, layout).bytes == wanted


def test_a_fusion_reads_what_it_needs_and_writes_what_changes():
    sliced = computation(
        "sliced",
        X,
        ROW,
        "%double = f32[64,128]{1,0} add(%x, %x)",
        "%zero = s32[] constant(0)",
        "ROOT %row = f32[1,128]{1,0} dynamic-slice(%double, %i, %zero)",
    )
    updated = computation(
        "updated",
        X,
        ROW,
        "%new = f32[1,128]{1,0} parameter(2)",
        "%zero = s32[] constant(0)",
        "ROOT %all = f32[64,128]{1,0} dynamic-update-slice(%x, %new, %i, %zero)",
    )
    body = [
        X,
        ROW,
        "%row = f32[1,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced",
        "ROOT %out = f32[64,128]{1,0} fusion(%x, %i, %row), kind=kLoop, calls=%updated",
    ]
    found = read(body, sliced, updated)
    # A row twice over, as both factors are it, and its number; and a row written.
    assert found["row"].bytes == 2 * 512 + 4 + 512
    assert found["out"].bytes == 512 + 4 + 512


LOOP = computation(
    "body",
    "%state = (s32[], f32[64,128]{1,0}) parameter(0)",
    "%i = s32[] get-tuple-element(%state), index=0",
    "%x = f32[64,128]{1,0} get-tuple-element(%state), index=1",
    "%two = s32[] constant(2)",
    "%next = s32[] add(%i, %two)",
    "%negative = f32[64,128]{1,0} negate(%x)",
    "ROOT %result = (s32[], f32[64,128]{1,0}) tuple(%next, %negative)",
)
CONDITION = computation(
    "condition",
    "%state = (s32[], f32[64,128]{1,0}) parameter(0)",
    "%i = s32[] get-tuple-element(%state), index=0",
    "%limit = s32[] constant(11)",
    "ROOT %go = pred[] compare(%i, %limit), direction=LT",
)


def looping(start, attributes=""):
    return [
        X,
        start,
        "%begin = (s32[], f32[64,128]{1,0}) tuple(%start, %x)",
        "%loop = (s32[], f32[64,128]{1,0}) while(%begin), condition=%condition, body=%body"
        + attributes,
        "ROOT %out = f32[64,128]{1,0} get-tuple-element(%loop), index=1",
    ]


@pytest.mark.parametrize(
    ("start", "attributes", "trips", "waits"),
    [
        ("%start = s32[] constant(1)", "", 5, 0),  # 1, 3, 5, 7, 9
        ("%start = s32[] parameter(1)", "", 7, 8),  # unknown; the condition is looked at once more
        ("%start = s32[] parameter(1)", ', backend_config={"known_trip_count":{"n":"3"}}', 3, 0),
    ],
)
def test_loops(start, attributes, trips, waits):
    found = kernels.read(program(looping(start, attributes), LOOP, CONDITION), passes=7)
    times = {kernel.name: kernel.times for kernel in found.kernels}
    assert times == {"next": trips, "negative": trips, "go": trips + 1}
    assert found.waits == waits


def test_a_counter_that_does_more_than_count_is_not_known():
    """As that of a solver, which jumps to the end when it is done."""
    jumping = LOOP.replace("add(%i, %two)", "maximum(%i, %two)")
    found = kernels.read(
        program(looping("%start = s32[] constant(1)"), jumping, CONDITION), passes=7
    )
    assert found.waits == 8


def test_of_two_branches_the_dearer_one_counts():
    cheap = computation("cheap", X, "ROOT %same = f32[64,128]{1,0} bitcast(%x)")
    dear = computation("dear", X, "ROOT %other = f32[64,128]{1,0} negate(%x)")
    choice = (
        "ROOT %out = f32[64,128]{1,0} conditional(%i, %x, %x), branch_computations={%cheap, %dear}"
    )
    found = kernels.read(program([X, ROW, choice], cheap, dear), passes=7)
    assert [kernel.name for kernel in found.kernels] == ["other"]
    assert found.waits == 1


BY_PRECISION = {
    "": "f32",
    ", operand_precision={highest,highest}": "f32 exact",
}


@pytest.mark.parametrize(("attribute", "kind"), BY_PRECISION.items())
def test_matrix_products(attribute, kind):
    body = [
        "%x = f32[5,7,3]{2,1,0} parameter(0)",
        "%y = bf16[5,3,11]{2,1,0} parameter(1)",
        "ROOT %out = f32[5,7,11]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, rhs_batch_dims={0}, "
        "lhs_contracting_dims={2}, rhs_contracting_dims={1}" + attribute,
    ]
    assert read(body)["out"].flops == {kind: 2 * 5 * 7 * 3 * 11}


def test_a_batch_of_products_as_a_convolution():
    """As XLA for TPUs writes it: 4 x 8 products of (16, 64) and (64, 32)."""
    body = [
        "%x = bf16[4,8,16,64]{3,2,1,0} parameter(0)",
        "%y = bf16[4,8,32,64]{3,2,1,0} parameter(1)",
        "ROOT %out = f32[4,8,16,32]{3,2,1,0} convolution(%x, %y), "
        "window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=01bf_01oi->01bf",
    ]
    assert read(body)["out"].flops == {"bf16": 2 * 4 * 8 * 16 * 64 * 32}


def test_a_window_meets_only_what_is_there():
    """An ordinary convolution: 5 numbers, 3 in a window, filled up by one at each end."""
    body = [
        "%x = f32[1,5,1]{2,1,0} parameter(0)",
        "%y = f32[3,1,1]{2,1,0} parameter(1)",
        "ROOT %out = f32[1,5,1]{2,1,0} convolution(%x, %y), "
        "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
    ]
    assert read(body)["out"].flops == {"f32": 2 * (5 * 3 - 2)}


def test_copies_run_beside_kernels():
    body = [
        "%x = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) "
        "copy-start(%x)",
        "%near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)",
        "ROOT %out = f32[8,128]{1,0:T(8,128)} negate(%near), "
        'backend_config={"estimated_cycles":"1500"}',
    ]
    found = read(body)
    assert found["start"].is_copy
    assert (found["start"].bytes, found["out"].bytes) == (4096, 4096)
    # 1,500 cycles of 1.5 GHz, while 8 kB are moved.
    assert ahead.estimate(list(found.values()), TARGETS["v5e"]) == 1e-6


def test_the_greatest_of_bytes_and_products_counts():
    target = TARGETS["h100"]
    of_bytes = kernels.Kernel("a", "fusion", 3, target.bandwidth, {"bf16": 1.0})
    of_products = kernels.Kernel("b", "fusion", 1, 1.0, {"f32": 2 * target.peaks["f32"]})
    assert ahead.estimate([of_bytes, of_products], target) == pytest.approx(3 + 2)


def test_what_runs_while_devices_send():
    product = (
        "%product = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    )
    start = (
        "%start = (f32[64,128]{1,0}, f32[64,128]{1,0}) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,0}}"
    )
    done = "ROOT %done = f32[64,128]{1,0} collective-permute-done(%start)"
    for body, meanwhile in (
        ([X, start, product, done], 2 * 64 * 128 * 64),
        ([X, product, start, done], 0),
    ):
        (found,) = collectives(program(body))
        assert (found.kind, found.sizes) == ("collective-permute", (64 * 128,))
        assert (found.meanwhile, found.in_loop, found.passes) == (meanwhile, False, 1)


def test_text_of_this_jax_is_read():
    """A loop of known length with a product in it, as compiled here."""

    def fun(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y @ x), x)

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    module = hlo.parse(jax.jit(fun).lower(x).compile().as_text())
    loops = [
        module.trips(computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]
    assert loops == [5]


def test_loops_of_a_kernel_are_counted_in_bundles():
    text = """
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %s1 = sphi 0, %s9 /* copy */ } /* Start region 4 :: Start region 5 */
   0x2   : > { %s2 = sadd.s32 1, %s1 }
   0x3 LB: >> { %v0 = vld [vmem:%s2] } /* Start region 7 */
   0x4   : >> { %v1 = vadd.f32 %v0, %v0  ;;  %8 = sbr.rel (!%p1) target = $region7 }
  0x10   : > { %9 = sbr.rel (!%p0) target = $region4 } /* End region 5 */
  0x11   :  { %10 = sbr.rel target = $region99 }
"""
    assert bundles.loops(text) == [16, 2]
