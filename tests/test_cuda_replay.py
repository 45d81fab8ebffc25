"""The host code of a CUDA twin that is replayed does what it did: the same launches on the same memory."""

from __future__ import annotations

import sys
from typing import Any

import fake_cupy
import numpy as np
import pytest
from cases import ConvSpec, ScanSpec, conv_specs, cotangents, scan_specs
from hypothesis import given

from npmamba import selective_scan as public_scan
from npmamba import selective_scan_backward as public_backward
from npmamba.cuda import arrays, causal_conv1d, launch, machine, replay, selective_scan
from npmamba.cuda.device import Data, Size, Wide
from npmamba.cuda.stand_in import NotReplayable, StandIn

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


class Machine(machine.Loaded):
    """A kernel's machine code that notes what it is called with."""

    calls: list[Any] = []  # noqa: RUF012

    def __init__(self, specialization: launch.Specialization) -> None:
        self.device, self.name, self.shared = machine.current_device(), specialization.name, 2**30
        self.threads, self.real = (specialization.threads,), machine.wide_dtype(specialization.dtype).type
        self.describe(specialization.function)

    def function(self, grid: Any, threads: Any, arguments: Any, shared: int) -> None:
        self.calls.append((self.name, grid, threads, shared, list(arguments)))


@pytest.fixture(scope="module", autouse=True)
def a_device_that_only_listens() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", fake_cupy)
        patch.setattr(launch, "Loaded", Machine)
        patch.setattr(arrays, "_multiprocessors", lambda device: 132)
        for kernel in launch.declared():
            patch.setattr(kernel, "_loaded", {})
        replay.forget()
        yield
        replay.forget()


def launches(call: Any) -> tuple[list[Any], Any]:
    """Return the launches of a call, with addresses told by the allocation they lie in, and its results."""
    Machine.calls.clear()
    fake_cupy.cuda.allocated.clear()
    results = call()
    memory = [p for p in fake_cupy.cuda.allocated if p.memory.size > 16]

    def told(x: Any) -> Any:
        address = x
        if isinstance(x, fake_cupy.Array):
            address = x.data.ptr if x.size else 0
        if not isinstance(address, int):
            return address
        for k, p in enumerate(memory):
            if p.ptr <= address < p.memory.ctypes.data + p.memory.size:
                return "allocation", k, address - p.ptr
        return address

    calls = [(*call[:-1], [told(x) for x in call[-1]]) for call in Machine.calls]
    return calls, shapes(results, told)


def shapes(x: Any, told: Any) -> Any:
    """Return a tree of results with the places of its arrays."""
    if isinstance(x, fake_cupy.Array):
        return x.shape, x.strides, x.dtype, told(x) if x.size else None
    if isinstance(x, tuple):
        return type(x).__name__, [shapes(part, told) for part in x]
    return x


def both(case: dict[str, Any], save: bool) -> Any:
    """Call forward twice, its host code and its replay; return both and what was saved."""
    given_arrays = [None if case[name] is None else fake_cupy.array(case[name]) for name in NAMES]
    seq_idx = None if case["seq_idx"] is None else fake_cupy.array(case["seq_idx"])
    options = {q: case[q] for q in ("delta_softplus", "discretization", "reverse")}
    options |= {"seq_idx": seq_idx, "precise": False, "save": save}
    kept: list[Any] = []

    def run(forward: Any) -> Any:
        kept.append(forward(*given_arrays, **options))
        return kept[-1]

    slow = launches(lambda: run(selective_scan.forward.__wrapped__))
    fast = launches(lambda: run(selective_scan.forward))
    return slow, fast, kept[0][2]


