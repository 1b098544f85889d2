"""One path per leaf, whatever wraps it, and options that are given leaf by leaf.

Flax keeps arrays in boxes: ``nnx.Param``, linen's ``Partitioned``. A pytree node whose
only child is an attribute ``value`` (or ``array``, haliax) is a box, and its name is that
of what it holds: the parameters of a model have the same paths in their boxes and
without, so that ``init`` may see the one and ``update`` the other.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jax.tree_util import GetAttrKey

from jaxpapers.optim.layout import (
    EXCLUDED,
    DimensionNumbers,
    is_dimensions,
    path_name,
)

_BOX_FIELDS = ("value", "array")
# Metadata of an nnx.Variable that names one mesh or logical axis per array axis.
_NNX_NAMES = ("out_sharding", "optimizer_sharding")


def is_box(x: Any) -> bool:
    """Whether a pytree node holds one value, under a name that says nothing."""
    if isinstance(x, dict | list | tuple) or jax.tree_util.all_leaves([x]):
        return False
    children = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    if [path for path, _ in children] not in [[(GetAttrKey(n),)] for n in _BOX_FIELDS]:
        return False
    # An array, a PartitionSpec, DimensionNumbers, nothing; but no layer called "value".
    content = children[0][1]
    whole = jax.tree_util.all_leaves([content]) or isinstance(content, tuple)
    return whole or is_box(content) or not jax.tree.leaves(content)


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """[(path, leaf)] without the names of boxes, and the tree's structure.

    Args:
      tree: any pytree.
      is_leaf: as for ``jax.tree.flatten``; boxes are looked into before it is asked.
    """

    def leaf_or_box(x):
        return is_box(x) or (is_leaf is not None and is_leaf(x))

    def leaves(prefix, tree):
        flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=leaf_or_box)[0]
        for path, x in flat:
            path = prefix + tuple(path)
            if is_box(x):
                yield from leaves(path, _content(x))
            else:
                yield path_name(path), x

    # A box may count as a leaf by itself: an nnx.Variable has a dtype.
    inside = is_leaf and (lambda x: not is_box(x) and is_leaf(x))
    return list(leaves((), tree)), jax.tree.structure(tree, is_leaf=inside)


def map_named(f: Callable[[str, Any], Any], tree: Any, is_leaf=None) -> Any:
    """The tree of f(path, leaf), paths as ``named_leaves`` has them."""
    named, treedef = named_leaves(tree, is_leaf)
    return treedef.unflatten([f(path, leaf) for path, leaf in named])


def with_leaves(tree: Any, leaves: Sequence[Any], respec: Sequence[Any]) -> Any:
    """The tree with other leaves, whose boxes name the axes of these.

    A box is metadata for an array of its parameter's shape: what reads it
    (``nn.get_sharding``) would split Q along axes that Q has not.

    Args:
      tree: parameters, boxed or not.
      leaves: in the order of ``named_leaves(tree)``; a tuple of arrays has a box of the
        leaf's kind for each.
      respec: for each leaf, its axes' names given those of the parameter's axes; a tuple
        for a tuple.

    Returns:
      Like ``tree``; an array that no known box can hold has none.
    """
    nodes, treedef = jax.tree.flatten(tree, is_leaf=is_box)
    pairs = iter(zip(leaves, respec))
    return treedef.unflatten([_fill(node, pairs) for node in nodes])


def per_leaf(
    option: Any, named: Sequence[tuple[str, Any]], is_value: Callable, name: str
) -> list[Any]:
    """Looks up a per-leaf option: one value, a function (path, leaf), or a tree.

    A tree is matched by path, so that it may also describe leaves that a mask or
    partition has taken out of ``named``; an entry for a node is that of all leaves
    below it.
    """
    if is_value(option):
        return [option] * len(named)
    if is_function(option, is_value):
        return [option(path, leaf) for path, leaf in named]
    table = dict(named_leaves(option, is_value)[0])
    found = [_entry(table, path) for path, _ in named]
    missing = [path for (path, _), entry in zip(named, found) if not entry]
    if missing:
        raise ValueError(
            f"{name} has no entry for the parameter {missing[0]!r}; got entries for "
            f"{sorted(table)[:8]}; pass one value, a tree with the parameters' "
            "structure, or the function that its docstring says"
        )
    return [entry[0] for entry in found]


def dimension_numbers(
    option: Any, named: Sequence[tuple[str, Any]], name="weight_dimension_numbers"
) -> list[DimensionNumbers | None]:
    """The option ``weight_dimension_numbers`` of each leaf.

    Returns:
      ``DimensionNumbers``, ``EXCLUDED`` where the option is None for a leaf, or None
      where there is no option: a 2-D leaf is (in, out) then.

    Raises:
      TypeError: a function that returns anything else.
    """
    if option is None:
        return [None] * len(named)
    values = per_leaf(option, named, is_dimensions, name)
    for (path, _), value in zip(named, values):
        if not is_dimensions(value):
            raise TypeError(
                f"{path}: {name} must be DimensionNumbers or None, got {value!r}"
            )
    return [
        DimensionNumbers(*v) if isinstance(v, tuple) and v else EXCLUDED for v in values
    ]


def aligned(option: Any, is_value: Callable, name: str) -> Callable | None:
    """A per-leaf option as a function that gives it in the form of the parameters.

    Args:
      option: a tree, matched by path whatever boxes either has, a function of the
        parameters that returns one, or None.
      is_value: whether something is the option of one leaf.
      name: of the option, for messages.
    """
    if option is None:
        return None

    def of(params):
        tree = option(params) if is_function(option, is_value) else option
        named, treedef = named_leaves(params)
        values = per_leaf(tree, named, is_value, name)
        for (path, _), value in zip(named, values):
            if not is_value(value):
                raise TypeError(f"{path}: {name} cannot be {value!r}")
        return treedef.unflatten(values)

    return of


def is_function(option: Any, is_value: Callable) -> bool:
    """Whether an option is to be called: a module may be a tree of values as well."""
    if not callable(option):
        return False
    if isinstance(option, jax.tree_util.Partial) or jax.tree_util.all_leaves([option]):
        return True
    leaves = jax.tree.leaves(option, is_leaf=is_value)
    return not (leaves and all(is_value(x) for x in leaves))


def _content(box: Any) -> Any:
    return jax.tree_util.tree_flatten(box, is_leaf=lambda y: y is not box)[0][0]


def _fill(node: Any, pairs: Iterator[tuple[Any, Any]]) -> Any:
    """The node with the next leaf; as it is if it holds none (a masked parameter)."""
    if not is_box(node):
        return next(pairs)[0]
    if not jax.tree.leaves(node):
        return node
    leaf, respec = next(pairs)
    if isinstance(leaf, tuple):
        return tuple(_rebox(node, *pair) for pair in zip(leaf, respec))
    return _rebox(node, leaf, respec)


def _rebox(box: Any, value: Any, respec: Callable[[P], P]) -> Any:
    if is_box(content := _content(box)):
        value = _rebox(content, value, respec)
    if hasattr(box, "get_metadata"):  # nnx.Variable
        metadata = dict(box.get_metadata())
        for key in _NNX_NAMES:
            if isinstance(names := metadata.get(key), tuple | list | P):
                metadata[key] = tuple(respec(P(*names)))
        new = jax.tree.structure(box, is_leaf=lambda y: y is not box)
        new = new.unflatten([value])
        new.set_metadata(metadata)
        return new
    if hasattr(box, "names") and hasattr(box, "replace"):  # nn.Partitioned
        return box.replace(names=tuple(respec(P(*box.names))), value=value)
    return value


def _entry(table: dict[str, Any], path: str) -> tuple[Any, ...]:
    """(entry of the path or of the nearest node above it,), () without any."""
    while path not in table:
        if not path:
            return ()
        path = path.rpartition("/")[0]
    return (table[path],)
