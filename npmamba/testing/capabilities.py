"""What a scan can be asked: which arguments it takes, what it returns and what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

REQUIRED = ("u", "delta", "A", "B", "C")
OPTIONS: dict[str, Any] = {
    "D": None, "z": None, "delta_bias": None, "delta_softplus": False, "initial_state": None, "discretization": "euler",
    "seq_idx": None, "reverse": False,
}  # fmt: skip
ARRAYS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
MAPS = {2: "constant maps", 3: "shared maps", 4: "groups"}


@dataclass(frozen=True)
class Capabilities:
    """What a scan can be asked, and what it promises.

    Attributes
    ----------
    keywords : frozenset of str
        The optional arguments it takes, of those in `OPTIONS`, and "return_last_state" if it has to be asked.
    last_state : bool
        Whether it returns ``(y, last_state)``.
    rules : tuple of str
        The discretizations it knows.
    maps : tuple of str
        The shapes of B and C it takes: "constant maps" (dim, dstate), "shared maps" (batch, dstate, seqlen), "groups".
    float64 : bool
        Whether it takes float64. Differences, by which gradients are checked, need it.
    strides : bool
        Whether it takes arrays of any memory order, negative strides among them; if not, all it is given is in C order.
    nonfinite : bool
        Whether NaN flows where the equations carry it and nowhere else, and A may be -inf.
    same_bits : bool
        Whether rows, parts of time, reversed time, packing and memory order change no bit, as npmamba promises on CPUs.
    backward : callable or None
        ``backward(dout=dout, **arguments)`` with `dlast_state` if there is a last state; returns a named tuple or a
        dictionary of gradients by argument.
    step : callable or None
        Like ``npmamba.selective_state_update``: changes the state it is given, and returns y.
    """

    keywords: frozenset[str] = frozenset({*OPTIONS, "return_last_state"})
    last_state: bool = True
    rules: tuple[str, ...] = ("euler", "zoh")
    maps: tuple[str, ...] = tuple(MAPS.values())
    float64: bool = True
    strides: bool = True
    nonfinite: bool = True
    same_bits: bool = False
    backward: Callable[..., Any] | None = field(default=None, repr=False)
    step: Callable[..., Any] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, fn: Callable[..., Any], **changes: Any) -> Capabilities:
        """Read off the signature of `fn` which optional arguments it takes; say the rest by `changes`.

        >>> def fn(u, delta, A, B, C, D=None, *, return_last_state=False): ...
        >>> sorted(Capabilities.of(fn).keywords), Capabilities.of(fn).rules
        (['D', 'return_last_state'], ('euler',))
        """
        names = inspect.signature(fn).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in names.values())
        keywords = frozenset(cls.keywords if open_ended else cls.keywords & set(names))
        rules = cls.rules if "discretization" in keywords else ("euler",)
        return cls(**{"keywords": keywords, "rules": rules, **changes})

    def can(self, word: str) -> bool:
        """Tell whether a law may use an option, a rule, a kind of map, or another of the attributes, by its name."""
        if word in ("last_state", "float64", "strides", "nonfinite", "backward", "step"):
            return bool(getattr(self, word))
        return word in self.keywords or word in self.rules or word in self.maps


def is_given(arguments: dict[str, Any], name: str) -> bool:
    """Tell whether an optional argument is other than its default."""
    x = arguments.get(name)
    return not (x is None or x is False or (isinstance(x, str) and x == OPTIONS.get(name)))
