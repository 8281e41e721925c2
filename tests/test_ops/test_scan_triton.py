"""The Triton backend. On a machine without a GPU, the tests that run kernels are run by one
subprocess in Triton's interpreter, and the kernels are compiled for two GPUs."""
import os
import re
import subprocess
import sys

import pytest
import torch
from test_directional_scan import by_cells
from test_directional_scan import check as check_maps
from test_directional_scan import make_inputs as make_maps
from test_directional_scan import run as run_maps
from test_selective_scan import DEVICE, NAMES, make_inputs, relative, run

from mmgroupmamba.ops import directional_scan, scan_triton, selective_scan
from mmgroupmamba.ops.scan_triton import Tile, _tiles_at_once, tile_sizes, why_not

runs = pytest.mark.skipif(why_not(DEVICE) is not None, reason='no GPU and not interpreted')
by_a_subprocess = pytest.mark.skipif(
    why_not(DEVICE) is None or why_not('cuda') is not None,
    reason='the kernels run in this process, or there is no Triton')
compiles = pytest.mark.skipif(why_not('cuda') is not None or 'TRITON_INTERPRET' in os.environ,
                              reason='no Triton, or interpreted')


def small_tiles(monkeypatch):
    """For the interpreter: it runs operation by operation, and a tile's scan lane by lane."""

    def tile_sizes(batch, groups, dim, *_):
        return Tile(2, 2, 4, 8 if dim <= 8 else 16 if dim <= 16 else 64)

    if DEVICE == 'cpu':
        monkeypatch.setattr(scan_triton, 'tile_sizes', tile_sizes)
        monkeypatch.setattr(scan_triton, '_tiles_at_once', lambda *_: 4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_tiles(monkeypatch)


@by_a_subprocess
def test_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) > 30


def passed_in_the_interpreter(file):
    """Run a test file by itself in the interpreter; the number of tests, all passed."""
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', file],
        env=dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1'), capture_output=True,
        text=True, timeout=570)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return int(re.search(r'(\d+) passed', result.stdout)[1])


def check(inputs, softplus=True, tolerance=1e-6):
    exact = {k: v if v is None else v.detach().double().requires_grad_()
             for k, v in inputs.items()}
    y, grads = run(inputs, 'triton', delta_softplus=softplus)
    want, want_grads = run(exact, 'reference', delta_softplus=softplus)
    assert y.dtype == inputs['u'].dtype and relative(y, want) < tolerance
    present = [k for k in NAMES if inputs[k] is not None]
    for name, got, expected in zip(present, grads, want_grads):
        assert got.shape == inputs[name].shape and got.dtype == inputs[name].dtype
        assert torch.isfinite(got).all() and relative(got, expected) < 2 * tolerance, name


@runs
@pytest.mark.parametrize('length, dim, states, groups, absent, softplus, channels_last', [
    (1, 5, 1, 1, (), True, False),
    (1, 16, 2, 2, ('D', ), True, True),
    (7, 16, 3, 1, ('delta_bias', ), True, True),
    (63, 5, 2, 1, ('D', 'delta_bias'), False, False),
    (9, 87, 1, 1, (), True, True),
    (17, 5, 1, 1, (), False, True),
])
def test_equals_reference(length, dim, states, groups, absent, softplus, channels_last):
    inputs = make_inputs(2 if length == 7 else 1, groups, dim, length, states)
    if not softplus:
        with torch.no_grad():
            inputs['delta'].abs_()
            inputs['delta_bias'].abs_()
    if channels_last:
        for name in ('u', 'delta', 'B', 'C'):
            inputs[name] = inputs[name].detach().movedim(-1, 1).contiguous().movedim(1, -1)
            inputs[name].requires_grad_()
    check(dict(inputs, **dict.fromkeys(absent)), softplus)


@runs
def test_many_states_go_in_slices(monkeypatch):
    monkeypatch.setattr(scan_triton, 'MAX_STATES', 2)
    check(make_inputs(1, 1, 5, 9, 3))


