"""Trees of arrays: what mapping keeps, and how paths and mismatches are named."""

from __future__ import annotations

from collections import namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.autodiff.tree import tree_items, tree_map, tree_map_path

Pair = namedtuple("Pair", "left right")  # noqa: PYI024


def branches(child):
    return (
        st.dictionaries(st.sampled_from(["a", "b", "norm.weight", 7]), child, max_size=3)
        | st.lists(child, max_size=3)
        | st.tuples(child, child)
        | st.builds(Pair, child, child)
    )


trees = st.recursive(st.none() | st.integers(), branches, max_leaves=8)


@given(tree=trees)
def test_mapping_the_identity_keeps_the_tree_and_every_type_in_it(tree):
    assert repr(tree_map(lambda x: x, tree)) == repr(tree)


@given(tree=trees)
def test_mapping_twice_is_mapping_the_composition(tree):
    def double(x):
        return 2 * x

    def increase(x):
        return x + 1

    twice = tree_map(increase, tree_map(double, tree))
    assert twice == tree_map(lambda x: increase(double(x)), tree)


@given(tree=trees)
def test_items_come_in_the_order_of_mapping_and_leave_none_out(tree):
    seen = []
    tree_map_path(lambda path, leaf: seen.append((path, leaf)), tree)
    assert tree_items(tree) == seen
    assert all(leaf is not None for _, leaf in seen)


@given(tree=trees)
def test_trees_of_one_shape_map_together(tree):
    assert tree_map(lambda x, y: x - y, tree, tree) == tree_map(lambda x: 0, tree)


def test_the_path_of_a_leaf_in_a_flat_dict_is_its_key():
    key = "backbone.layers.0.mixer.in_proj.weight"
    assert tree_items({key: 1}) == [(key, 1)]
    assert tree_items(Pair([5], {"w": 6})) == [("left.0", 5), ("right.w", 6)]
    assert tree_items(3) == [("", 3)]


def test_order_of_keys_does_not_matter_in_the_others():
    assert tree_map(lambda x, y: x * y, {"a": 2, "b": 3}, {"b": 5, "a": 7}) == {"a": 14, "b": 15}


def test_none_stands_for_a_branch_of_nones():
    assert tree_map(lambda x, y: (x, y), {"a": [1, 2]}, None) == {"a": [(1, None), (2, None)]}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"x": 1}}, r"trees differ at a: \['x', 'y'\] against \['x'\]"),
        ({"b": 1}, r"trees differ at the root: \['a'\] against \['b'\]"),
        ({"a": 3}, r"trees differ at a: \['x', 'y'\] against \[\]"),
    ],
)
def test_a_mismatch_says_where(other, message):
    with pytest.raises(ValueError, match=message):
        tree_map(lambda x, y: x, {"a": {"x": 1, "y": 2}}, other)
