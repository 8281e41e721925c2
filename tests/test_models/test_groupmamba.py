import subprocess
import sys

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mmgroupmamba.checkpoint import from_official
from mmgroupmamba.models import GroupMamba
from mmgroupmamba.models.groupmamba import ARCHS
from mmgroupmamba.models.layers import Block, GroupedSSM, init_weights

MICRO = dict(
    stem_hidden_dim=8, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize('backend', ['reference', 'blocked'])
@pytest.mark.parametrize('case', [0, 1], ids=['square', 'non-square'])
def test_equals_official_code(golden, official_file, backend, case):
    case = golden['cases'][case]
    model = GroupMamba(golden['arch'], scan_backend=backend,
                       init_cfg=dict(type='Pretrained', checkpoint=official_file))
    model.init_weights()
    model.eval()
    image = case['input'].clone().requires_grad_()
    features = model(image)
    assert len(features) == len(case['features']) == 4
    for got, want in zip(features, case['features']):
        assert got.shape == want.shape and relative(got, want) < 1e-5

    torch.autograd.backward(features, case['cotangents'])
    assert relative(image.grad, case['grad_input']) < 1e-4
    grads = {name: p.grad for name, p in model.named_parameters()}
    wants = from_official(case['grad_params'], grads)
    assert set(wants) == set(grads)
    for name, got in grads.items():
        # a LayerNorm follows skip_scale at once: its true gradient is 0 up to eps
        if not name.endswith('skip_scale'):
            scale = wants[name].abs().max().clamp_min(1e-6)
            assert (got - wants[name]).abs().max() / scale < 1e-4, name


@pytest.mark.parametrize('backend', ['reference', 'blocked'])
@pytest.mark.parametrize('height, width', [(1, 1), (3, 5), (5, 3)])
@pytest.mark.parametrize('states', [1, 2])
def test_gradients_of_the_four_groups(backend, height, width, states):
    """float64, H != W: where the official backward swaps the sides."""
    torch.manual_seed(0)
    ssm = GroupedSSM(8, d_state=states, scan_backend=backend).double()
    init_weights(ssm)
    names, parameters = zip(*ssm.named_parameters())
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p), alpha=0.2)
    x = torch.randn(1, height, width, 8, dtype=torch.float64, requires_grad=True)

    def forward(x, *parameters):
        return torch.func.functional_call(ssm, dict(zip(names, parameters)), (x, ))

    # eps of the group norm makes one-token gradients steep: a slightly wider tolerance
    torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True, rtol=2e-3)


@pytest.mark.parametrize('height, width', [(32, 32), (33, 65), (64, 32), (47, 130), (224, 100)])
def test_any_size(height, width):
    model = GroupMamba(MICRO).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, height, width))
    for i, (feature, dim) in enumerate(zip(features, MICRO['embed_dims'])):
        stride = 2**(i + 2)
        assert feature.shape == (1, dim, -(-height // stride), -(-width // stride))
        # mmcv's RoIAlign reads any memory as if it were contiguous
        assert feature.is_contiguous()


@pytest.mark.parametrize('height, width', [(31, 64), (64, 31), (1, 1)])
def test_too_small_image(height, width):
    with pytest.raises(ValueError, match=f'at least 32x32 pixels, got {height}x{width}'):
        GroupMamba(MICRO)(torch.zeros(1, 3, height, width))


def test_parameters_of_the_paper():
    """RECIPES: 23.36, 34.78 and 57.15 M with class block and both heads."""
    for arch, with_heads in dict(tiny=23.36e6, small=34.78e6, base=57.15e6).items():
        with torch.device('meta'):
            backbone = GroupMamba(arch)
        count = sum(p.numel() for p in backbone.parameters())
        assert 0.8 * with_heads < count < with_heads
    assert sum(p.numel() for p in GroupMamba('nano').parameters()) < 1e6


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3, ), (0, 2), (1, )])
def test_out_indices(out_indices):
    torch.manual_seed(0)
    model = GroupMamba(MICRO, out_indices=out_indices)
    features = model(torch.randn(2, 3, 64, 64))
    assert [f.shape[1] for f in features] == [MICRO['embed_dims'][i] for i in out_indices]
    sum(f.sin().sum() for f in features).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without


def test_frozen_stages_and_norm_eval():
    for frozen in range(-1, 5):
        model = GroupMamba(MICRO, frozen_stages=frozen)
        model.train()
        still = {n for n, p in model.named_parameters() if not p.requires_grad}
        want = {
            n for n, _ in model.named_parameters()
            if (n.startswith('stages.0.embed') and frozen >= 0) or int(n.split('.')[1]) < frozen
        }
        assert still == want
        for module in model.stages[0].embed.modules():
            assert module.training == (frozen < 0)

    model = GroupMamba(MICRO, norm_eval=True)
    assert model.train() is model and model.eval() is model
    model.train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 3 and not any(m.training for m in norms)
    assert model.stages[0].training


def test_checkpointing_changes_nothing_but_memory():
    grads, kept = [], []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = GroupMamba(MICRO, with_cp=with_cp, drop_path_rate=0.5)
        sizes = {}  # of what autograd keeps for the backward pass, each storage once

        def pack(tensor, sizes=sizes):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(torch.randn(4, 3, 64, 64))[-1]
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        kept.append(sum(sizes.values()))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)
    assert kept[1] < 0.5 * kept[0]


def test_drop_path_rises_linearly():
    model = GroupMamba('tiny', drop_path_rate=0.18)
    rates = [getattr(block.drop_path, 'drop_prob', 0) for s in model.stages for block in s.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(19)], abs=1e-6)