def in_model_order(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case in the memory order that a model has: neighbours are channels, or states."""
    moved = {}
    for name in ("u", "delta", "z", "B", "C"):
        if case[name] is not None and case[name].ndim > 2:
            moved[name] = np.ascontiguousarray(case[name].swapaxes(-1, -2)).swapaxes(-1, -2)
    return case | moved


@given(scan_specs(dims=(1, 5, 48), lengths=(1, 3, 65, 2049), dstates=(1, 3, 16), max_elements=10**7))
def test_a_replay_launches_what_the_host_code_launches(spec: ScanSpec) -> None:
    case = spec.arguments(np.float32)
    case = in_model_order(case) if spec.seed % 4 else case
    slow, fast, saved = both(case, save=True)
    assert fast == slow
    dout, dlast = map(fake_cupy.array, cotangents(spec.seed, case["u"], spec.state_shape))
    slow = launches(lambda: selective_scan.backward.__wrapped__(dout, dlast, saved))
    fast = launches(lambda: selective_scan.backward(dout, dlast, saved))
    assert fast == slow


def agree(twin: Any, *arguments: Any, **options: Any) -> Any:
    """Assert that a twin and its replay launch the same; return what the twin returned."""
    kept: list[Any] = []

    def run(function: Any) -> Any:
        kept.append(function(*arguments, **options))
        return kept[-1]

    slow = launches(lambda: run(twin.__wrapped__))
    assert launches(lambda: run(twin)) == slow
    return kept[0]


def on_device(x: Any) -> Any:
    return None if x is None else fake_cupy.array(x)


@given(conv_specs(dims=(1, 5, 48), lengths=(1, 3, 65, 2049), widths=(1, 2, 4)))
def test_a_convolution_is_replayed(spec: ConvSpec) -> None:
    case = spec.arguments(np.float32)
    if spec.seed % 4:
        case["x"] = np.ascontiguousarray(case["x"].swapaxes(1, 2)).swapaxes(1, 2)
    given_arrays = [on_device(case[name]) for name in ("x", "weight", "bias", "initial_state")]
    options = {"activation": case["activation"], "reverse": case["reverse"], "seq_idx": on_device(case["seq_idx"])}
    _, last, saved = agree(causal_conv1d.forward, *given_arrays, **options, save=True)
    agree(causal_conv1d.backward, *map(on_device, cotangents(spec.seed, case["x"], spec.state_shape)), saved)
    agree(causal_conv1d.update, last, given_arrays[0][:, :, 0], *given_arrays[1:3], activation="silu")


def a_case(**options: Any) -> dict[str, Any]:
    return ScanSpec(2, 48, 65, 16, {"z": True, "D": True, **options}, 0).arguments(np.float32)


def test_memory_in_the_order_of_a_model_is_replayed() -> None:
    replay.forget()
    slow, fast, _ = both(in_model_order(a_case(seq_idx="padded")), save=False)
    assert fast == slow
    assert [plan is not None for plans in replay._REMEMBERED for plan in plans.values()] == [True]


def test_an_array_that_must_be_copied_is_not_replayed() -> None:
    case = a_case()  # B and C have neighbouring steps
    replay.forget()
    slow, fast, _ = both(case, save=False)
    assert len(fast[0]) == len(slow[0])
    assert [plan for plans in replay._REMEMBERED for plan in plans.values()] == [None]


@pytest.mark.parametrize(("is_by_channel", "replays"), [(True, True), (False, False)])
def test_weights_are_copied_only_for_the_kernels_that_read_them_by_16_bytes(is_by_channel, replays) -> None:
    x = fake_cupy.array(np.zeros((2, 16, 64), np.float32))
    x = x if is_by_channel else fake_cupy.array(np.zeros((2, 64, 16), np.float32)).swapaxes(1, 2)
    weight = fake_cupy.array(np.zeros(65, np.float32))[1:].reshape(16, 4)
    replay.forget()
    options = {"activation": "silu", "seq_idx": None, "reverse": False, "save": False}
    agree(causal_conv1d.forward, x, weight, None, None, **options)
    assert [plan is not None for plans in replay._REMEMBERED for plan in plans.values()] == [replays]


def test_halves_of_one_array_keep_their_own_places() -> None:
    """u and z overlap as spans of memory; the second call has them the other way round."""
    case = a_case()
    pair = fake_cupy.array(np.zeros((2, 65, 96), np.float32))
    halves = [pair[:, :, :48].swapaxes(1, 2), pair[:, :, 48:].swapaxes(1, 2)]
    maps = [fake_cupy.array(np.zeros((2, 65, 16), np.float32)).swapaxes(1, 2) for _ in "BC"]
    A, D = fake_cupy.array(case["A"]), fake_cupy.array(case["D"])
    options = {"delta_softplus": True, "discretization": "euler", "reverse": False, "seq_idx": None, "precise": False}
    for u, z in (halves, halves[::-1]):
        run = lambda forward: forward(u, u, A, *maps, D, z, None, None, **options, save=False)  # noqa: B023, E731
        slow = launches(lambda: run(selective_scan.forward.__wrapped__))  # noqa: B023
        assert launches(lambda: run(selective_scan.forward)) == slow  # noqa: B023


def test_a_call_like_one_before_is_not_checked_again_and_a_wrong_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays_ = {name: fake_cupy.array(x) for name, x in in_model_order(a_case()).items() if isinstance(x, np.ndarray)}
    for _ in range(2):
        assert public_scan(**arrays_, delta_softplus=True).shape == (2, 48, 65)
        with pytest.raises(TypeError, match="delta_softplus"):
            public_scan(**arrays_, delta_softplus=1)
        with pytest.raises(ValueError, match="A has dim=47"):
            public_scan(**arrays_ | {"A": arrays_["A"][1:]}, delta_softplus=True)
        with pytest.raises(TypeError, match="z is a numpy array"):
            public_scan(**arrays_ | {"z": arrays_["z"].view}, delta_softplus=True)
    monkeypatch.setattr(fake_cupy.cuda, "current", 1)
    with pytest.raises(ValueError, match="GPU 0, but the current GPU is 1"):
        public_scan(**arrays_, delta_softplus=True)


def test_gradients_of_a_call_like_one_before_are_asked_their_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays_ = {name: fake_cupy.array(x) for name, x in in_model_order(a_case()).items() if isinstance(x, np.ndarray)}
    dout = fake_cupy.array(np.zeros((2, 48, 65), np.float32))
    assert public_backward(dout, **arrays_).u.shape == (2, 48, 65)
    monkeypatch.setattr(sys.modules["npmamba.ops.selective_scan"], "_check_shapes", None)
    assert public_backward(dout, **arrays_).u.shape == (2, 48, 65)
    monkeypatch.setattr(fake_cupy.cuda, "current", 1)
    with pytest.raises(ValueError, match="GPU 0, but the current GPU is 1"):
        public_backward(dout, **arrays_)


def test_switched_off_all_host_code_runs_and_nothing_is_remembered() -> None:
    calls: list[int] = []

    @replay.replayed
    def twin(x: Any) -> Any:
        calls.append(1)
        return x

    x = fake_cupy.array(np.zeros(3, np.float32))
    with replay.switched_off():
        for _ in range(3):
            assert twin(x) is x
            assert twin.again((x,), {}) is None
    assert len(calls) == 3
    for _ in range(3):
        assert twin(x) is x
    assert len(calls) == 4
    assert twin.again((x,), {}) is x


def _scaled(real: Any) -> Any:
    def scaled(x: Data, factor: Wide, y: Data, n: Size) -> None:
        """No device runs it."""

    return scaled


def test_a_launch_on_an_array_of_the_host_codes_own_is_not_replayed() -> None:
    """Its memory is no argument and was not allocated on the way: the next call may find it elsewhere."""
    kernel = launch.Kernel(_scaled, threads=32)
    launch.KERNELS.remove(kernel)
    table: list[Any] = []

    @replay.replayed
    def twin(x: Any) -> Any:
        table[:] = [fake_cupy.array(np.ones(1, np.float32))]
        y = arrays.empty(x, x.shape, x.dtype)
        kernel.launch((1,), x.dtype, (x, table[0], y, x.size))
        return y

    x = fake_cupy.array(np.zeros(3, np.float32))
    for _ in range(3):
        Machine.calls.clear()
        assert twin(x).shape == (3,)
        ((*_, passed),) = Machine.calls
        assert passed[1] is table[0]
    assert twin.again((x,), {}) is None


def test_a_stand_in_gives_views_and_nothing_else() -> None:
    x = StandIn(None, 3, (2, 5, 4), (80, 16, 4), np.float32, address=40)
    assert (x[0].shape, x[0].offset, x[:, ::-1].offset) == ((5, 4), 0, 64)
    assert (x[1, 2, 3].shape, x[1, 2, 3].offset) == ((), 80 + 32 + 12)  # no number is read
    assert (x[..., 1].shape, x[..., 1].offset) == ((2, 5), 4)
    assert x.ptr % 16 == 8
    assert x.swapaxes(1, 2).strides == (80, 4, 16)
    assert x.reshape(-1, 4).shape == (10, 4)
    for wrong in (
        lambda: x.copy(),
        lambda: x.swapaxes(1, 2).reshape(-1),
        lambda: x.astype(np.float64),
        lambda: x.__setitem__(0, 1),
        lambda: x.sum(),
    ):
        with pytest.raises(NotReplayable):
            wrong()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LIMIT", 3)
    replay.forget()
    for seqlen in range(1, 9):
        both(ScanSpec(1, 5, seqlen, 3, {}, 0).arguments(np.float32), save=False)
        assert all(len(plans) <= 3 for plans in replay._REMEMBERED)