@runs
@pytest.mark.parametrize('tile, length, at_once', [
    (Tile(8, 4, 32, 8), 256 + 37, 16),  # the second tile is nearly empty
    (Tile(4, 4, 2, 16), 38, 2),  # five tiles, composed two at once
    (Tile(40, 4, 1, 8), 38, 16),  # one chunk
])
def test_many_tiles(monkeypatch, tile, length, at_once):
    monkeypatch.setattr(scan_triton, 'tile_sizes', lambda *_: tile)
    monkeypatch.setattr(scan_triton, '_tiles_at_once', lambda *_: at_once)
    check(make_inputs(1, 1, 5, length))


@runs
def test_long_sequence_is_exact(monkeypatch):
    if DEVICE == 'cpu':  # the interpreter's time goes by programs, not by their size
        monkeypatch.setattr(scan_triton, 'tile_sizes', lambda *_: Tile(64, 8, 1024, 2))
    inputs = {k: v.detach() for k, v in make_inputs(1, 1, 2, 70_000).items()}
    y = selective_scan(**inputs, delta_softplus=True, backend='triton')
    exact = {k: v.double() for k, v in inputs.items()}
    want = selective_scan(**exact, delta_softplus=True, backend='blocked')
    assert torch.isfinite(y).all() and relative(y, want) < 1e-6


@runs
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside(dtype):
    check(make_inputs(1, 1, 5, 40, dtype=dtype), tolerance=torch.finfo(dtype).eps / 2)


@runs
def test_extreme_steps():
    """Steps of 1e-26 to 200 and decays that underflow, one channel each, each one compared."""
    inputs = make_inputs(1, 1, 5, 20)
    with torch.no_grad():
        inputs['delta_bias'].copy_(torch.tensor([-60., -20., 0., 20., 200.]))
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    for case in (inputs, exact):
        case['D'] = None  # it would hide a step that is lost
    y, grads = run(inputs, 'triton', delta_softplus=True)
    want, want_grads = run(exact, 'reference', delta_softplus=True)
    assert all(torch.isfinite(t).all() for t in (y, *grads))
    names = [name for name in NAMES if name != 'D']
    for name, got, expected in (('y', y, want), *zip(names, grads, want_grads)):
        if name in ('B', 'C'):
            assert relative(got, expected) < 2e-6, name
            continue
        for channel in range(5):
            one, other = (t.reshape(5, -1)[channel] for t in (got, expected))
            assert relative(one * 1e20, other * 1e20) < 4e-6, (name, channel)


@runs
def test_same_bits_again():
    inputs = make_inputs(1, 2, 5, 9)
    first, second = (run(inputs, 'triton', delta_softplus=True) for _ in range(2))
    for one, other in zip((first[0], *first[1]), (second[0], *second[1])):
        assert torch.equal(one, other)


@runs
def test_no_graph_break():
    inputs = make_inputs(1, 1, 3, 9)

    def scan(*args):
        return scan_triton.scan(*args, True).sin()

    y = torch.compile(scan, fullgraph=True, backend='aot_eager')(*inputs.values())
    want = scan(*inputs.values())
    torch.testing.assert_close(y, want)
    for one, other in zip(*(torch.autograd.grad(t.sum(), list(inputs.values()))
                            for t in (y, want))):
        torch.testing.assert_close(one, other)


@runs
def test_the_operators_are_what_torch_library_is_told():
    args = tuple(make_inputs(1, 1, 3, 9).values())
    torch.library.opcheck(scan_triton.SEQUENCES.op, (*args, True, True),
                          test_utils=('test_schema', 'test_autograd_registration',
                                      'test_faketensor'))


@runs
def test_float64_is_refused():
    with pytest.raises(ValueError, match="no float64: use backend='blocked'"):
        run(make_inputs(length=3, dtype=torch.float64), 'triton')
    with pytest.raises(ValueError, match="no float64: use backend='blocked'"):
        run_maps(directional_scan, make_maps(dtype=torch.float64), backend='triton')