def test_layer_depth():
    model = GroupMamba('tiny')
    depths = {n: model.get_layer_depth(f'backbone.{n}', 'backbone.') for n, _ in
              model.named_parameters()}
    assert {last for _, last in depths.values()} == {21}
    assert depths['stages.0.embed.proj.weight'][0] == 0
    assert depths['stages.0.blocks.0.norm.weight'][0] == 1
    assert depths['stages.0.norm.weight'][0] == 3
    assert depths['stages.1.embed.proj.weight'] == depths['stages.1.blocks.0.norm.weight']
    assert depths['stages.3.blocks.2.norm.weight'][0] == depths['stages.3.norm.weight'][0] == 19
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (20, 21)


def test_autocast_stays_close():
    torch.manual_seed(0)
    model = GroupMamba(MICRO).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want = model(image)
        with torch.autocast('cpu', torch.bfloat16):
            got = model(image)
    for one, other in zip(got, want):
        assert torch.isfinite(one).all() and relative(one.float(), other) < 0.1


@pytest.mark.parametrize('arch, message', [
    ('huge', "unknown arch 'huge'.*nano, tiny, small, base"),
    (3, 'name or a dict, got int'),
    ({**MICRO, 'depth': 3}, r"unknown: \['depth'\]"),
    ({k: v for k, v in MICRO.items() if k != 'depths'}, r"missing: \['depths'\]"),
    ({**MICRO, 'embed_dims': (16, 16, 30, 32)}, 'divisible by 4.*got 30'),
    ({**MICRO, 'embed_dims': (8, 16, 32, 32)}, 'at least 16, got 8'),
    ({**MICRO, 'depths': (1, 1, 1)}, 'depths must hold one value for each'),
    ({**MICRO, 'depths': (1, 0, 1, 1)}, 'depths must be positive'),
    ({**MICRO, 'depths': (1, 1.5, 1, 1)}, 'depths must be whole numbers'),
    ({**MICRO, 'stem_hidden_dim': 0}, 'stem_hidden_dim must be'),
])
def test_bad_arch_is_named(arch, message):
    with pytest.raises(ValueError, match=message):
        GroupMamba(arch)


@pytest.mark.parametrize('kwargs, message', [
    (dict(out_indices=(0, 4)), 'out_indices'),
    (dict(out_indices=(1, 0)), 'out_indices'),
    (dict(out_indices=()), 'out_indices'),
    (dict(frozen_stages=5), 'frozen_stages'),
    (dict(drop_path_rate=1.), 'drop_path_rate'),
    (dict(scan_backend='fast'), "unknown scan backend 'fast'"),
    (dict(fused_ops=['conv']), "fused_ops must be 'all' or a list of depthwise_conv, layer_norm"),
    (dict(fused_ops='add_layer_norm'), "fused_ops must be 'all' or a list"),
])
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GroupMamba(MICRO, **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_unavailable_backend_is_refused_at_once():
    with pytest.raises(ValueError, match="'mamba_ssm' cannot run: .*CUDA"):
        GroupMamba(MICRO, scan_backend='mamba_ssm')


def run_python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_builds_in_any_library_without_custom_imports(scope):
    result = run_python(f'from {scope}.registry import MODELS\n'
                        "print(type(MODELS.build(dict(type='mmgroupmamba.GroupMamba', "
                        "arch='nano'))).__name__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == 'GroupMamba'


def test_importing_changes_nothing():
    libraries = 'import mmengine.optim, mmcv.cnn\n'  # the original ones warn and bring triton
    result = run_python('import sys, torch\n'
                        'flags = lambda: (torch.backends.cudnn.deterministic, '
                        'torch.backends.cudnn.benchmark, torch.get_default_dtype())\n'
                        'before = flags()\n'
                        f'{libraries}'
                        'already = set(sys.modules)\n'
                        'import mmgroupmamba, mmgroupmamba.models, mmgroupmamba.ops\n'
                        'assert flags() == before\n'
                        'heavy = {"mmdet", "mmseg", "mmpretrain", "triton", "transformers", '
                        '"mamba_ssm", "selective_scan_cuda"} & set(sys.modules) - already\n'
                        'assert not heavy, heavy')
    assert result.returncode == 0, result.stderr
    assert result.stdout == '' and result.stderr == run_python(libraries).stderr


def test_arch_table_is_the_papers():
    assert {a: ARCHS[a]['embed_dims'] for a in ('tiny', 'small', 'base')} == dict(
        tiny=(64, 128, 348, 448), small=(64, 128, 348, 512), base=(96, 192, 424, 512))


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_fused_ops_are_refused_at_once_where_they_cannot_run():
    with pytest.raises(ValueError, match="add_layer_norm: backend 'triton' cannot run: .*CUDA"):
        GroupMamba(MICRO, fused_ops=['add_layer_norm'])
    with pytest.raises(ValueError, match="depthwise_conv: backend 'triton' cannot run: .*CUDA"):
        GroupMamba(MICRO, fused_ops='all')


def test_fused_ops_are_the_operators_that_are_named():
    blocks = GroupMamba(MICRO).stages[0].blocks
    assert {m.backend for m in blocks.modules() if hasattr(m, 'backend')} == {'torch'}
    block = Block(16, 2., fused_ops=('depthwise_conv', 'gated_layer_norm'))
    assert block.ffn.conv.backend == block.mixer.ssm.conv.backend == 'triton'
    assert block.mixer.ssm.norm.backend == 'triton' and block.norm.backend == 'torch'
