"""A vector of channels as a Numba type: the loops of the CPU kernels read like scalar code and run in SIMD registers.

`load` reads a vector of `LANES` neighbouring numbers, ``+ - * /`` and the primitives of `npmamba.scalar` work on it
lane by lane, `store` writes it back. Both take a count, so that the last channels need no second loop. With the
compiler switched off (``NUMBA_DISABLE_JIT=1``) the same kernels run on short NumPy arrays; with ``NUMBA_BOUNDSCHECK=1``
a place outside its array is an IndexError, for vectors as for numbers.

Why a type of our own: LLVM cannot prove that the arrays of a scan do not overlap, so it does not vectorize its loops,
and `math.exp` stays a scalar call. The polynomials are minimax fits (relative error at most 1.1e-7 for `exp2`,
2e-9 for the others before rounding); float64 calls the C library lane by lane, for it serves as the yardstick.
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, overload, register_model
from numba.np.arrayobj import populate_array

from npmamba import scalar
from npmamba.scalar import (
    cast,
    divide,
    exp,
    exp2,
    exp2_product,
    exp2_product_small,
    exp2m1,
    expm1,
    fma,
    is_double,
    log1p,
    magnitude,
    select,
    sqrt,
)


def _host_has_avx512() -> bool:
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # a platform whose features LLVM cannot tell
        return False
    return bool(features.get("avx512f") and features.get("avx512dq"))


AVX512 = _host_has_avx512()
BYTES = 64 if AVX512 else 32
LANES = {np.dtype(np.float32): BYTES // 4, np.dtype(np.float64): BYTES // 8}
I32 = ir.IntType(32)


class VectorType(types.Type):
    """Numba type of a vector of `lanes` numbers (or, for `types.boolean`, of a mask)."""

    def __init__(self, dtype: types.Type, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")


VECTORS = {t: VectorType(t, BYTES * 8 // t.bitwidth) for t in (types.float32, types.float64)}
MASKS = {v.lanes: VectorType(types.boolean, v.lanes) for v in VECTORS.values()}
_ELEMENT = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: ir.IntType(1)}


def _llvm_type(t: Any) -> ir.Type:
    return ir.VectorType(_ELEMENT[t.dtype], t.lanes) if isinstance(t, VectorType) else _ELEMENT[t]


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, _llvm_type(fe_type))


def _is_number(t: Any) -> bool:
    return isinstance(t, VectorType | types.Float)


def _mask_of(t: Any) -> Any:
    return MASKS[t.lanes] if isinstance(t, VectorType) else types.boolean


def _define(function: Any, result: Any, emit: Any) -> None:
    """Make Numba compile a call of `function` by `emit(context, builder, sig, args)`.

    ``result(*types)`` is the type of the result, or None where `function` is not ours for these types. This is what
    `numba.extending.overload` does, without compiling a small function for every combination of types.
    """

    class _Template(AbstractTemplate):
        key = function

        def generic(self, args, kws):
            answer = None if kws else result(*args)
            return None if answer is None else signature(answer, *args)

    infer_global(function, types.Function(_Template))
    lower_builtin(function, types.VarArg(types.Any))(emit)


def _splat(builder: ir.IRBuilder, x: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(x.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, x, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _suffix(t: Any) -> str:
    """Return how LLVM's intrinsics name `t`: f32, or v16f32."""
    bits = (t.dtype if isinstance(t, VectorType) else t).bitwidth
    return f"v{t.lanes}f{bits}" if isinstance(t, VectorType) else f"f{bits}"


# --- memory ---


def width(a: np.ndarray) -> int:
    """Return how many lanes a vector of `a`'s numbers has."""
    return LANES[a.dtype]


def load(a: np.ndarray, index: tuple[int, ...], count: int | None = None) -> Any:
    """Read a vector that starts at ``a[index]`` along the last axis; lanes from `count` on are 0 and not read."""
    lanes = LANES[a.dtype]
    count = lanes if count is None else max(0, min(count, lanes))
    vector = np.zeros(lanes, a.dtype)
    vector[:count] = a[index[:-1]][index[-1] : index[-1] + count]
    return vector


def store(a: np.ndarray, index: tuple[int, ...], value: Any, count: int | None = None) -> None:
    """Write a vector at ``a[index]`` along the last axis; lanes from `count` on are left alone."""
    lanes = LANES[a.dtype]
    count = lanes if count is None else max(0, min(count, lanes))
    a[index[:-1]][index[-1] : index[-1] + count] = value[:count]