@runs
@pytest.mark.parametrize('batch, height, width, dim, rank, states', [
    (1, 1, 1, 5, 1, 1),
    (1, 1, 7, 5, 2, 1),
    (1, 7, 1, 5, 1, 1),
    (2, 3, 2, 6, 1, 2),
    (1, 2, 3, 87, 6, 1),  # two programs share a row
])
def test_maps_equal_the_definition(batch, height, width, dim, rank, states):
    check_maps(make_maps(batch, height, width, dim, rank, states), 'triton')


@runs
@pytest.mark.parametrize('limit, rank, states', [('MAX_STATES', 1, 2), ('MAX_RANK', 2, 1)])
def test_maps_beyond_the_limits_are_laid_out(monkeypatch, limit, rank, states):
    monkeypatch.setattr(scan_triton, limit, 1)
    check_maps(make_maps(1, 2, 3, 3, rank, states), 'triton')


@runs
@pytest.mark.parametrize('tile, at_once, shape', [
    (tile_sizes(1, 4, 6, 1, 33, 2), 16, (11, 3)),  # as on a GPU
    (Tile(2, 1, 4, 8), 2, (5, 4)),  # three tiles
    (Tile(24, 8, 1, 8), 16, (5, 4)),  # one chunk
])
def test_map_of_many_chunks(monkeypatch, tile, at_once, shape):
    monkeypatch.setattr(scan_triton, 'tile_sizes', lambda *_: tile)
    monkeypatch.setattr(scan_triton, '_tiles_at_once', lambda *_: at_once)
    check_maps(make_maps(1, *shape), 'triton')


