"""Tolerances that follow conditioning: how far a right scan may be off, at every place of every result.

A tolerance is ``K eps error``, where `error` counts, to first order, how many roundings of what size can reach that
place: the scan is run on absolute values in the arithmetic of `npmamba.testing.rounding`. So it is as small as the
case allows: large where large numbers cancel, where a decay is so strong that it loses digits, or where a memory is
so long that many roundings meet, and small elsewhere. Short floats are to be computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.reference import causal_conv1d
from npmamba.reference.causal_conv1d import CausalConv1dGradients
from npmamba.reference.selective_scan import SelectiveScanGradients
from npmamba.testing import propagation
from npmamba.testing.oracles import update_as_scan
from npmamba.testing.rounding import Rounded, gate_of
from npmamba.testing.scales import scan_scale as scan_scale
from npmamba.testing.sequences import ConvSequence, complete_conv, conv_by
from npmamba.testing.values import finfo, parameter_dtype

Array = Any

K = {"float64": 2.0, "float32": 2.0}
"""Factor of a tolerance, by the dtype of the arithmetic. Right kernels were found to need a fifth of it."""


class Tolerance(NamedTuple):
    """How far a result may be off.

    Attributes
    ----------
    absolute : array
        Of the arithmetic, at every place.
    dtype : numpy.dtype
        Of the result, which is rounded to it once.
    """

    absolute: Array
    dtype: np.dtype

    def of(self, expected: Array) -> Array:
        """Return how far the result may be from what is expected.

        >>> Tolerance(np.array([1e-8]), np.dtype(np.float16)).of(np.array([2.0])).round(6)
        array([0.001953])
        """
        short = finfo(self.dtype)
        return self.absolute + float(short.eps) * np.abs(expected) + float(short.smallest_subnormal)


def _tolerance(x: Any, compute: np.dtype, dtype: Any) -> Tolerance:
    format_ = np.finfo(compute)
    floor = 2.0**20 * float(format_.tiny)  # products that underflow on their way
    return Tolerance(K[compute.name] * float(format_.eps) * x.error + floor, np.dtype(dtype).newbyteorder("="))


def gradient_scale(dout: Array, arguments: dict[str, Any], dlast_state: Array = None) -> SelectiveScanGradients:
    """Return the gradients of the same scan of absolute values, as `scan_scale` does for its results.

    Parameters
    ----------
    dout : (batch, dim, seqlen)
    arguments : dict
        Keyword arguments of ``selective_scan``.
    dlast_state : (batch, dim, dstate), optional

    Returns
    -------
    SelectiveScanGradients
        Of float64 arrays; None where the argument is None.

    Examples
    --------
    >>> one = np.ones((1, 1, 2))
    >>> gradient_scale([1.0, -1.0] * one, dict(u=one, delta=one, A=0 * one[0, :, :1], B=one, C=one)).u
    array([[[2., 1.]]])
    """
    gradients = propagation.backward(dout, arguments, dlast_state)
    return SelectiveScanGradients(*(None if x is None else x.size for x in gradients))


def scan_tolerance(arguments: dict[str, Any]) -> tuple[Tolerance, Tolerance]:
    """Return how far y and last_state of a right scan may be off, for the dtype of the arguments.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``.

    Examples
    --------
    >>> one = np.ones((1, 1, 2))
    >>> y, _ = scan_tolerance(dict(u=[1.0, -1.0] * one, delta=one, A=0 * one[0, :, :1], B=one, C=one))
    >>> bool((y.of(np.array([1.0, 0.0])) < 1e-14).all())
    True
    """
    short, wide = arguments["u"].dtype, parameter_dtype(arguments["u"].dtype)
    y, last_state = propagation.forward(arguments)
    return _tolerance(y, wide, short), _tolerance(last_state, wide, wide)


def gradient_tolerance(dout: Array, arguments: dict[str, Any], dlast_state: Array = None) -> SelectiveScanGradients:
    """Return how far each gradient of a right scan may be off: a `Tolerance` where the argument is there.

    Parameters are those of `gradient_scale`.

    >>> one = np.ones((1, 1, 2))
    >>> allowed = gradient_tolerance(one, dict(u=one, delta=one, A=0 * one[0, :, :1], B=one, C=one))
    >>> bool(allowed.u.of(one).max() < 1e-14), allowed.D is None
    (True, True)
    """
    wide = parameter_dtype(arguments["u"].dtype)
    gradients = propagation.backward(dout, arguments, dlast_state)._asdict()
    return SelectiveScanGradients(*(
        None if x is None else _tolerance(x, wide, arguments[name].dtype) for name, x in gradients.items()
    ))


def update_tolerance(arguments: dict[str, Any]) -> tuple[Tolerance, Tolerance]:
    """Return how far y and the new state of a right step may be off.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_state_update``, with the state before the step.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> y, state = update_tolerance(dict(state=one[None], x=one, dt=one, A=0 * one, B=one, C=one))
    >>> y.absolute.shape, state.absolute.shape
    ((1, 1), (1, 1, 1))
    """
    y, state = scan_tolerance(update_as_scan(arguments))
    return y._replace(absolute=y.absolute[..., 0]), state


def _absolute(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the absolute values of their numbers."""
    return {n: np.abs(x) if isinstance(x, np.ndarray) and n != "seq_idx" else x for n, x in arguments.items()}