def accumulate(a: np.ndarray, index: tuple[int, ...], value: Any) -> None:
    """Add a vector to the float64 array `a` at ``a[index]`` along the last axis."""
    a[index[:-1]][index[-1] : index[-1] + len(value)] += value


def pick(a: np.ndarray, i: Any) -> Any:
    """Read ``a[i]``, with `i` taken as it is: a tuple, or an int if `a` is one-dimensional and C-contiguous."""
    return a[i]


def anchored(a: np.ndarray, i: int) -> np.ndarray:
    """Return ``a[i:]`` of a one-dimensional, C-contiguous array, its address kept in one register.

    What lies a constant distance from there is read without an index; an index costs an instruction its fusion with the
    load, and a loop that is full of them a tenth of its speed.
    """
    return a[i:]


def prefetch(a: np.ndarray, index: tuple[int, ...]) -> None:
    """Ask for the cache line of ``a[index]`` in the second-level cache; the index need not lie inside the array."""


def prefetch_near(a: np.ndarray, index: tuple[int, ...]) -> None:
    """Ask for the cache line of ``a[index]`` in the first-level cache, which is small: for what comes next."""


def apart() -> None:
    """Keep the function that calls this out of its callers, so that its loop need not share registers with theirs."""


def total(x: Any) -> Any:
    """Return the sum over the lanes, always in the same order: halves are folded until one is left."""
    while x.shape[0] > 1:
        x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
    return x[0]


def any_lane(mask: Any) -> bool:
    """Tell whether a comparison of vectors holds in any lane."""
    return bool(np.any(mask))


