"""The mappings and losses that the tests run over. A new one adds a row here and gets them all."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import jaxsoftmax as jsm


def project_by_sorting(z):
    """The nearest point of the simplex: Held, Wolfe & Crowder's algorithm, row by row."""
    z = z - z.max(-1, keepdims=True)
    descending = np.sort(z, -1)[..., ::-1]
    sums = np.cumsum(descending, -1)
    ranks = np.arange(1, z.shape[-1] + 1)
    size = np.sum(1 + ranks * descending > sums, -1, keepdims=True)
    tau = (np.take_along_axis(sums, size - 1, -1) - 1) / size
    return np.maximum(z - tau, 0)


def threshold_by_halving(low, high, total, wanted=1.0):
    """Where a falling `total` of rows reaches what is wanted, between `low` and `high`."""
    for _ in range(200):
        middle = (low + high) / 2
        enough = total(middle) >= wanted
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    return low


def row_sum(p):
    return np.sum(p, -1, keepdims=True)


def entmax_by_bisection(z, alpha):
    """Alpha-entmax, `alpha > 1`, by halving the interval that holds the threshold."""
    z = (alpha - 1) * (z - z.max(-1, keepdims=True))

    def unnormalized(tau):
        return np.maximum(z - tau, 0) ** (1 / (alpha - 1))

    top = np.zeros_like(z[..., :1])
    p = unnormalized(threshold_by_halving(top - 1, top, lambda tau: row_sum(unnormalized(tau))))
    return p / row_sum(p)


def normmax_by_bisection(z, alpha):
    """Normmax, by halving the interval that holds the threshold of the dual norm."""
    q = alpha / (alpha - 1)
    z = z - z.max(-1, keepdims=True)
    top = np.zeros_like(z[..., :1])
    tau = threshold_by_halving(top - 1, top, lambda tau: row_sum(np.maximum(z - tau, 0) ** q))
    weights = np.maximum(z - tau, 0) ** (q - 1)
    return weights / row_sum(weights)


def spend_by_halving(z, budget):
    """Budget-sparsemax; beyond the number of entries, a budget buys all of them."""

    def spent(tau):
        return np.clip(z - tau, 0, 1)

    low, high = z.min(-1, keepdims=True) - 1, z.max(-1, keepdims=True)
    budget = np.minimum(budget, z.shape[-1])
    return spent(threshold_by_halving(low, high, lambda tau: row_sum(spent(tau)), budget))


def pick_softly(z):
    """Softpick by its formula."""
    weights = np.expm1(z)
    total = np.abs(weights).sum(-1, keepdims=True)
    return np.maximum(weights, 0) / np.where(total == 0, 1, total)


def break_from_the_end(z):
    """Stick-breaking, entry by entry, the last one first."""
    p, left = np.zeros_like(z), np.ones(z.shape[:-1])
    for i in reversed(range(z.shape[-1])):
        p[..., i] = left * scipy.special.expit(z[..., i])
        left = left * scipy.special.expit(-z[..., i])
    return p


def share_the_top(z):
    """Hardmax: the largest score gets all, ties share."""
    top = z == z.max(-1, keepdims=True)
    return top / top.sum(-1, keepdims=True)


def fixed(fun, **parameters):
    """`fun` with some parameters fixed, and without them in its signature."""

    def mapping(x, axis=-1, where=None, **options):
        # JAX (0.10 to 0.12) takes with x64 what it made of the same array without.
        fresh = {name: copy.copy(value) for name, value in parameters.items()}
        return fun(x, axis=axis, where=where, **fresh, **options)

    signature = inspect.signature(fun)
    left = [p for name, p in signature.parameters.items() if name not in parameters]
    mapping.__signature__ = signature.replace(parameters=left)
    return mapping