@runs
@pytest.mark.skipif(DEVICE == 'cpu', reason='too large to be interpreted')
@pytest.mark.parametrize('height, width, dim', [(28, 28, 32), (14, 14, 87), (7, 7, 112)])
def test_many_short_maps(height, width, dim):
    """Tiny's later stages at 224 x 224, batch 128: few chunks that cover a map."""
    rank = -(-dim // 16)
    inputs = make_maps(128, height, width, dim, rank)
    tile = tile_sizes(128, 4, dim, 1, height * width, rank)
    assert tile.CHUNKS * tile.T >= height * width
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    y, grads = run_maps(directional_scan, inputs, backend='triton')
    want, want_grads = run_maps(directional_scan, exact, backend='blocked')
    for got, expected in zip((y, *grads), (want, *want_grads)):
        assert relative(got, expected) < 5e-6
    with torch.no_grad():
        inferred = directional_scan(**inputs, backend='triton')
    assert relative(inferred, want) < 2e-6


@runs
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_map_in_half_precision(dtype):
    with torch.autocast(DEVICE, torch.bfloat16):
        check_maps(make_maps(1, 3, 2, dtype=dtype), 'triton', torch.finfo(dtype).eps / 2)


@runs
def test_map_with_extreme_steps():
    """As above, a channel of each group a case. The sum of W r and a bias of -60 alone is rounded
    by 2e-6 of the step."""
    inputs = make_maps(1, 2, 4, 5)
    with torch.no_grad():
        inputs['dt_bias'].copy_(torch.tensor([-60., -20., 0., 20., 200.]).repeat(4))
        inputs['D'].zero_()  # it would hide a step that is lost
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    y, grads = run_maps(directional_scan, inputs, backend='triton')
    want, want_grads = run_maps(by_cells, exact)
    assert all(torch.isfinite(t).all() for t in (y, *grads))
    results = dict(zip(('y', *inputs), zip((y, *grads), (want, *want_grads))))
    assert relative(*results.pop('x_dbl')) < 2e-6
    for name, (got, expected) in results.items():
        if name in ('y', 'x'):
            got, expected = (t.flatten(0, 2).permute(1, 2, 0) for t in (got, expected))
        for case in range(5):
            one, other = (t.reshape(4, 5, -1)[:, case] * 1e20 for t in (got, expected))
            assert relative(one, other) < 1e-5, (name, case)


@runs
def test_map_gives_the_same_bits_again_and_in_any_layout():
    inputs = make_maps(1, 2, 4, 5)
    views = {k: v.detach().clone() for k, v in inputs.items()}
    views['x'] = torch.cat([views['x'], views['x']], -1)[..., :5]
    views['x_dbl'] = views['x_dbl'].permute(3, 4, 0, 2, 1).contiguous().permute(2, 4, 3, 0, 1)
    views = {k: v.requires_grad_() for k, v in views.items()}
    first, second, third = (run_maps(directional_scan, case, backend='triton')
                            for case in (inputs, inputs, views))
    for one, two, three in zip(*((y, *grads) for y, grads in (first, second, third))):
        assert torch.equal(one, two) and torch.equal(one, three)


@runs
def test_map_of_one_column_with_any_stride():
    inputs = make_maps(1, 3, 1, 5)
    turned = {k: v.detach().transpose(1, 2).contiguous().transpose(1, 2) if v.dim() == 5 else v
              for k, v in inputs.items()}
    x = torch.empty(1, 1, 3, 4, 5, device=DEVICE).transpose(1, 2)
    strided = dict(turned, x=x.copy_(inputs['x']))
    assert strided['x'].is_contiguous() and strided['x'].stride(2) != strided['x'].stride(1)
    strided = {k: v.detach().requires_grad_() for k, v in strided.items()}
    (y, grads), (want, want_grads) = (run_maps(directional_scan, case, backend='triton')
                                      for case in (strided, inputs))
    for one, two in zip((y, *grads), (want, *want_grads)):
        assert torch.equal(one, two)


@runs
def test_no_graph_break_with_a_map():
    inputs = make_maps(1, 2, 3, 3)

    def scan(*args):
        return directional_scan(*args, backend='triton').sin()

    y = torch.compile(scan, fullgraph=True, backend='aot_eager')(*inputs.values())
    want = scan(*inputs.values())
    torch.testing.assert_close(y, want)
    for one, other in zip(*(torch.autograd.grad(t.sum(), list(inputs.values()))
                            for t in (y, want))):
        torch.testing.assert_close(one, other)


@runs
def test_the_operators_of_maps_are_what_torch_library_is_told():
    args = tuple(make_maps(1, 2, 3, 3).values())
    torch.library.opcheck(scan_triton.MAPS.op, (*args, True, torch.float32),
                          test_utils=('test_schema', 'test_autograd_registration',
                                      'test_faketensor'))
    args = [t.detach() for t in args]
    y, entry = scan_triton._map_forward(*args, True, torch.float32)
    torch.library.opcheck(scan_triton.MAPS.backward_op, (y, *args, entry),
                          test_utils=('test_schema', 'test_faketensor'))


def test_why_not(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert 'CUDA tensors only, not on cpu; for tests, TRITON_INTERPRET=1' in why_not('cpu')
    monkeypatch.setitem(sys.modules, 'triton', None)
    scan_triton._triton_problem.cache_clear()
    assert 'pip install triton' in why_not('cuda')
    scan_triton._triton_problem.cache_clear()


def test_triton_is_imported_late():
    code = ("import sys; from mmgroupmamba import ops; ops.available_backends('cpu'); "
            "assert 'triton' not in sys.modules")
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    subprocess.run([sys.executable, '-c', code], check=True, env=env)


def test_few_tiles():
    tiles = {tile_sizes(batch, 4, dim, 1, length) for batch in (1, 2, 128)
             for dim in (5, 16, 32, 87, 112) for length in (1, 49, 196, 3136, 67200)}
    usual = {t for t in tiles if t.T in (16, 64) and t.CHUNKS > 1}
    assert len(usual) <= 4 and {t.CHUNKS * t.CHANNELS for t in usual} == {128}
    assert all(t in usual or t.T % 8 == 0 and t.T <= 256 for t in tiles)
    assert tile_sizes(2, 4, 16, 1, 67200, 1) == Tile(64, 8, 8, 16)


@pytest.mark.parametrize('batch, dim, length, tile', [
    (128, 87, 196, Tile(200, 4, 1, 32)),
    (128, 112, 49, Tile(56, 4, 1, 32)),
    (128, 32, 256, Tile(256, 8, 1, 32)),
    (128, 32, 257, Tile(72, 8, 4, 32)),
    (128, 32, 784, Tile(200, 8, 4, 32)),
    (128, 32, 1025, Tile(64, 8, 4, 32)),
    (16, 87, 196, Tile(16, 4, 4, 32)),  # too few sequences
    (128, 16, 49, Tile(16, 8, 8, 16)),  # half a warp
])
def test_short_sequences_are_a_chunk_where_they_are_many(batch, dim, length, tile):
    rank = -(-dim // 16)
    got = tile_sizes(batch, 4, dim, 1, length, rank)
    assert got == tile
    # all ranks of the model have registers for 8 tokens forward
    assert tile_sizes(batch, 4, dim, 1, length, rank, False) == tile._replace(STEP=8)


class Recorder:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append(
                (self.kernel, dict(zip(self.kernel.arg_names, args), **constants)))
        return launch


def specialise(kernel, arguments):
    """Signature, constants and attributes that a launch compiles a kernel for."""
    types = {torch.float32: '*fp32', torch.bfloat16: '*bf16'}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        at_run_time = name in kernel.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i, )] = [['tt.divisibility', 16]]
        elif name.isupper() or value is None or value == 1 and not at_run_time:
            signature[name] = 'constexpr'
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = 'fp32'
        else:
            signature[name] = 'i32'
            if value % 16 == 0 and not at_run_time:
                attributes[(i, )] = [['tt.divisibility', 16]]
    return signature, constants, attributes


def compile_launch(kernel, arguments, arch):
    """Registers and spilled bytes of a launch on a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(num_warps=arguments.get('num_warps', 4))
    compiled = triton.compile(ASTSource(kernel, *specialise(kernel, arguments)),
                              target=GPUTarget('cuda', arch, 32), options=options)
    ptx = compiled.asm['ptx']
    target = re.search(r'\.target (\w+)', ptx)[1]
    log = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, '-v', f'--gpu-name={target}', '/dev/stdin', '-o',
         '/dev/null'], input=ptx, capture_output=True, text=True, check=True).stderr
    spills = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', log)
    return int(re.search(r'Used (\d+) registers', log)[1]), int(spills[1]) + int(spills[2])


@pytest.fixture
def launches(monkeypatch):
    """What the kernels are launched with, in place of launching them."""
    from mmgroupmamba.ops import scan_triton_kernels

    recorded = []
    for name in ('summary_kernel', 'forward_kernel', 'backward_kernel'):
        kernel = getattr(scan_triton_kernels, name)
        monkeypatch.setattr(scan_triton_kernels, name, Recorder(kernel, recorded))
    return recorded


TWO_PASSES = ['summary_kernel', 'forward_kernel', 'summary_kernel', 'backward_kernel']


def check_compiled(launches, arch, names=TWO_PASSES):
    assert [kernel.__name__ for kernel, _ in launches] == names
    for kernel, arguments in launches:
        registers, spilled = compile_launch(kernel, arguments, arch)
        print(f'{kernel.__name__} on sm_{arch}: {registers} registers')
        assert spilled == 0, kernel.__name__


@compiles
@pytest.mark.parametrize('arch, tile, dtype', [
    (80, Tile(16, 4, 4, 32), torch.float32),
    (90, Tile(64, 4, 8, 16), torch.bfloat16),
])
def test_compiles_without_spills(monkeypatch, launches, arch, tile, dtype):
    monkeypatch.setattr(scan_triton, 'tile_sizes', lambda *_: tile)
    u, delta, A, B, C, D, bias = (v.detach().cpu() for v in make_inputs(1, 4, 16, 9).values())
    u, delta, B, C = (t.to(dtype).movedim(-1, 1).contiguous().movedim(1, -1)
                      for t in (u, delta, B, C))
    y, entry = scan_triton._forward(u, delta, A, B, C, D, bias, True, True)
    scan_triton._backward(y, u, delta, A, B, C, D, bias, entry, True)
    check_compiled(launches, arch)


def launch_map(height, width, dim, dtype, keep=True):
    """Both passes over one map, or without `keep` one, with the model's rank and one state."""
    rank = -(-dim // 16)
    x, x_dbl = (torch.empty(1, height, width, 4, values, dtype=dtype)
                for values in (dim, rank + 2))
    weights = [torch.empty(shape) for shape in (
        (4, dim, rank), (4 * dim, 1), (4 * dim, ), (4 * dim, ))]
    y, entry = scan_triton._map_forward(x, x_dbl, *weights, keep, torch.float32)
    if keep:
        scan_triton._map_backward(y, x, x_dbl, *weights, entry)


@compiles
@pytest.mark.parametrize('arch, dim, dtype', [
    (90, 16, torch.bfloat16),
    (80, 32, torch.float32),
    (80, 128, torch.bfloat16),  # the highest rank: of those with 4 tokens at once, most registers
    (90, 128, torch.float32),
])
def test_compiles_for_maps_without_spills(monkeypatch, launches, arch, dim, dtype):
    monkeypatch.setattr(scan_triton, 'tile_sizes', tile_sizes)
    monkeypatch.setattr(scan_triton, '_tiles_at_once', _tiles_at_once)
    launch_map(100, 80, dim, dtype)
    check_compiled(launches, arch)


@compiles
@pytest.mark.parametrize('dim', [32, 112])
def test_one_chunk_compiles_without_spills_or_summaries(monkeypatch, launches, dim):
    monkeypatch.setattr(scan_triton, 'tile_sizes', lambda batch, *args: tile_sizes(2**14, *args))
    launch_map(14, 14, dim, torch.bfloat16)
    check_compiled(launches, 90, ['forward_kernel', 'backward_kernel'])


@compiles
def test_inference_compiles_without_spills(monkeypatch, launches):
    """Of the highest rank, 8 tokens at once."""
    monkeypatch.setattr(scan_triton, 'tile_sizes', tile_sizes)
    monkeypatch.setattr(scan_triton, '_tiles_at_once', _tiles_at_once)
    launch_map(14, 14, 128, torch.bfloat16, keep=False)
    check_compiled(launches, 90, ['summary_kernel', 'forward_kernel'])
    assert {arguments['STEP'] for _, arguments in launches} == {8}


@compiles
@pytest.mark.parametrize('dim', [16, 87])
def test_maps_of_any_size_share_few_compiled_kernels(monkeypatch, launches, dim):
    monkeypatch.setattr(scan_triton, 'tile_sizes', tile_sizes)
    monkeypatch.setattr(scan_triton, '_tiles_at_once', _tiles_at_once)
    for height, width in [(1, 1), (1, 16), (16, 1), (7, 7), (14, 14), (25, 42), (48, 32), (56, 56),
                          (97, 101), (128, 128), (200, 336), (336, 200)]:
        launch_map(height, width, dim, torch.bfloat16)
    variants = {(kernel.__name__, str(specialise(kernel, arguments)))
                for kernel, arguments in launches}
    assert len(variants) <= 12
    assert len({v for v in variants if v[0] == 'forward_kernel'}) <= 4


@compiles
def test_nothing_is_kept_without_gradients(launches):
    inputs = {k: v.cpu() for k, v in make_maps(1).items()}
    with torch.no_grad():
        scan_triton.directional_scan(**inputs, out_dtype=torch.float32)
    scan_triton.directional_scan(**inputs, out_dtype=torch.float32)
    without, kept = (a['entry'] for kernel, a in launches if kernel.__name__ == 'forward_kernel')
    assert without is None and kept is not None