def _pointer(
    context: Any, builder: ir.IRBuilder, sig: Any, args: Any, count: ir.Value | int = 0, vector: bool = True
) -> ir.Value:
    """Return the address of ``a[index]``, from which `count` numbers are read or written.

    The numbers of a vector lie side by side, so the last stride is known and costs no multiplication.
    """
    array_type, index_type = sig.args[:2]
    struct = context.make_array(array_type)(context, builder, args[0])
    indices = [
        context.cast(builder, index, t, types.intp)
        for index, t in zip(cgutils.unpack_tuple(builder, args[1]), index_type, strict=True)
    ]
    if context.enable_boundscheck:
        count = context.get_constant(types.intp, count) if isinstance(count, int) else count
        _check_place(context, builder, cgutils.unpack_tuple(builder, struct.shape), indices, count)
    shape, strides = (cgutils.unpack_tuple(builder, x) for x in (struct.shape, struct.strides))
    if vector:
        strides[-1] = context.get_constant(types.intp, array_type.dtype.bitwidth // 8)
    layout = array_type.layout
    return cgutils.get_item_pointer2(context, builder, struct.data, shape, strides, layout, indices, wraparound=False)


def _check_place(context: Any, builder: ir.IRBuilder, shape: list[ir.Value], indices: Any, count: ir.Value) -> None:
    """Raise an IndexError unless `count` numbers from `indices` on lie in one row; only for ``NUMBA_BOUNDSCHECK=1``."""
    with builder.if_then(builder.icmp_signed(">", count, count.type(0))):
        last = builder.add(indices[-1], builder.sub(count, count.type(1)))
        for index, length in zip([*indices, last], [*shape, shape[-1]], strict=True):
            cgutils.do_boundscheck(context, builder, index, length)


def _up_to(context: Any, builder: ir.IRBuilder, count: ir.Value, count_type: Any, lanes: int) -> ir.Value:
    """Return the smaller one of `count` and `lanes`, as an intp."""
    count = context.cast(builder, count, count_type, types.intp)
    most = context.get_constant(types.intp, lanes)
    return builder.select(builder.icmp_signed("<", count, most), count, most)


def _is_place(a: Any, index: Any) -> bool:
    return isinstance(a, types.Array) and isinstance(index, types.BaseTuple) and len(index) == a.ndim


def _lane_mask(context: Any, builder: ir.IRBuilder, count: ir.Value, count_type: Any, lanes: int) -> ir.Value:
    index = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    count = context.cast(builder, count, count_type, types.int32)
    return builder.icmp_signed("<", index, _splat(builder, count, lanes))


def _emit_load(context, builder, sig, args):
    vector = _llvm_type(sig.return_type)
    align, lanes = sig.args[0].dtype.bitwidth // 8, sig.return_type.lanes
    count = lanes if len(args) == 2 else _up_to(context, builder, args[2], sig.args[2], lanes)
    pointer = builder.bitcast(_pointer(context, builder, sig, args, count), vector.as_pointer())
    if len(args) == 2:
        return builder.load(pointer, align=align)
    mask = _lane_mask(context, builder, args[2], sig.args[2], lanes)
    operands = [pointer, ir.Constant(I32, align), mask, ir.Constant(vector, None)]
    return _call(builder, f"llvm.masked.load.{_suffix(sig.return_type)}.p0", vector, operands)


def _emit_store(context, builder, sig, args):
    vector = sig.args[2]
    align, lanes = sig.args[0].dtype.bitwidth // 8, vector.lanes
    count = lanes if len(args) == 3 else _up_to(context, builder, args[3], sig.args[3], lanes)
    pointer = builder.bitcast(_pointer(context, builder, sig, args, count), _llvm_type(vector).as_pointer())
    if len(args) == 3:
        builder.store(args[2], pointer, align=align)
    else:
        mask = _lane_mask(context, builder, args[3], sig.args[3], lanes)
        operands = [args[2], pointer, ir.Constant(I32, align), mask]
        _call(builder, f"llvm.masked.store.{_suffix(vector)}.p0", ir.VoidType(), operands)
    return context.get_dummy_value()


def _emit_accumulate(context, builder, sig, args):
    wide = ir.VectorType(ir.DoubleType(), sig.args[2].lanes)
    pointer = builder.bitcast(_pointer(context, builder, sig, args, wide.count), wide.as_pointer())
    value = args[2] if args[2].type == wide else builder.fpext(args[2], wide)
    builder.store(builder.fadd(builder.load(pointer, align=8), value), pointer, align=8)
    return context.get_dummy_value()


def _accumulate_result(a, index, value):
    fits = _is_place(a, index) and a.mutable and a.dtype == types.float64 and isinstance(value, VectorType)
    return types.none if fits else None


def _emit_pick(context, builder, sig, args):
    if isinstance(sig.args[1], types.BaseTuple):
        return builder.load(_pointer(context, builder, sig, args, 1, vector=False))
    struct = context.make_array(sig.args[0])(context, builder, args[0])
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    if context.enable_boundscheck:
        cgutils.do_boundscheck(context, builder, index, builder.extract_value(struct.shape, 0))
    return builder.load(builder.gep(struct.data, [index]))


def _is_line(a: Any) -> bool:
    return isinstance(a, types.Array) and a.ndim == 1 and a.layout == "C"


def _pick_result(a, i):
    return a.dtype if _is_place(a, i) or _is_line(a) else None


def _emit_anchored(context, builder, sig, args):
    source = context.make_array(sig.args[0])(context, builder, args[0])
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    whole = builder.extract_value(source.shape, 0)
    if context.enable_boundscheck:
        cgutils.do_boundscheck(context, builder, index, builder.add(whole, whole.type(1)))
    start = builder.gep(source.data, [index])
    identity = ir.FunctionType(start.type, [start.type])
    start = builder.asm(identity, "", "=r,0", [start], False)  # no instruction; what comes out is opaque to LLVM
    view = context.make_array(sig.return_type)(context, builder)
    itemsize = context.get_constant(types.intp, sig.args[0].dtype.bitwidth // 8)
    length = builder.sub(whole, index)
    populate_array(view, start, [length], [itemsize], itemsize, meminfo=None)  # borrowed: the view owns nothing
    return view._getvalue()


def _store_result(a, index, value, count=None):
    if not _is_place(a, index):
        return None
    if not a.mutable or value != VECTORS.get(a.dtype):
        raise TypingError(f"store: cannot write {value} to {a}")
    return types.none


def _emit_prefetch(locality: int) -> Any:
    def emit(context, builder, sig, args):
        pointer = builder.bitcast(_pointer(context, builder, sig, args), ir.IntType(8).as_pointer())
        flags = [ir.Constant(I32, k) for k in (0, locality, 1)]  # to be read; 3 is near, 2 a level away; data
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])
        return context.get_dummy_value()

    return emit


def _emit_apart(context, builder, sig, args):
    builder.function.attributes.add("noinline")
    return context.get_dummy_value()


def _emit_total(context, builder, sig, args):
    v, lanes = args[0], sig.args[0].lanes
    while lanes > 1:
        lanes //= 2
        halves = (range(lanes), range(lanes, 2 * lanes))
        picks = [ir.Constant(ir.VectorType(I32, lanes), list(half)) for half in halves]
        v = builder.fadd(*(builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), pick) for pick in picks))
    return builder.extract_element(v, ir.Constant(I32, 0))


