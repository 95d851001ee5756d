"""Trees of arrays by "/"-joined names: rules, partition, strict merge."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

Tree = Any


def name_of(path: tuple) -> str:
    """The "/"-joined name of a key path: `encoder/block_0/attn/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Tree) -> dict[str, Any]:
    """All leaves by name, in tree order."""
    return {name_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `named` for nested dicts: {"a/b": 1} -> {"a": {"b": 1}}."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return root


def map_named(function: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Like `jax.tree.map`, with the leaf's name as the first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(name_of(path), *leaves), tree, *rest
    )


def by_rule(tree: Tree, rules: Sequence[tuple[str, Any]], what: str) -> Tree:
    """The value of the first rule (regex on the whole name, value) for every leaf.

    Raises:
      ValueError: a leaf that no rule matches, or a rule that matches no leaf (a
        misspelt freezing rule would otherwise train what it should freeze). A last
        rule `.*` may match nothing.
    """
    used = set()
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"the {what} rule {pattern!r} is no regular expression: {error}"
            ) from error

    def pick(name: str, _: Any) -> Any:
        for i, (pattern, value) in enumerate(rules):
            if re.fullmatch(pattern, name):
                used.add(i)
                return value
        raise ValueError(f"no {what} rule matches {name!r}; add one for it")

    result = map_named(pick, tree)
    for i, (pattern, _) in enumerate(rules):
        matched = any(re.fullmatch(pattern, name) for name in named(tree))
        if i not in used and pattern != ".*" and not matched:
            some = ", ".join(list(named(tree))[:4])
            raise ValueError(
                f"the {what} rule {pattern!r} matches no parameter; "
                f"names look like: {some}, ..."
            )
    return result


def partition(tree: Tree, keep: Tree) -> tuple[Tree, Tree]:
    """(kept, rest): two trees of the same shape with None where the other has a leaf.

    `keep` is a tree of bools. None is an empty subtree to JAX, so gradients and
    optimizer state exist for the kept leaves alone.
    """
    kept = jax.tree.map(lambda k, x: x if k else None, keep, tree)
    rest = jax.tree.map(lambda k, x: None if k else x, keep, tree)
    return kept, rest


def combine(kept: Tree, rest: Tree) -> Tree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, kept, rest, is_leaf=lambda x: x is None
    )


def strict(target: Tree, source: Tree, what: str) -> Tree:
    """`source` in the structure of `target`; names and shapes must agree exactly.

    Raises:
      ValueError: with what is missing, unexpected or of another shape, both sides.
    """
    want, have = named(target), named(source)
    missing = [f"{n} {tuple(want[n].shape)}" for n in want if n not in have]
    extra = [f"{n} {tuple(have[n].shape)}" for n in have if n not in want]
    shapes = [
        f"{n}: {tuple(have[n].shape)} in the file, {tuple(want[n].shape)} in the model"
        for n in want
        if n in have and tuple(want[n].shape) != tuple(have[n].shape)
    ]
    parts = [
        f"{len(rows)} {title} ({'; '.join(rows[:3])}{'; ...' if len(rows) > 3 else ''})"
        for title, rows in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", shapes),
        )
        if rows
    ]
    if parts:
        raise ValueError(
            f"{what} is of another architecture: {', '.join(parts)}. "
            "Use the encoder section of the config it was trained with"
        )
    return map_named(lambda name, _: have[name], target)