# A form that the package does not have, as someone else would write it: entmax at alpha = 4/3.
entmax43 = jsm.threshold_mapping(
    jsm.Form(lambda u: jnp.maximum(u / 3, 0) ** 3, lambda p: 3 * p ** (1 / 3)), name="entmax43"
)


# Two rows whose supports, under each sparse mapping here, stay the same nearby. So do their maxima.
SCORES = np.array([[1.0, 0.6, -0.9, 0.1], [0.2, -2.0, 1.4, 1.1]])


@dataclasses.dataclass(frozen=True)
class Mapping:
    """What the tests have to know of a mapping, or of logsumexp, which takes the same arguments.

    Attributes:
      name: its public name.
      fun: the function.
      reference: the same along the last axis, in NumPy, by another method.
      gives: what it returns.
      sparse: whether probabilities can be exactly 0 for finite scores.
      smooth: where it has derivatives of all orders: "everywhere", or "inside" the regions of
        scores in which the support stays the same; "nowhere" has derivative 0 wherever it has one.
      simplex: whether rows sum to 1, whatever the scores, and temperature 0 makes it hardmax.
      shifts: whether only the differences of scores matter.
      in_order: whether the order of entries matters; if so, they lie along one axis.
    """

    name: str
    fun: Callable
    reference: Callable
    gives: Literal["probabilities", "logarithms", "row value"] = "probabilities"
    sparse: bool = False
    smooth: Literal["everywhere", "inside", "nowhere"] = "everywhere"
    simplex: bool = True
    shifts: bool = True
    in_order: bool = False

    def takes(self, option):
        """Whether it has an argument of that name."""
        return option in inspect.signature(self.fun).parameters

    def probabilities(self, *args, **kwargs):
        """The probabilities, also of a mapping that gives logarithms."""
        out = self.fun(*args, **kwargs)
        return np.exp(out) if self.gives == "logarithms" else np.asarray(out)


MAPPINGS = [
    Mapping("softmax", jsm.softmax, lambda z: scipy.special.softmax(z, -1)),
    Mapping(
        "log_softmax",
        jsm.log_softmax,
        lambda z: scipy.special.log_softmax(z, -1),
        gives="logarithms",
    ),
    Mapping("sparsemax", jsm.sparsemax, project_by_sorting, sparse=True, smooth="inside"),
    Mapping(
        "entmax15",
        jsm.entmax15,
        lambda z: entmax_by_bisection(z, 1.5),
        sparse=True,
        smooth="inside",
    ),
    Mapping(
        "entmax",
        fixed(jsm.entmax, alpha=1.3),
        lambda z: entmax_by_bisection(z, 1.3),
        sparse=True,
        smooth="inside",
    ),
    Mapping(
        "entmax43",
        entmax43,
        lambda z: entmax_by_bisection(z, 4 / 3),
        sparse=True,
        smooth="inside",
    ),
    Mapping(
        "normmax",
        fixed(jsm.normmax, alpha=1.5),
        lambda z: normmax_by_bisection(z, 1.5),
        sparse=True,
        smooth="inside",
    ),
    Mapping("hardmax", jsm.hardmax, share_the_top, sparse=True, smooth="nowhere"),
    Mapping(
        "budget_sparsemax",
        fixed(jsm.budget_sparsemax, budget=np.asarray(1.85)),
        lambda z: spend_by_halving(z, 1.85),
        sparse=True,
        smooth="inside",
        simplex=False,
    ),
    Mapping("softpick", jsm.softpick, pick_softly, sparse=True, simplex=False, shifts=False),
    Mapping(
        "stick_breaking",
        jsm.stick_breaking,
        break_from_the_end,
        simplex=False,
        shifts=False,
        in_order=True,
    ),
]

# Those that reduce a row to a number obey the same rules of differentiation.
FUNCTIONS = [
    *MAPPINGS,
    Mapping(
        "logsumexp",
        jsm.logsumexp,
        lambda z: scipy.special.logsumexp(z, -1),
        gives="row value",
    ),
]