def _emit_any_lane(context, builder, sig, args):
    bits = builder.bitcast(args[0], ir.IntType(sig.args[0].lanes))
    return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


def _emit_width(context, builder, sig, args):
    return context.get_constant(types.intp, VECTORS[sig.args[0].dtype].lanes)


_define(width, lambda a: types.intp, _emit_width)
_define(load, lambda a, index, count=None: VECTORS[a.dtype] if _is_place(a, index) else None, _emit_load)
_define(store, _store_result, _emit_store)
_define(accumulate, _accumulate_result, _emit_accumulate)
_define(pick, _pick_result, _emit_pick)
_define(anchored, lambda a, i: a if _is_line(a) else None, _emit_anchored)
for _prefetch, _locality in ((prefetch, 2), (prefetch_near, 3)):
    _define(_prefetch, lambda a, index: types.none if _is_place(a, index) else None, _emit_prefetch(_locality))
_define(apart, lambda: types.none, _emit_apart)
_define(any_lane, lambda mask: types.boolean, _emit_any_lane)
_define(total, lambda x: x.dtype, _emit_total)


# --- arithmetic and comparisons ---


def _same_vectors(x: Any, y: Any) -> bool:
    return isinstance(x, VectorType) and x == y


def _arithmetic(operator_: Any, instruction: str) -> None:
    def emit(context, builder, sig, args):
        return getattr(builder, instruction)(*args)

    _define(operator_, lambda x, y=None: x if _same_vectors(x, y) else None, emit)


def _comparison(operator_: Any, symbol: str) -> None:
    def emit(context, builder, sig, args):
        compare = builder.fcmp_unordered if symbol == "!=" else builder.fcmp_ordered
        return compare(symbol, *args)

    _define(operator_, lambda x, y: _mask_of(x) if _same_vectors(x, y) else None, emit)


for _op, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _arithmetic(_op, _name)
for _op, _name in ((operator.and_, "and_"), (operator.or_, "or_")):
    _arithmetic(_op, _name)
for _op, _name in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _comparison(_op, _name)
_define(
    operator.neg,
    lambda x: x if isinstance(x, VectorType) else None,
    lambda context, builder, sig, args: builder.fneg(args[0]),
)


# --- the primitives of npmamba.scalar, for vectors and for scalar floats alike ---


def _emit_cast(context, builder, sig, args):
    x = sig.return_type
    if sig.args[0] == x:
        return args[0]
    number = context.cast(builder, args[0], sig.args[0], getattr(x, "dtype", x))
    return _splat(builder, number, x.lanes) if isinstance(x, VectorType) else number


def _emit_fma(context, builder, sig, args):
    return _call(builder, f"llvm.fma.{_suffix(sig.return_type)}", _llvm_type(sig.return_type), list(args))


def _emit_magnitude(context, builder, sig, args):
    return _call(builder, f"llvm.fabs.{_suffix(sig.return_type)}", _llvm_type(sig.return_type), list(args))


def _emit_sqrt(context, builder, sig, args):
    return _call(builder, f"llvm.sqrt.{_suffix(sig.return_type)}", _llvm_type(sig.return_type), list(args))


def _add_exponent(x: Any, shifted: Any) -> Any:
    """Multiply the float32 `x` by 2^k, where `shifted` is k + 1.5 * 2^23: its low bits are k's."""
    return (np.asarray(x).view(np.int32) + (np.asarray(shifted).view(np.int32) << 23)).view(np.float32)[()]


def _emit_add_exponent(context, builder, sig, args):
    x = sig.return_type
    integer = ir.VectorType(I32, x.lanes) if isinstance(x, VectorType) else I32
    places = ir.Constant(integer, [23] * x.lanes if isinstance(x, VectorType) else 23)
    exponent = builder.shl(builder.bitcast(args[1], integer), places)
    return builder.bitcast(builder.add(builder.bitcast(args[0], integer), exponent), _llvm_type(x))


def _fraction(x: Any) -> Any:
    """Return ``x - floor(x)``, 0 where `x` is infinite: one instruction of AVX-512."""
    raise NotImplementedError("only compiled code for AVX-512 calls this")


def _times_power(x: Any, y: Any) -> Any:
    """Return ``x 2^floor(y)``, which may overflow to infinity or vanish: one instruction of AVX-512."""
    raise NotImplementedError("only compiled code for AVX-512 calls this")


