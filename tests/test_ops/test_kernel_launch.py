"""What reaches the GPU when a kernel is launched again without asking Triton."""
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from test_scan_triton import compiles

from mmgroupmamba.ops import around_scan_triton, scan_triton

launching = import_module('mmgroupmamba.ops.kernel_launch')


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """And Triton's kernels are entered by their door, which the stand-ins have."""
    monkeypatch.setattr(launching, '_known', {})
    monkeypatch.setattr(launching, '_TRITON', 'none')


class Kernel:
    """Stands for a ``triton.jit`` function with the signature (x, y, n, STEP, REVERSE)."""
    arg_names = ['x', 'y', 'n', 'STEP', 'REVERSE']

    def __init__(self, interpreted=False):
        self.interpreted, self.asked, self.launched = interpreted, 0, []

    def __getitem__(self, grid):

        def ask(*args, STEP, REVERSE):
            self.asked += 1
            self.launched.append((grid, *args, STEP, REVERSE))
            return None if self.interpreted else Compiled(self.asked, self.launched)

        return ask


class Compiled:
    """Stands for what Triton found when it was asked for the given time."""

    def __init__(self, number, launched):
        self.number, self.launched = number, launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((self.number, grid, *args))


def launch(kernel, x, y=None, n=3, step=8, reverse=False, programs=5):
    # by name, and not in the kernel's order
    launching.launch(kernel, programs, (x, y), (n, ), REVERSE=reverse, STEP=step)


def test_again_it_is_the_compiled_kernel_with_all_arguments_in_order():
    kernel, x, other = Kernel(), torch.zeros(4), torch.ones(4)
    launch(kernel, x)
    launch(kernel, other, programs=6)
    assert kernel.asked == 1
    assert kernel.launched == [((5, ), x, None, 3, 8, False),
                               (1, (6, 1, 1), other, None, 3, 8, False)]


@pytest.mark.parametrize('change', [
    dict(n=16), dict(step=4), dict(reverse=True), dict(y=torch.zeros(4)),
    dict(x=torch.zeros(4, dtype=torch.bfloat16)), dict(x=torch.zeros(8)[1:])],
    ids=['number', 'constant', 'flag', 'present', 'dtype', 'alignment'])
def test_what_it_is_compiled_for_asks_again(change):
    kernel, x = Kernel(), torch.zeros(4)
    launch(kernel, x)
    for _ in range(2):
        launch(kernel, **dict(dict(x=x), **change))
        assert kernel.asked == 2


def test_another_gpu_asks_again(monkeypatch):
    kernel, x, entered = Kernel(), torch.zeros(4), []
    monkeypatch.setattr(torch.cuda, 'device', lambda i: entered.append(i) or nullcontext())
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(torch.Tensor, 'get_device', lambda self, device=device: device)
        launch(kernel, x)
    assert kernel.asked == 2 and entered == [1, 1]  # it is not entered where it is current


def test_two_kernels_are_two():
    one, other = Kernel(), Kernel()
    for kernel in (one, other, one, other):
        launch(kernel, torch.zeros(4))
    assert (one.asked, other.asked) == (1, 1)


def test_interpreted_it_is_asked_always():
    kernel = Kernel(interpreted=True)
    for _ in range(2):
        launch(kernel, torch.zeros(4))
    assert kernel.asked == 2 and not launching._known


def test_very_many_sizes_are_forgotten(monkeypatch):
    monkeypatch.setattr(launching, '_MANY', 3)
    kernel = Kernel()
    for n in range(10):
        launch(kernel, torch.zeros(4), n=n)
        assert len(launching._known) <= 3


def test_of_the_first_tensors_device():
    """A gradient that is not there may stand first."""
    kernel, x = Kernel(), torch.zeros(4)
    launching.launch(kernel, 1, (None, x), (3, ), STEP=1, REVERSE=False)
    assert kernel.launched == [((1, ), None, x, 3, 1, False)]