# One function for each reverse rule, and for most ways in which the common rule is used: what holds
# of rules under transformations need not be compiled for all that share one.
RULES = [
    case
    for case in FUNCTIONS
    if case.name not in ("sparsemax", "entmax15", "hardmax", "budget_sparsemax")
]


def fenchel_young(mapping, omega):
    """The Fenchel-Young loss by its definition, in NumPy."""

    def loss(z, y):
        def value(p):
            return np.sum(p * z - omega(p), -1)

        return value(mapping(z)) - value(y)

    return loss


def _sparsemax_of_margin(s):
    return np.where(s >= 1, 0, np.where(s <= -1, -s, (s - 1) ** 2 / 4))


def _entmax15_of_margin(s):
    # With p = (u^2, v^2): u - v = s / 2 and u^2 + v^2 = 1, as long as both are positive.
    inside = np.clip(s, -2, 2)
    u = (inside + np.sqrt(8 - inside**2)) / 4
    v = u - inside / 2
    loss = (u**2 - 1) * inside + (1 - u**3 - v**3) / 0.75
    return np.where(s >= 2, 0, np.where(s <= -2, -s, loss))


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the tests have to know of a loss.

    Attributes:
      name: its public name.
      fun: the function.
      mapping: the NumPy reference of the mapping whose partner it is.
      reference: the loss of scores and distributions along the last axis, in NumPy.
      of_margin: the loss of two classes by how far the target's score is above the other.
      margin: the margin from which on it is 0.
    """

    name: str
    fun: Callable
    mapping: Callable
    reference: Callable
    of_margin: Callable
    margin: float


LOSSES = [
    Loss(
        "cross_entropy",
        jsm.cross_entropy,
        mapping=lambda z: scipy.special.softmax(z, -1),
        reference=lambda z, y: -np.sum(y * scipy.special.log_softmax(z, -1), -1),
        of_margin=lambda s: np.logaddexp(0, -s),
        margin=np.inf,
    ),
    Loss(
        "sparsemax_loss",
        jsm.sparsemax_loss,
        mapping=project_by_sorting,
        reference=fenchel_young(project_by_sorting, lambda p: p**2 / 2),
        of_margin=_sparsemax_of_margin,
        margin=1.0,
    ),
    Loss(
        "entmax_loss",
        jsm.entmax_loss,
        mapping=lambda z: entmax_by_bisection(z, 1.5),
        reference=fenchel_young(lambda z: entmax_by_bisection(z, 1.5), lambda p: p**1.5 / 0.75),
        of_margin=_entmax15_of_margin,
        margin=2.0,
    ),
]


# The mappings whose threshold is searched for, of all kinds of powers.
SOLVED = {
    "sparsemax": jsm.sparsemax,
    "entmax15": jsm.entmax15,
    "entmax(1.1)": functools.partial(jsm.entmax, alpha=1.1),
    "entmax(1.3)": functools.partial(jsm.entmax, alpha=1.3),
    "entmax(3)": functools.partial(jsm.entmax, alpha=3.0),
}


def named(table):
    """The arguments of `pytest.mark.parametrize` after the name."""
    return {"argvalues": table, "ids": [case.name for case in table]}


# Forms of one's own. What they make of -inf: NaN, what rounding leaves of 0, and more than 0.
SQUAREPLUS = jsm.Form(lambda u: (u + jnp.sqrt(u * u + 4)) / 2, lambda p: p - 1 / p)
ARCTAN = jsm.Form(lambda u: 1 + 2 / jnp.pi * jnp.arctan(u), lambda p: jnp.tan((p - 1) * jnp.pi / 2))
LIFTED = jsm.Form(
    lambda u: jax.nn.sigmoid(u) + 0.1,
    lambda p: jnp.log(p - 0.1) - jnp.log1p(0.1 - p),
    slope=lambda p: (p - 0.1) * (1.1 - p),
    tau=0.0,
)
