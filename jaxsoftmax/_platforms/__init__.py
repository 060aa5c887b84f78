"""What exists because of one platform, in a room for each.

The mathematics is written once, elsewhere, for any platform. A room holds what one compiler does
better in another way, under the names that `chosen` is asked for. Rooms are entered when a program
is lowered. Each may be deleted: all that is lost is time, memory, or a last digit.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from jax import lax

from jaxsoftmax._jax import is_local
from jaxsoftmax._platforms import _cpu, _gpu, _tpu

T = TypeVar("T")

# By the names that `jax.lax.platform_dependent` knows.
ROOMS: dict[str, Any] = {"cpu": _cpu, "cuda": _gpu, "rocm": _gpu, "tpu": _tpu}


def chosen(name: str, general: Callable[..., T], *args: Any, **known: Any) -> T:
    """`general(*args)`, or in its place what the room of the platform has under `name`.

    Args:
      name: a function of rooms, called as `function(general, *args, **known)`. If the room has it
        among its `LOCAL`, only in programs for one device, or one device's share: where XLA itself
        shares arrays among devices, what is cut or folded would have to be gathered.
      general: what all other platforms do.
      *args: arrays, in pytrees.
      **known: what is known while tracing.
    """
    of: dict[str, Callable[..., T]] = {}
    for platform, room in ROOMS.items():
        if hasattr(room, name):
            special = functools.partial(getattr(room, name), general, **known)
            if name in getattr(room, "LOCAL", ()):
                special = functools.partial(if_local, special, general)
            of[platform] = special
    return lax.platform_dependent(*args, default=general, **of) if of else general(*args)


def if_local(special: Callable[..., T], general: Callable[..., T], *args: Any) -> T:
    """`special(*args)` where XLA shares nothing among devices, or `general(*args)`."""
    return lax.cond(is_local(), special, general, *args)


def constants(name: str) -> dict[str, Any]:
    """What each room has under `name`, for those that have it."""
    return {
        platform: getattr(room, name) for platform, room in ROOMS.items() if hasattr(room, name)
    }