class Driver:
    """Stands for Triton's of a GPU: compiles for sm_90 and records what would be launched."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target, self.launched, self.loaded = GPUTarget('cuda', 90, 32), [], 0
        self.utils = SimpleNamespace(
            load_binary=self.load, get_device_properties=lambda _: {'max_shared_mem': 232448})

    def load(self, name, *_):  # a function of its own each time
        self.loaded += 1
        return 'module', f'{name} {self.loaded}', 32, 0, 1024

    def launcher_cls(self, source, metadata):

        def run(*args):
            metadata, enter = args[6:8]
            if enter is not None:
                enter(metadata)
            self.launched.append((args[:3], args[4], args[9:]))

        return run

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@pytest.fixture(scope='module')
def stand_in():
    return Driver()  # compiled kernels stay with the one they were compiled for


@pytest.fixture
def driver(monkeypatch, stand_in):
    from triton.runtime import driver

    monkeypatch.setattr(driver, '_active', stand_in)
    return stand_in


def maps(dtype, width=4, dim=16):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype)

    return SimpleNamespace(
        x=empty(1, 3, width, 4 * dim, dtype=dtype), rows=empty(1, 3, width, 4, 3, dtype=dtype),
        weight=empty(4 * dim), conv=empty(4 * dim, 1, 3, 3), group=empty(4, dim),
        factor=empty(1, 1, 1, 4 * dim), squeeze=empty(2, 4 * dim), dt=empty(4, dim, 1),
        A_log=empty(4 * dim, 1))


def wide_scan(m):
    """Of groups with 32 channels."""
    dtype = m.x.dtype
    return (torch.empty(1, 3, 4, 4, 32, dtype=dtype), torch.empty(1, 3, 4, 4, 4, dtype=dtype),
            torch.empty(4, 32, 2), torch.empty(128, 1), torch.empty(128), torch.empty(128))


def everything(m):
    """Every operator, forward and backward."""
    grouped = m.x.view(*m.x.shape[:3], 4, -1)
    scan = grouped, m.rows, m.dt, m.A_log, m.weight, m.weight
    y, states = scan_triton.MAPS.forward(*scan, True, m.x.dtype)
    scan_triton.MAPS.backward(y, *scan, states)
    conv = m.x, m.conv, m.weight, 'silu'
    around_scan_triton.CONV.backward(around_scan_triton.CONV.forward(*conv), *conv)
    gate = grouped, m.x, m.group, m.group, 1e-5, None
    around_scan_triton.GATE.backward(around_scan_triton.GATE.forward(*gate), *gate)
    normed = around_scan_triton.NORM.forward(m.x, m.weight, m.weight, 1e-5, m.x.dtype, None)
    around_scan_triton.ADD_NORM.backward(m.x, normed, m.x, m.weight, 1e-5, None)
    modulated = m.x, m.x, m.factor, m.weight
    around_scan_triton.MODULATE.backward(m.x, *modulated, 1e-5, None)
    around_scan_triton.NORM.forward(m.x, m.weight, m.weight, 1e-5, m.x.dtype, None, m.weight)
    skip = m.weight[:1]
    factor, *kept = around_scan_triton.AFFINITY.forward(m.x, m.squeeze, m.weight[:2], m.squeeze.t(),
                                                        m.weight, skip)
    around_scan_triton.AFFINITY.backward(factor, *kept, m.squeeze, m.squeeze.t(), skip, 3)
    with pytest.MonkeyPatch.context() as patch:  # a chunk that is the whole sequence
        patch.setattr(scan_triton, '_MANY_SEQUENCES', 1)
        patch.setattr(scan_triton, '_plan', scan_triton._plan.__wrapped__)
        y, states = scan_triton.MAPS.forward(*wide_scan(m), True, m.x.dtype)
        scan_triton.MAPS.backward(y, *wide_scan(m), states)


@compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason='the stand-in has no GPU memory')
@pytest.mark.parametrize('version', ['3.6.', 'another'])
def test_the_same_as_triton_would_launch(driver, monkeypatch, version):
    """Every kernel, of several kinds of maps in turn, launched by Triton and by us; past the door
    of its kernels, and through it."""
    monkeypatch.setattr(launching, '_TRITON', version)
    kinds = [maps(torch.bfloat16), maps(torch.bfloat16, width=7), maps(torch.float32)]
    turns = []
    for again in (False, False, True):
        monkeypatch.setattr(launching, '_known', launching._known if again else {})
        driver.launched.clear()
        for kind in kinds:
            everything(kind)
        turns.append([(grid, function, [type(a) if isinstance(a, torch.Tensor) else a
                                        for a in arguments])
                      for grid, function, arguments in driver.launched])
    # first all is compiled, then Triton finds it, then we do
    by_triton, by_us = turns[1:]
    assert len(by_us) == len(by_triton) == 3 * 17
    assert by_us == by_triton
    assert len({function for _, function, _ in by_us}) > 17


@compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason='the stand-in has no GPU memory')
def test_hooks_see_every_launch(driver, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(launching, '_TRITON', '3.6.')
    seen, m = [], maps(torch.bfloat16)

    def hook(metadata):
        seen.append(metadata.get()['name'])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            around_scan_triton.CONV.forward(m.x, m.conv, m.weight, 'silu')
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ['conv_forward_kernel'] * 2
