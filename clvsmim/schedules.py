"""Learning-rate schedules as records: (finished steps, layer multiplier) -> rate.

Lengths are in epochs and rates absolute. A schedule is hashable and compares by value.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clvsmim import plugin

Schedule = Callable[..., jax.Array]


def schedule(
    name: str, *, total_steps: int, steps_per_epoch: int, **settings: Any
) -> Schedule:
    """A schedule by name; lengths in `settings` are in epochs, rates are absolute.

    The result is hashable, jittable, and called with the number of finished steps.

    Raises:
      ValueError: an unknown name, or a missing or unknown setting.
    """
    if name not in SCHEDULES:
        raise ValueError(plugin.unknown("schedule", name, SCHEDULES))
    make, where = SCHEDULES[name], f"schedule {name!r}"
    clock = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    fields = inspect.signature(make).parameters
    clock = {k: v for k, v in clock.items() if k in fields}
    return plugin.call(make, where, **clock, **_hashable(settings))


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One learning rate for the whole run."""

    base: float

    def __call__(self, step: int | jax.Array, scale: float = 1.0) -> jax.Array:
        return jnp.full((), self.base * scale, jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From 0 to `base` over the warmup, then a half cosine to `minimum`.

    The cosine spans what is left after the warmup. A layer multiplier scales the whole
    rate, `minimum` too. As in MoCo v3 and MAE; `per="epoch"` without warmup is the
    linear probe of MoCo v3, which changes the rate once per epoch.
    """

    base: float
    minimum: float
    warmup_epochs: float
    total_steps: int
    steps_per_epoch: int
    per: str = "step"

    def __post_init__(self):
        _check_unit(self.per)

    def __call__(self, step: int | jax.Array, scale: float = 1.0) -> jax.Array:
        t = _clock(step, self.steps_per_epoch, self.per, lag=0)
        warmup = self.warmup_epochs * self.steps_per_epoch
        rise = self.base * _ratio(t, warmup)
        left = _ratio(self.total_steps - t, self.total_steps - warmup)
        fall = self.minimum + (self.base - self.minimum) * _half_cosine(left)
        return scale * jnp.where(t < warmup, rise, fall)


@dataclass(frozen=True, kw_only=True)
class TimmCosine:
    """From `start` to `base` over the warmup, then a cosine that ignores the warmup.

    The cosine spans the whole run, so the rate falls suddenly when the warmup ends. It
    is read `lag` units late (`per` "step" or "epoch"), because the scheduler is
    stepped after the optimizer: the first two units share the first value. A layer
    multiplier scales `base` alone. As in timm: SimMIM's fine-tuning (per step) and
    DeiT (per epoch), both with lag 1.
    """

    base: float
    start: float
    minimum: float
    warmup_epochs: float
    total_steps: int
    steps_per_epoch: int
    lag: int
    per: str = "step"

    def __post_init__(self):
        _check_unit(self.per)

    def __call__(self, step: int | jax.Array, scale: float = 1.0) -> jax.Array:
        t = _clock(step, self.steps_per_epoch, self.per, self.lag)
        base, warmup = self.base * scale, self.warmup_epochs * self.steps_per_epoch
        rise = self.start + (base - self.start) * _ratio(t, warmup)
        left = _ratio(self.total_steps - t, self.total_steps)
        fall = self.minimum + (base - self.minimum) * _half_cosine(left)
        return jnp.where(t < warmup, rise, fall)


@dataclass(frozen=True, kw_only=True)
class Milestones:
    """From `start` to `base` over the warmup, then times `factor` at each milestone.

    Milestones are shares of the run: 700 of 800 epochs is 0.875. Read `lag` steps late
    (see TimmCosine). A layer multiplier scales `base` alone. As in SimMIM's
    pre-training.
    """

    base: float
    start: float
    warmup_epochs: float
    milestones: tuple[float, ...]
    factor: float
    total_steps: int
    steps_per_epoch: int
    lag: int

    def __call__(self, step: int | jax.Array, scale: float = 1.0) -> jax.Array:
        t = _clock(step, self.steps_per_epoch, "step", self.lag)
        base, warmup = self.base * scale, self.warmup_epochs * self.steps_per_epoch
        rise = self.start + (base - self.start) * _ratio(t, warmup)
        fall = jnp.full((), base, jnp.float32)
        for i, share in enumerate(sorted(self.milestones), 1):
            passed = t >= share * self.total_steps
            fall = jnp.where(passed, base * self.factor**i, fall)
        return jnp.where(t < warmup, rise, fall)


SCHEDULES = {
    "constant": Constant,
    "cosine": Cosine,
    "timm_cosine": TimmCosine,
    "milestones": Milestones,
}


def _clock(step: int | jax.Array, steps_per_epoch: int, per: str, lag: int):
    """The step whose rate is used: start of the unit that lies `lag` units back."""
    unit = steps_per_epoch if per == "epoch" else 1
    return jnp.maximum(jnp.asarray(step) // unit - lag, 0) * unit


def _ratio(steps: jax.Array, length: float) -> jax.Array:
    """steps / length within [0, 1]; a length of 0 is a warmup that never shows."""
    return jnp.clip(steps / max(length, 1), 0, 1)


def _half_cosine(left: float | jax.Array) -> jax.Array:
    """(1 + cos(pi (1 - left))) / 2 without the cancellation in 1 + cos near -1."""
    return jnp.square(jnp.sin(0.5 * math.pi * jnp.asarray(left, jnp.float32)))


def _check_unit(per: str) -> None:
    if per not in ("step", "epoch"):
        raise ValueError(plugin.unknown("schedule unit per=", per, ("step", "epoch")))


def _hashable(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
