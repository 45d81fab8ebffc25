"""What the words of `npmamba.cuda.device` become in LLVM: `npmamba.cuda.compile` puts these in their place.

Numbers narrower than the arithmetic lie in memory as their bits: a pointer to int16 is float16, to uint16 bfloat16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import TypingError
from numba.cuda.extending import intrinsic

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
HALF, BFLOAT = types.int16, types.uint16


def _number(element: Any) -> Any:
    """Return the type a number of memory type `element` is computed in."""
    return types.float32 if element in (HALF, BFLOAT) else element


def _element(p: Any) -> Any:
    return p.dtype


def _offset(builder: Any, i: Any, t: Any) -> Any:
    """Return an index as 64 bits. Numba makes uint64 of two uint32; taken back to 32 bits, so is all that led there."""
    if t == types.uint64:
        return builder.zext(builder.trunc(i, I32), I64)
    if t.bitwidth == 64:
        return i
    return builder.sext(i, I64) if t.signed else builder.zext(i, I64)


def _address(context: Any, builder: Any, ptype: Any, p: Any, itype: Any, i: Any) -> Any:
    base = p if isinstance(ptype, types.CPointer) else context.make_array(ptype)(context, builder, value=p).data
    return builder.gep(base, [_offset(builder, i, itype)])


def _assembly(builder: Any, text: str, constraints: str, result: Any, arguments: list[Any], effect: bool) -> Any:
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=effect), arguments)


def _widen(builder: Any, bits: Any, element: Any) -> Any:
    if element == HALF:
        return builder.fpext(builder.bitcast(bits, F16), F32)
    if element == BFLOAT:
        return builder.bitcast(builder.shl(builder.zext(bits, I32), ir.Constant(I32, 16)), F32)
    return bits


def _narrow(builder: Any, x: Any, element: Any) -> Any:
    if element == HALF:
        return _assembly(builder, "cvt.rn.f16.f32 $0, $1;", "=h,f", I16, [x], False)
    if element == BFLOAT:
        return _assembly(builder, "cvt.rn.bf16.f32 $0, $1;", "=h,f", I16, [x], False)
    return x


@intrinsic
def load(typingctx: Any, p: Any, i: Any) -> Any:
    element = _element(p)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        return _widen(builder, builder.load(address), element)

    return _number(element)(p, i), emit


@intrinsic
def store(typingctx: Any, p: Any, i: Any, value: Any) -> Any:
    element = _element(p)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        number = context.cast(builder, args[2], sig.args[2], _number(element))
        builder.store(_narrow(builder, number, element), address)
        return context.get_dummy_value()

    return types.void(p, i, value), emit


@intrinsic
def shift(typingctx: Any, p: Any, n: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _address(context, builder, sig.args[0], args[0], sig.args[1], args[1])

    return types.CPointer(p.dtype)(p, n), emit


@intrinsic
def follow(typingctx: Any, p: Any, address: Any, count: Any) -> Any:
    kind = types.CPointer(p.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = context.get_value_type(kind)
        there = builder.inttoptr(args[1], ir.PointerType(pointer.pointee, 1))  # global memory, and known to be
        return builder.addrspacecast(there, pointer)

    return kind(p, types.int64, count), emit


def _vectors(builder: Any, address: Any, element: Any, count: int) -> tuple[Any, Any, int]:
    """Return the address as one of vectors of up to 16 bytes, the type of the elements, and how many vectors."""
    size = count * element.bitwidth // 8
    words = ir.VectorType(I32, min(size, 16) // 4)
    return builder.bitcast(address, words.as_pointer()), words, max(1, size // 16)


def _halves(builder: Any, word: Any, element: Any) -> list[Any]:
    """Return the two float16 or bfloat16 numbers of a 32-bit word as float32."""
    if element == BFLOAT:
        low, high = builder.shl(word, ir.Constant(I32, 16)), builder.and_(word, ir.Constant(I32, 0xFFFF0000))
        return [builder.bitcast(low, F32), builder.bitcast(high, F32)]
    pair = _assembly(builder, "mov.b32 {$0, $1}, $2;", "=h,=h,r", ir.LiteralStructType([I16, I16]), [word], False)
    return [_widen(builder, builder.extract_value(pair, k), element) for k in range(2)]


def _unpack(builder: Any, value: Any, element: Any) -> list[Any]:
    """Return the numbers of a vector of 32-bit words.

    Halves are taken out of their words: from a vector of 16-bit numbers LLVM would make two accesses of 8 bytes.
    """
    if element in (HALF, BFLOAT):
        taken = [builder.extract_element(value, ir.Constant(I32, k)) for k in range(value.type.count)]
        return [x for word in taken for x in _halves(builder, word, element)]
    kind = {types.float32: F32, types.float64: F64}[element]
    count = value.type.count * 32 // element.bitwidth
    value = builder.bitcast(value, ir.VectorType(kind, count))
    return [builder.extract_element(value, ir.Constant(I32, k)) for k in range(count)]


def _pack(builder: Any, numbers: list[Any], element: Any, words: Any) -> Any:
    """Return numbers as a vector of 32-bit words; two halves are rounded by one instruction."""
    if element in (HALF, BFLOAT):
        text = f"cvt.rn.{'f16' if element == HALF else 'bf16'}x2.f32 $0, $2, $1;"
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        numbers = [_assembly(builder, text, "=r,f,f", I32, list(pair), False) for pair in pairs]
    vector = ir.Constant(ir.VectorType(numbers[0].type, len(numbers)), ir.Undefined)
    for k, x in enumerate(numbers):
        vector = builder.insert_element(vector, x, ir.Constant(I32, k))
    return builder.bitcast(vector, words)


def _vector_load(count: int) -> Any:
    @intrinsic
    def load_vector(typingctx: Any, p: Any, i: Any) -> Any:
        element = _element(p)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = _address(context, builder, sig.args[0], args[0], sig.args[1], args[1])
            address, words, parts = _vectors(builder, address, element, count)
            numbers = []
            for part in range(parts):
                value = builder.load(builder.gep(address, [ir.Constant(I32, part)]))
                value.align = 4 * words.count
                numbers += _unpack(builder, value, element)
            return context.make_tuple(builder, sig.return_type, numbers)

        return types.UniTuple(_number(element), count)(p, i), emit

    return load_vector


def _vector_store(count: int) -> Any:
    @intrinsic
    def store_vector(typingctx: Any, p: Any, i: Any, values: Any) -> Any:
        element = _element(p)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = _address(context, builder, sig.args[0], args[0], sig.args[1], args[1])
            address, words, parts = _vectors(builder, address, element, count)
            per = count // parts
            for part in range(parts):
                numbers = [builder.extract_value(args[2], part * per + k) for k in range(per)]
                vector = _pack(builder, numbers, element, words)
                write = builder.store(vector, builder.gep(address, [ir.Constant(I32, part)]))
                write.align = 4 * words.count
            return context.get_dummy_value()

        return types.void(p, i, values), emit

    return store_vector


def _fetch(count: int) -> Any:
    letters, words = ", ".join(f"${k}" for k in range(count)), ir.LiteralStructType([I32] * count)
    zeros = "".join(f" mov.b32 ${k}, 0;" for k in range(count))
    text = (
        f"{{ .reg .pred here; setp.ne.u32 here, ${count + 1}, 0;{zeros}"
        f" @here ld.global.v{count}.b32 {{{letters}}}, [${count}]; }}"
    )

    @intrinsic
    def fetch(typingctx: Any, p: Any, i: Any, valid: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = _address(context, builder, sig.args[0], args[0], sig.args[1], args[1])
            there = builder.ptrtoint(builder.addrspacecast(address, ir.PointerType(address.type.pointee, 1)), I64)
            here = builder.zext(args[2], I32)
            found = _assembly(builder, text, "=&r," * count + "l,r", words, [there, here], True)
            return context.make_tuple(builder, sig.return_type, [builder.extract_value(found, k) for k in range(count)])

        return types.UniTuple(types.uint32, count)(p, i, valid), emit

    return fetch


@intrinsic
def unpacked(typingctx: Any, p: Any, words: Any) -> Any:
    element, count = _element(p), words.count

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.Constant(ir.VectorType(I32, count), ir.Undefined)
        for k in range(count):
            vector = builder.insert_element(vector, builder.extract_value(args[1], k), ir.Constant(I32, k))
        return context.make_tuple(builder, sig.return_type, _unpack(builder, vector, element))

    return types.UniTuple(_number(element), count * 32 // element.bitwidth)(p, words), emit


@intrinsic
def copy_async(typingctx: Any, shared: Any, i: Any, p: Any, j: Any, valid: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to = _address(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        here = builder.ptrtoint(builder.addrspacecast(to, ir.PointerType(to.type.pointee, 3)), I32)
        source = _address(context, builder, sig.args[2], args[2], sig.args[3], args[3])
        there = builder.ptrtoint(source, I64)
        size = builder.select(args[4], ir.Constant(I32, 16), ir.Constant(I32, 0))
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        _assembly(builder, text, "r,l,r,~{memory}", ir.VoidType(), [here, there, size], True)
        return context.get_dummy_value()

    return types.void(shared, i, p, j, valid), emit


@intrinsic
def commit_async(typingctx: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _assembly(builder, "cp.async.commit_group;", "~{memory}", ir.VoidType(), [], True)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def wait_async(typingctx: Any, pending: Any) -> Any:
    if not isinstance(pending, types.IntegerLiteral):
        return None
    groups = pending.literal_value

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _assembly(builder, f"cp.async.wait_group {groups};", "~{memory}", ir.VoidType(), [], True)
        return context.get_dummy_value()

    return types.void(pending), emit


wait_async._prefer_literal = True


@intrinsic
def cast(typingctx: Any, c: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[0], sig.args[0], sig.return_type)

    return x(c, x), emit


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fma(*args)

    return x(x, y, z), emit


@intrinsic
def select(typingctx: Any, condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, types.Boolean):
        raise TypingError(f"select: chooses by a bool, not by {condition}")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(args[0], args[1], args[2])

    return x(condition, x, y), emit


def _float32(text: str) -> Any:
    """Return an intrinsic of one float32 argument that is the PTX instruction `text`."""

    @intrinsic
    def instruction(typingctx: Any, x: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _assembly(builder, f"{text} $0, $1;", "=f,f", F32, list(args), False)

        return types.float32(types.float32), emit

    return instruction


@intrinsic
def double(typingctx: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sig.args[0] == types.float64:
            return args[0]
        return _assembly(builder, "cvt.f64.f32 $0, $1;", "=d,f", F64, list(args), False)  # LLVM's own says .ftz

    return types.float64(x), emit


exp2_float32 = _float32("ex2.approx.ftz.f32")
log2_float32 = _float32("lg2.approx.ftz.f32")
rcp_float32 = _float32("rcp.approx.ftz.f32")
sqrt_float32 = _float32("sqrt.rn.f32")

load2, load4, load8 = (_vector_load(n) for n in (2, 4, 8))
store2, store4, store8 = (_vector_store(n) for n in (2, 4, 8))
fetch2, fetch4 = (_fetch(n) for n in (2, 4))