def _emit_avx512(name: str, *immediate: int) -> Any:
    """Return what emits AVX-512's instruction `name` on float32 for every lane, rounding as is the rule."""

    def emit(context, builder, sig, args):
        vector = _llvm_type(sig.return_type)
        every, rounding = ir.Constant(ir.IntType(16), -1), ir.Constant(I32, 4)
        numbers = [ir.Constant(I32, i) for i in immediate]
        operands = [*args, *numbers, ir.Constant(vector, ir.Undefined), every, rounding]
        return _call(builder, f"llvm.x86.avx512.mask.{name}.ps.512", vector, operands)

    return emit


_define(cast, lambda c, x: x if _is_number(x) else None, _emit_cast)
_define(fma, lambda x, y, z: x if _is_number(x) and x == y == z else None, _emit_fma)
_define(sqrt, lambda x: x if _is_number(x) else None, _emit_sqrt)
_define(magnitude, lambda x: x if _is_number(x) else None, _emit_magnitude)
_define(
    divide,
    lambda x, y: x if _is_number(x) and x == y else None,
    lambda context, builder, sig, args: builder.fdiv(*args),
)
_define(
    select,
    lambda condition, x, y: x if _is_number(x) and x == y and condition == _mask_of(x) else None,
    lambda context, builder, sig, args: builder.select(*args),
)
_define(_add_exponent, lambda x, shifted: x, _emit_add_exponent)
_define(_fraction, lambda x: x, _emit_avx512("reduce", 1))  # 1: what is taken off is rounded down
_define(_times_power, lambda x, y: x, _emit_avx512("scalef"))


def _libm(name: str) -> Any:
    """Return a function that calls the C library's float64 function `name` on every lane."""

    def emit(context, builder, sig, args):
        x = sig.return_type
        if not isinstance(x, VectorType):
            return _call(builder, name, ir.DoubleType(), list(args))
        result = ir.Constant(_llvm_type(x), ir.Undefined)
        for lane in range(x.lanes):
            one = builder.extract_element(args[0], ir.Constant(I32, lane))
            one = _call(builder, name, ir.DoubleType(), [one])
            result = builder.insert_element(result, one, ir.Constant(I32, lane))
        return result

    def call(x):
        raise NotImplementedError("only compiled code calls the C library directly")

    _define(call, lambda x: x, emit)
    return call


def _is_float64(x: Any) -> bool:
    return (x.dtype if isinstance(x, VectorType) else x) == types.float64


@overload(is_double, inline="always")
def _is_double(x):
    if not _is_number(x):
        return None
    return (lambda x: True) if _is_float64(x) else (lambda x: False)


@overload(exp2m1, jit_options={"forceinline": True})
def _exp2m1(x):
    return (lambda x: scalar.exp2m1_series(x)) if _is_number(x) else None


_LIBM = {name: _libm(name) for name in ("exp2", "exp", "expm1", "log1p")}
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds a float32 to an integer and leaves that in the low bits
_START = 217 / 4096  # its sums with whole numbers are exact, and 2^-_START is close to a float32
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06  # their sum is ln 2, the first one has 16 bits


@scalar.formula
def _exp2_polynomial(g):
    p = fma(cast(0.0013300616992637515, g), g, cast(0.009669693186879158, g))
    p = fma(p, g, cast(0.05550558492541313, g))
    p = fma(p, g, cast(0.24022282660007477, g))
    p = fma(p, g, cast(0.6931471824645996, g))
    return fma(p, g, cast(1, g))


@scalar.formula
def _exp2_product_small_float32(x, y):
    shifted = fma(x, y, cast(_ROUND, x))
    g = fma(x, y, cast(_ROUND, x) - shifted)
    return _add_exponent(_exp2_polynomial(g), shifted)


@scalar.formula
def _exp2_product_float32(x, y):
    power, exponent = _exp2_product_small_float32(x, y), x * y
    low = select(exponent < cast(0, x), cast(0, x), exponent)  # as in `_exp2_float32`, a NaN comes out as it went in
    power = select(exponent >= cast(-126, x), power, low)
    return select(exponent >= cast(128, x), cast(np.inf, x), power)