def _windowed(s: ConvSequence) -> Array:
    """Convolve a sequence, without its activation."""
    windows = np.lib.stride_tricks.sliding_window_view(s.x, s.weight.shape[1], axis=1)
    return np.einsum("dtk,dk->dt", windows, s.weight) + s.bias[:, None]


def _conv(arguments: dict[str, Any]) -> tuple[dict[str, Any], Rounded, Rounded]:
    """Return the arguments of a convolution, y and the derivative of its activation."""
    a = complete_conv(arguments)
    linear = {**a, "activation": None}
    sizes = _absolute(linear)
    q, size = conv_by(_windowed, linear)[0], conv_by(_windowed, sizes)[0]
    y = Rounded(size, (2 + 2 * np.sqrt(a["weight"].shape[1])) * size)
    silu, slope = gate_of(q, y)
    return a, *((y, Rounded.exact(np.ones_like(q))) if a["activation"] is None else (silu, slope))


def conv_scale(arguments: dict[str, Any]) -> Array:
    """Return the same convolution of absolute values, before the activation: (batch, dim, seqlen) float64.

    >>> conv_scale(dict(x=np.array([[[1.0, -2.0]]]), weight=np.array([[1.0, 1.0]])))
    array([[[1., 3.]]])
    """
    return _conv({**arguments, "activation": None})[1].size


def conv_tolerance(arguments: dict[str, Any]) -> tuple[Tolerance, Tolerance]:
    """Return how far y and last_state of a right convolution may be off; the state is a copy.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``causal_conv1d``.

    Examples
    --------
    >>> y, _ = conv_tolerance(dict(x=np.array([[[1.0, -1.0]]]), weight=np.array([[1.0, 1.0]])))
    >>> bool(y.of(np.zeros((1, 1, 2))).max() < 1e-14)
    True
    """
    short, wide = arguments["x"].dtype, parameter_dtype(arguments["x"].dtype)
    with np.errstate(all="ignore"):
        _, y, _ = _conv(arguments)
    return _tolerance(y, wide, short), _tolerance(Rounded.exact(0.0), wide, wide)


def conv_gradient_tolerance(
    dout: Array, arguments: dict[str, Any], dlast_state: Array = None
) -> CausalConv1dGradients:
    """Return how far each gradient of a right convolution may be off: a `Tolerance` where the argument is there.

    Parameters
    ----------
    dout : (batch, dim, seqlen)
    arguments : dict
        Keyword arguments of ``causal_conv1d``.
    dlast_state : (batch, dim, width - 1), optional

    Examples
    --------
    >>> one = np.ones((1, 1, 2))
    >>> conv_gradient_tolerance(one, dict(x=one, weight=one[0])).x.absolute.shape
    (1, 1, 2)
    """
    with np.errstate(all="ignore"):
        a, _, slope = _conv(arguments)
        dq = Rounded.exact(dout) * slope
        last = None if dlast_state is None else np.abs(np.asarray(dlast_state, np.float64))
        sizes = _absolute({**a, "activation": None})
        size = causal_conv1d.backward(dq.size, **sizes, dlast_state=last)
        error = causal_conv1d.backward(dq.error, **sizes)  # gradients are linear in dq
    wide = parameter_dtype(arguments["x"].dtype)
    terms = {"weight": dq.size.size, "bias": dq.size.size}
    return CausalConv1dGradients(*(
        None if s is None else _tolerance(
            Rounded(s, e + (2 + 2 * np.sqrt(terms.get(name, a["weight"].shape[1]))) * s), wide, arguments[name].dtype
        )
        for name, s, e in zip(size._fields, size, error, strict=True)
    ))
