"""The tape: gradients by writing down what happened and reading it backwards.

Every value that depends on an input gets a *slot*, a number that only grows. Every call of a primitive adds
an *entry*: which slots went in, which came out, what the vjp needs. Causes stand before effects, so reading
the list backwards is the chain rule; no graph is built or sorted. There are only first derivatives. tape.md
tells the story with an example.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npmamba.autodiff.tree import tree_map, tree_map_path


class Traced:
    """An array that is being recorded. Its operators (``+ - * / @ []``, ``.T``, ...) come from `algebra`."""

    __slots__ = ("slot", "tape", "value")
    __array_ufunc__ = None  # makes NumPy and CuPy leave `array * traced` to Traced.__rmul__

    def __init__(self, value: Any, tape: Tape, slot: int) -> None:
        self.value, self.tape, self.slot = value, tape, slot

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: self.value.ndim)

    def __repr__(self) -> str:
        return f"Traced(shape={self.shape}, dtype={self.dtype})"

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a traced value is not an array: use a primitive, or value_of(x) to leave the tape")


def value_of(x: Any) -> Any:
    """Return the array inside a traced value, and anything else as it is."""
    return x.value if type(x) is Traced else x


def _array(x: Any) -> Any:
    """Undo NumPy's habit of turning 0-d results into scalars."""
    if type(x) is tuple:
        return tuple([_array(leaf) for leaf in x])
    return np.asarray(x) if isinstance(x, np.generic) else x


class primitive:
    """A function that knows its derivative: this decorates its forward, `.vjp` decorates the rule beneath it.

    The forward takes arrays (or None) by position and options by keyword; it returns ``(out, saved)``, where
    out is an array or a tuple of arrays. If it has a keyword `save`, that says whether saved is needed.
    The vjp maps ``(dout, saved)`` to a tuple with one gradient, ``dx = dout · d out/dx``, or None for each
    positional argument. If out is a tuple, so is dout, with None for outputs that nobody used.

    >>> @primitive
    ... def square(x):
    ...     return x * x, x
    >>> @square.vjp
    ... def square_vjp(dout, x):
    ...     return (2 * x * dout,)
    >>> out, pull = pullback(square, np.array([1.0, 3.0]))
    >>> pull(np.array([1.0, 1.0]))
    (array([2., 6.]),)
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self.forward, self.name = forward, forward.__name__.removeprefix("_")  # users know the function around it
        self.rule: Callable[..., Any] | None = None
        self.parameters = list(inspect.signature(forward).parameters)
        self.asks_to_save = "save" in self.parameters

    def vjp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Register `rule` as the vjp and return it unchanged."""
        self.rule = rule
        return rule

    def __call__(self, *args: Any, **options: Any) -> Any:
        for name, x in options.items():
            if type(x) is Traced:
                raise TypeError(
                    f"{self.name}: {name} is traced, but keyword arguments have no gradient; pass value_of({name})"
                )
        tapes = [x.tape for x in args if type(x) is Traced]
        if self.asks_to_save:
            options["save"] = bool(tapes)
        if not tapes:
            return _array(self.forward(*args, **options)[0])
        if any(tape is not tapes[0] for tape in tapes):
            raise RuntimeError(f"{self.name}: its arguments are traced by two different pullbacks")
        return tapes[0].record(self, args, options)


class Entry(NamedTuple):
    """One line of the tape. It holds what the vjp needs, not the inputs and outputs themselves."""

    primitive: primitive
    parents: list[int | None]  # the slot of each positional argument, None for a constant
    saved: Any
    first: int  # the slot of the first output; those of the others follow
    many: bool  # whether the output is a tuple


