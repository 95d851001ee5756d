"""The engine under every family: reversible rules between their names and ours.

Theirs are the names in a file, less the path of dict keys and the prefix before them.
Ours are "/"-joined leaves under `encoder`, `heads` (params) and `stats` (batch
statistics of either). A name may hold numbers as `{i}`: the same on both sides.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Leaves = dict[str, np.ndarray]
# How far a table of sines may be off in half precision; else 1e-5.
NEAR = {"float16": 1e-3, "bfloat16": 5e-3}


class Op(NamedTuple):
    """One layout in the other.

    Attributes:
      read: (their array, heads) -> our arrays, in the order of the rule.
      write: (our arrays, heads) -> their array.
    """

    read: Callable[[np.ndarray, int], tuple[np.ndarray, ...]]
    write: Callable[[tuple[np.ndarray, ...], int], np.ndarray]


class Rule(NamedTuple):
    """One tensor of theirs is one or more leaves of ours.

    `needs` holds for writing: the rule is used only where this leaf (a template) exists
    among ours, or "gated": the MLP is a SwiGLU; after "!" only where it is not so.
    """

    theirs: str
    ours: tuple[str, ...]
    op: Op
    needs: str = ""


class Given(NamedTuple):
    """A tensor of theirs that follows from ours: compared, left out, and made again.

    Attributes:
      value: (leaves, numbers in the name) -> what it is.
      where: it is written where this leaf (a template) exists among ours; "" is never.
      compare: the file's must be the same to its precision; False: nobody reads it.
    """

    theirs: str
    why: str
    value: Callable[[Leaves, tuple[str, ...]], np.ndarray]
    where: str = ""
    compare: bool = True


class Drop(NamedTuple):
    """Tensors that the network does not need: a regular expression, and why not.

    `warn` where what is left without them is not what their code computes.
    """

    theirs: str
    why: str
    warn: bool = False


class Found(NamedTuple):
    """What the rules made of a file.

    Attributes:
      leaves: ours by name, float32.
      matched: their name -> our names.
      moved: those of `matched` whose layout is another here.
      dropped: their name -> why.
      checks: (their name, what it must be) of the `Given`s, for when all is read.
      cast: their name -> dtype, where it was not float32.
      warnings: reasons of dropped tensors that matter.
    """

    leaves: Leaves
    matched: dict[str, tuple[str, ...]]
    moved: list[str]
    dropped: dict[str, str]
    checks: list[tuple[str, Given, tuple[str, ...]]]
    cast: dict[str, str]
    warnings: list[str]


# Layouts. `heads` is that of the encoder, or of the decoder for its tensors.

SAME = Op(lambda x, h: (x,), lambda xs, h: xs[0])
LINEAR = Op(lambda x, h: (_rank(x, 2).T,), lambda xs, h: xs[0].T)
CONV = Op(
    lambda x, h: (_rank(x, 4).transpose(2, 3, 1, 0),),
    lambda xs, h: xs[0].transpose(3, 2, 0, 1),
)
# A 1x1 convolution is a linear map; SimMIM's channels stay in its order (c, dy, dx).
CONV_1X1 = Op(
    lambda x, h: (_one_pixel(x)[:, :, 0, 0].T,),
    lambda xs, h: xs[0].T[:, :, None, None],
)
# (3D, D): rows are q, k, v, in each of them the heads one after the other.
QKV_WEIGHT = Op(
    lambda x, h: tuple(_to_heads(w, h) for w in _thirds(_rank(x, 2))),
    lambda xs, h: np.concatenate([_from_heads(w) for w in xs]),
)
QKV_BIAS = Op(
    lambda x, h: tuple(b.reshape(h, -1) for b in _thirds(_rank(x, 1))),
    lambda xs, h: np.concatenate([b.reshape(-1) for b in xs]),
)
HEADS_WEIGHT = Op(
    lambda x, h: (_to_heads(_rank(x, 2), h),), lambda xs, h: _from_heads(xs[0])
)
HEADS_BIAS = Op(
    lambda x, h: (_rank(x, 1).reshape(h, -1),), lambda xs, h: xs[0].reshape(-1)
)
# (1, D) is one token (1, 1, D).
TOKEN = Op(
    lambda x, h: (_rank(x, 2)[None],),
    lambda xs, h: xs[0][0],
)
OUT_WEIGHT = Op(
    lambda x, h: (_rank(x, 2).T.reshape(h, -1, x.shape[0]),),
    lambda xs, h: xs[0].reshape(-1, xs[0].shape[-1]).T,
)


def _rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim != rank:
        raise ValueError(f"has {x.ndim} axes, expected {rank}")
    return x


def _one_pixel(x: np.ndarray) -> np.ndarray:
    if _rank(x, 4).shape[2:] != (1, 1):
        raise ValueError("is no 1x1 convolution")
    return x


def _thirds(x: np.ndarray) -> list[np.ndarray]:
    if len(x) % 3:
        raise ValueError(f"has {len(x)} rows, expected three equal parts q, k, v")
    return np.split(x, 3)


def _to_heads(w: np.ndarray, heads: int) -> np.ndarray:
    """(H d, D) -> (D, H, d)."""
    return w.T.reshape(w.shape[1], heads, -1)


def _from_heads(w: np.ndarray) -> np.ndarray:
    """(D, H, d) -> (H d, D)."""
    return w.reshape(len(w), -1).T


# Reading


def read(
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    givens: Sequence[Given],
    drops: Sequence[Drop],
    heads: Callable[[str], int],
) -> Found:
    """Apply the table of a family to tensors that it knows, by their short names.

    Args:
      heads: our name -> the number of heads there.

    Raises:
      ValueError: a tensor that its rule cannot be applied to.
    """
    found = Found({}, {}, [], {}, [], {}, [])
    for name, x in tensors.items():
        rule, numbers = match(name, rules)
        if rule is not None:
            ours = tuple(fill(path, numbers) for path in rule.ours)
            for path, leaf in zip(
                ours, _apply(rule, name, x, heads, found), strict=True
            ):
                found.leaves[path] = leaf
            found.matched[name] = ours
            if rule.op is not SAME:
                found.moved.append(name)
            continue
        given, numbers = match(name, givens)
        if given is not None:
            found.dropped[name] = given.why
            if given.compare:
                found.checks.append((name, given, numbers))
            continue
        drop = next(d for d in drops if re.fullmatch(d.theirs, name))
        found.dropped[name] = drop.why
        if drop.warn and drop.why not in found.warnings:
            found.warnings.append(drop.why)
    return found


def _apply(
    rule: Rule, name: str, x: Any, heads: Callable[[str], int], found: Found
) -> tuple[np.ndarray, ...]:
    x = as_numbers(x)
    if x.dtype != np.float32:
        found.cast[name] = x.dtype.name
        if not np.issubdtype(x.dtype, np.floating) and x.dtype.name != "bfloat16":
            raise ValueError(f"{name} holds {x.dtype.name} numbers, expected floats")
        x = x.astype(np.float32)
    try:
        return rule.op.read(x, heads(rule.ours[0]))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{name} of shape {x.shape} is not what is called {name} in these files "
            f"({error}), with {heads(rule.ours[0])} heads"
        ) from error


def as_numbers(x: Any) -> np.ndarray:
    """An array; NumPy does not know bfloat16, and calls it two bytes."""
    x = np.asarray(x)
    two = x.dtype.kind == "V" and x.dtype.itemsize == 2
    return x.view(jnp.bfloat16) if two else x


def match(name: str, rules: Sequence[Any]) -> tuple[Any, tuple[str, ...]]:
    """(the first rule whose template fits a name, the numbers in it) or (None, ())."""
    for rule in rules:
        if hit := pattern(rule.theirs).fullmatch(name):
            return rule, hit.groups()
    return None, ()


@lru_cache(maxsize=4096)
def pattern(template: str) -> re.Pattern:
    """A template as a regular expression with a group per number."""
    return re.compile(r"(\d+)".join(map(re.escape, re.split(r"\{\w\}", template))))


def fill(template: str, numbers: Sequence[str]) -> str:
    """The template with these numbers."""
    numbers = iter(numbers)
    return re.sub(r"\{\w\}", lambda _: next(numbers), template)


def check(found: Found, tensors: Mapping[str, Any]) -> None:
    """Compare what follows from the leaves with the file.

    Raises:
      ValueError: a table of the file is another one: another network.
    """
    for name, given, numbers in found.checks:
        want, got = given.value(found.leaves, numbers), as_numbers(tensors[name])
        near = NEAR.get(got.dtype.name, 1e-5)
        got = got.astype(np.float32) if near > 1e-5 else got
        if got.shape != want.shape or not np.allclose(got, want, rtol=0, atol=near):
            raise ValueError(
                f"{name} of shape {got.shape} is not the expected table of shape "
                f"{want.shape} ({given.why}): this is another network"
            )


# Writing


def write(
    leaves: Leaves,
    rules: Sequence[Rule],
    givens: Sequence[Given],
    heads: Callable[[str], int],
) -> tuple[Leaves, list[str]]:
    """(their tensors, our leaves that no rule has a place for)."""
    out, used = {}, set()
    for rule in rules:
        for numbers in numbered(rule.ours[0], leaves):
            ours = [fill(path, numbers) for path in rule.ours]
            name = fill(rule.theirs, numbers)
            if name in out or not all(path in leaves for path in ours):
                continue
            if rule.needs and not _holds(rule.needs, numbers, leaves):
                continue
            parts = tuple(leaves[path] for path in ours)
            out[name] = np.ascontiguousarray(rule.op.write(parts, heads(ours[0])))
            used.update(ours)
    for given in givens:
        for numbers in numbered(given.where, leaves) if given.where else ():
            out[fill(given.theirs, numbers)] = given.value(leaves, numbers)
    return out, [name for name in leaves if name not in used]


def numbered(template: str, leaves: Leaves) -> list[tuple[str, ...]]:
    """The numbers with which a template is the name of a leaf."""
    if template in leaves:
        return [()]
    if "{" not in template:
        return []
    fits = pattern(template)
    return [hit.groups() for name in leaves if (hit := fits.fullmatch(name))]


def _holds(condition: str, numbers: Sequence[str], leaves: Leaves) -> bool:
    absent, condition = condition.startswith("!"), condition.lstrip("!")
    if condition == "gated":
        mlp = f"encoder/block_{numbers[0]}/mlp"
        first, second = leaves[f"{mlp}/fc1/kernel"], leaves[f"{mlp}/fc2/kernel"]
        return (first.shape[1] == 2 * len(second)) != absent
    return (fill(condition, numbers) in leaves) != absent