@scalar.formula
def _exp2_product_avx512(x, y):
    """The same in eight instructions. The fraction of a sum s has no sign, so the smallest decays, just below 2^0, come
    out of a small fraction only if s = x y + _START; there the polynomial is 1 with slope ln 2. No s needs a check."""
    s = fma(x, y, cast(_START, x))
    g = _fraction(s)
    p = fma(cast(0.0017905590357258916, g), g, cast(0.00871441699564457, g))
    p = fma(p, g, cast(0.0537695437669754, g))
    p = fma(p, g, cast(0.23151054978370667, g))
    p = fma(p, g, cast(0.668159008026123, g))
    return _times_power(fma(p, g, cast(0.9639440774917603, g)), s)


@scalar.formula
def _exp2_float32(x):
    # 2^x = 2^k 2^g with |g| <= 1/2; the linear coefficient is ln 2 itself, so a slow decay keeps its time constant.
    # A NaN fails both comparisons, and comes out as it went in.
    bounded = select(x > cast(128, x), cast(128, x), x)
    shifted = bounded + cast(_ROUND, x)
    g = bounded - (shifted - cast(_ROUND, x))
    low = select(bounded < cast(0, x), cast(0, x), bounded)
    return select(bounded >= cast(-126, x), _add_exponent(_exp2_polynomial(g), shifted), low)


@scalar.formula
def _split_exponent(x):
    """x = k ln 2 + g with |g| <= ln(2) / 2; k comes as k + 1.5 * 2^23."""
    shifted = fma(x, cast(_LOG2E, x), cast(_ROUND, x))
    k = shifted - cast(_ROUND, x)
    return shifted, fma(k, cast(-_LN2_LOW, x), fma(k, cast(-_LN2_HIGH, x), x))


@scalar.formula
def _expm1_near_zero(g):
    """e^g - 1 for |g| <= ln(2) / 2"""
    p = fma(cast(0.00019829881784971803, g), g, cast(0.0013940406497567892, g))
    p = fma(p, g, cast(0.008333416655659676, g))
    p = fma(p, g, cast(0.041666366159915924, g))
    p = fma(p, g, cast(0.1666666567325592, g))
    p = fma(p, g, cast(0.5, g))
    return fma(p * g, g, g)


@scalar.formula
def _bound(x):
    """x between -87.3 and 88.8 (NaN stays): beyond, e^x is taken as 0 or infinite in float32."""
    upper = select(x > cast(88.8, x), cast(88.8, x), x)
    return select(upper < cast(-87.3, x), cast(-87.3, x), upper)


@scalar.formula
def _exp_float32(x):
    shifted, g = _split_exponent(_bound(x))
    e = _add_exponent(_expm1_near_zero(g) + cast(1, x), shifted)
    e = select(x > cast(88.72283, x), cast(np.inf, x), select(x < cast(-87.3, x), cast(0, x), e))
    return select(x != x, x, e)  # the bits of some NaNs would be shifted into the exponent


@scalar.formula
def _expm1_float32(x):
    shifted, g = _split_exponent(_bound(x))
    half = _add_exponent(cast(0.5, x), shifted)  # half the power: the largest power, 2^128, is no float32
    e = fma(_expm1_near_zero(g), half, half - cast(0.5, x))
    e = select(x > cast(88.72283, x), cast(np.inf, x), e + e)
    return select(x != x, x, e)


_FLOAT32 = {
    "exp2": _exp2_float32, "exp": _exp_float32, "expm1": _expm1_float32, "log1p": scalar.log1p_polynomial,
}  # fmt: skip


def _overload_elementary(primitive: Any, name: str) -> None:
    short, libm = _FLOAT32[name], _LIBM[name]

    @overload(primitive, jit_options={"forceinline": True})
    def implementation(x):
        if not _is_number(x):
            return None
        element = x.dtype if isinstance(x, VectorType) else x
        return (lambda x: short(x)) if element == types.float32 else (lambda x: libm(x))


for _primitive in (exp2, exp, expm1, log1p):
    _overload_elementary(_primitive, _primitive.__name__)


def _overload_product(primitive: Any, short: Any) -> None:
    libm = _LIBM["exp2"]

    @overload(primitive, jit_options={"forceinline": True})
    def implementation(x, y):
        if not _is_number(x) or x != y:
            return None
        if AVX512 and x == VECTORS[types.float32]:
            return lambda x, y: _exp2_product_avx512(x, y)
        element = x.dtype if isinstance(x, VectorType) else x
        return (lambda x, y: short(x, y)) if element == types.float32 else (lambda x, y: libm(x * y))


_overload_product(exp2_product, _exp2_product_float32)
_overload_product(exp2_product_small, _exp2_product_small_float32)
