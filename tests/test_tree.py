"""Trees by name: naming, rules, partition, strict merge."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim import tree


class Pair(NamedTuple):
    left: int
    right: list


NESTED = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
NAMES = {"a/b": 1, "a/c/d": 2, "e": 3}


def test_named_and_nest_are_inverse():
    assert tree.named(NESTED) == NAMES
    assert tree.nest(NAMES) == NESTED
    assert tree.nest(tree.named(NESTED)) == NESTED
    assert tree.named({}) == tree.nest({}) == {}


def test_named_is_in_tree_order():
    mixed = {"b": 0, "a": {"z": 1, "y": 2}}
    assert list(tree.named(mixed).values()) == jax.tree.leaves(mixed)


def test_records_and_lists_have_names_too_and_none_is_no_leaf():
    assert tree.named({"x": Pair(1, [2, None, 3])}) == {
        "x/left": 1,
        "x/right/0": 2,
        "x/right/2": 3,
    }


def test_map_named_gives_name_and_leaves():
    out = tree.map_named(lambda name, a, b: (name, a + b), NESTED, NESTED)
    assert out == {"a": {"b": ("a/b", 2), "c": {"d": ("a/c/d", 4)}}, "e": ("e", 6)}


def test_the_first_rule_that_matches_the_whole_name_decides():
    rules = [("a/c/.*", "deep"), ("a/.*", "a"), ("c", "part"), (".*", "rest")]
    with pytest.raises(ValueError, match="'c' matches no"):
        tree.by_rule(NESTED, rules, "test")  # `c` is only a part of a/c/d
    del rules[2]
    out = tree.by_rule(NESTED, rules, "test")
    assert out == {"a": {"b": "a", "c": {"d": "deep"}}, "e": "rest"}


def test_a_rule_does_not_match_the_start_of_a_name():
    out = tree.by_rule({"a": 1, "ab": 2}, [("a", True), (".*", False)], "test")
    assert out == {"a": True, "ab": False}


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no decay rule matches 'e'; add one for it"):
        tree.by_rule(NESTED, [("a/.*", 1)], "decay")


def test_a_rule_without_a_leaf_is_an_error_that_shows_names():
    message = "the frozen rule 'encoder/.*' matches no parameter.*a/b, a/c/d, e"
    with pytest.raises(ValueError, match=message):
        tree.by_rule(NESTED, [("encoder/.*", 1), (".*", 0)], "frozen")


def test_a_last_rule_for_the_rest_may_match_nothing():
    assert tree.by_rule({"a": 1}, [("a", True), (".*", False)], "any") == {"a": True}
    covered = [("a", True), (".+", False), ("a.*", 0), (".*", 0)]
    with pytest.raises(ValueError, match="matches no"):
        tree.by_rule({"b": 1}, covered, "any")


def test_partition_has_none_where_the_other_has_a_leaf():
    keep = {"a": {"b": True, "c": {"d": False}}, "e": True}
    kept, rest = tree.partition(NESTED, keep)
    assert kept == {"a": {"b": 1, "c": {"d": None}}, "e": 3}
    assert rest == {"a": {"b": None, "c": {"d": 2}}, "e": None}
    assert jax.tree.leaves(kept) == [1, 3]
    assert tree.combine(kept, rest) == NESTED


def test_partition_can_keep_all_or_nothing():
    for keep in (True, False):
        kept, rest = tree.partition(NESTED, jax.tree.map(lambda _, k=keep: k, NESTED))
        assert len(jax.tree.leaves(kept)) == (3 if keep else 0)
        assert tree.combine(kept, rest) == NESTED


def test_gradients_exist_for_kept_leaves_alone():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    kept, rest = tree.partition(params, {"a": True, "b": False})

    def loss(kept):
        whole = tree.combine(kept, rest)
        return whole["a"].sum() + whole["b"].sum()

    grads = jax.grad(loss)(kept)
    assert grads["b"] is None
    np.testing.assert_array_equal(grads["a"], np.ones(2))


def shapes(**leaves):
    return {name: np.zeros(shape) for name, shape in leaves.items()}


def test_strict_gives_the_source_in_the_structure_of_the_target():
    source = {"y": {"b": np.ones(2)}, "x": np.zeros(3)}
    target = {"x": jax.ShapeDtypeStruct((3,), "f4"), "y": {"b": np.zeros(2)}}
    out = tree.strict(target, source, "it")
    assert out["y"]["b"] is source["y"]["b"] and out["x"] is source["x"]


def test_strict_names_all_three_kinds_of_mismatch_at_once():
    target = {"encoder": shapes(same=(1,), gone=(2, 3), other=(4,))}
    source = {"encoder": shapes(same=(1,), new=(5,), other=(6, 7))}
    with pytest.raises(ValueError) as error:
        tree.strict(target, source, "init.path=run")
    assert str(error.value) == (
        "init.path=run is of another architecture: "
        "1 missing (encoder/gone (2, 3)), "
        "1 unexpected (encoder/new (5,)), "
        "1 of another shape "
        "(encoder/other: (6, 7) in the file, (4,) in the model). "
        "Use the encoder section of the config it was trained with"
    )


def test_strict_counts_all_and_shows_three():
    many = shapes(**{f"x{i}": (i,) for i in range(5)})
    message = r"5 missing \(x0 \(0,\); x1 \(1,\); x2 \(2,\); \.\.\.\)\."
    with pytest.raises(ValueError, match=message):
        tree.strict(many, {}, "it")