class Tape:
    """The record of one run of a function: its entries, and the shape and dtype of each slot."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.slots: list[tuple[Any, Any]] = []

    def watch(self, value: Any) -> Traced:
        """Give `value` the next slot."""
        self.slots.append((value.shape, value.dtype))
        return Traced(value, self, len(self.slots) - 1)

    def record(self, primitive: primitive, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run the forward of `primitive`, add its entry and return its output, traced."""
        if primitive.rule is None:
            raise NotImplementedError(f"{primitive.name}: has no vjp; define one with @{primitive.name}.vjp")
        parents = [x.slot if type(x) is Traced else None for x in args]
        out, saved = primitive.forward(*[value_of(x) for x in args], **options)
        out, many = _array(out), isinstance(out, tuple)
        self.entries.append(Entry(primitive, parents, saved, len(self.slots), many))
        return tuple([self.watch(x) for x in out]) if many else self.watch(out)

    def read_backwards(self, gradients: list[Any]) -> None:
        """Replace the gradients of all slots by those of the inputs; entries are dropped as they are read.

        When an entry is reached, all later ones are gone: the tail of `gradients` belongs to its outputs.
        """
        while self.entries:
            entry = self.entries.pop()
            dout = tuple(gradients[entry.first :])
            del gradients[entry.first :]
            if any(d is not None for d in dout):
                self.apply(entry, dout if entry.many else dout[0], gradients)

    def apply(self, entry: Entry, dout: Any, gradients: list[Any]) -> None:
        """Add what the vjp of `entry` makes of `dout` to the gradients of the entry's parents."""
        name, found = entry.primitive.name, entry.primitive.rule(dout, entry.saved)  # type: ignore[misc]
        if not isinstance(found, tuple) or len(found) != len(entry.parents):
            came = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
            raise ValueError(f"{name}: its vjp must return a tuple of {len(entry.parents)}, got {came}")
        for i, (slot, gradient) in enumerate(zip(entry.parents, found, strict=True)):
            if slot is not None and gradient is not None:
                argument = entry.primitive.parameters[min(i, len(entry.primitive.parameters) - 1)]
                self.add(gradients, slot, gradient, name, argument)

    def add(self, gradients: list[Any], slot: int, gradient: Any, name: str, argument: str) -> None:
        """Add `gradient` to that of `slot`; never in place: a vjp may return one array twice, or a view."""
        gradient, (shape, dtype) = _array(gradient), self.slots[slot]
        if not hasattr(gradient, "dtype") or not (gradient.dtype == dtype or _same_number(gradient.dtype, dtype)):
            came = getattr(gradient, "dtype", type(gradient).__name__)
            raise TypeError(f"{name}: the gradient of {argument} must be {dtype}, got {came}")
        if gradient.shape != shape:
            raise ValueError(f"{name}: the gradient of {argument} must be {shape}, got {gradient.shape}")
        earlier = gradients[slot]
        gradients[slot] = gradient if earlier is None else _total(earlier, gradient)


def _same_number(x: Any, y: Any) -> bool:
    """Tell whether two dtypes differ in their byte order only."""
    return bool(x.newbyteorder("=") == y.newbyteorder("="))


def _total(x: Any, y: Any) -> Any:
    """Return ``x + y`` in the memory order of `x`. CuPy's own sum is C-ordered, and slow where its operands are not."""
    if isinstance(x, np.ndarray) or x.flags.c_contiguous:
        return _array(x + y)
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    back = sorted(range(x.ndim), key=order.__getitem__)
    return (x.transpose(order) + y.transpose(order)).transpose(back)


def _check_argument(path: str, x: Any) -> None:
    if type(x) is Traced:
        raise TypeError(f"pullback: argument {path} is traced already; there are only first derivatives")
    dtype = getattr(x, "dtype", None)
    if dtype is None or (dtype.kind != "f" and dtype.name != "bfloat16"):
        came = type(x).__name__ if dtype is None else dtype
        raise TypeError(f"pullback: argument {path} must be a floating array, got {came}")


def pullback(f: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """Return ``f(*args)`` and `pull`, which carries gradients back through that run of `f`.

    The arguments and the output are floating arrays or trees of them; constants reach `f` by closure. `pull`
    maps `dout`, a tree like the output with None for zero, to a tuple of one gradient tree per argument. It
    frees the tape on the way and so works once. Gradients may share memory: do not write into them.

    >>> from npmamba.autodiff import pullback
    >>> out, pull = pullback(lambda x, y: x * y + x, np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    >>> pull(np.array([1.0, 10.0]))
    (array([ 4., 50.]), array([ 1., 20.]))
    """
    tree_map_path(_check_argument, args)
    tape = Tape()
    out = f(*tree_map(tape.watch, args))
    slots = tree_map(lambda x: x.slot if type(x) is Traced else None, out)
    read = False

    def pull(dout: Any) -> tuple[Any, ...]:
        nonlocal read
        if read:
            raise RuntimeError("pull: this tape has been read and freed; call pullback again")
        read, gradients = True, [None] * len(tape.slots)
        seeds: list[tuple[int, Any]] = []
        tree_map(lambda slot, d: seeds.append((slot, d)), slots, dout)
        for slot, d in seeds:
            if d is not None:
                tape.add(gradients, slot, d, "pull", "the output")
        tape.read_backwards(gradients)
        inputs = iter(gradients)
        return tree_map(lambda x: np.zeros_like(x) if (d := next(inputs)) is None else d, args)

    return tree_map(value_of, out), pull


def value_and_grad(f: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """Return a function of `f`'s arguments that gives `f`'s value and the gradients of its first argument.

    `f` returns a scalar array or, with `has_aux`, a pair of a scalar array and anything else worth returning;
    any other shape is a ValueError.

    >>> from npmamba.autodiff import value_and_grad
    >>> value_and_grad(lambda p: (p["w"] * p["w"]).sum())({"w": np.array([1.0, 2.0])})
    (array(5.), {'w': array([2., 4.])})
    """

    @functools.wraps(f)
    def with_gradients(params: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        value, pull = pullback(lambda params: f(params, *args, **options), params)
        loss = value[0] if has_aux else value
        if getattr(loss, "shape", None) != ():
            came = getattr(loss, "shape", type(loss).__name__)
            raise ValueError(f"value_and_grad: {f.__name__} must return an array of shape (), got {came}")
        (gradients,) = pull((np.ones_like(loss), None) if has_aux else np.ones_like(loss))
        return value, gradients

    return with_gradients
