"""What the READMEs tell to add on the command line does what they say, and the examples for more
than one machine name what mmengine has."""
import inspect
import re
import shlex

import pytest
import torch
from building import ROOT, build_model, build_optimizer, load, parameter_settings
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS, OPTIM_WRAPPERS, RUNNERS, STRATEGIES
from mmengine.runner import Runner

from mmgroupmamba.launch import Parser, merge_options

README_CONFIGS = {
    'detection': 'detection/mask-rcnn_groupmamba-tiny_fpn_1x_coco.py',
    'segmentation': 'segmentation/groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'
}
FSDP = 'segmentation/groupmamba-base_upernet_8xb2-160k_ade20k-512x512_fsdp.py'


def options(folder: str) -> dict[str, str]:
    """First key -> the whole option line, of each `--cfg-options` in backticks."""
    readme = (ROOT / 'configs' / folder / 'README.md').read_text()
    lines = re.findall(r'`(?:--amp )?--cfg-options (\S+=[^`]*)`', readme)
    return {line.split('=')[0]: line for line in lines}


@pytest.fixture(params=README_CONFIGS)
def told(request):
    """Function from an option's first key to the config that its README line makes."""
    def merged(key: str):
        cfg = load(README_CONFIGS[request.param])
        parser = Parser('a tool')
        parser.add_shared_options()
        line = shlex.split(options(request.param)[key])
        merge_options(cfg, parser.parse_args(['config', '--cfg-options', *line]).cfg_options)
        return cfg

    return merged


def test_every_option_is_tried_below():
    shared = {'optim_wrapper.dtype', 'model.backbone.with_cp', 'model.backbone.frozen_stages',
              'model.backbone.norm_eval', 'sync_bn', 'optim_wrapper.accumulative_counts',
              'optim_wrapper.constructor',
              'default_hooks.ema.type'}
    assert set(options('detection')) == shared
    assert set(options('segmentation')) == {*shared, 'model.test_cfg.mode'}


def test_backbone_options(told):
    assert build_model(told('model.backbone.with_cp')).backbone.with_cp is True

    cfg = told('model.backbone.frozen_stages')
    model = build_model(cfg)
    trained = {id(p) for group in build_optimizer(cfg, model).optimizer.param_groups
               for p in group['params']}
    frozen = [name for name, p in model.named_parameters() if id(p) not in trained]
    assert {name.split('.')[2] for name in frozen} == {'0', '1'}
    assert all(name.startswith('backbone.stages.') for name in frozen)
    assert not [name for name, _ in model.named_parameters()
                if name.startswith(('backbone.stages.0.', 'backbone.stages.1.'))
                and name not in frozen]

    backbone = build_model(told('model.backbone.norm_eval')).train().backbone
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 3 and not any(norm.training for norm in norms) and backbone.training


def test_training_options(told):
    cfg = told('optim_wrapper.dtype')  # tools/train.py --amp sets type and loss_scale
    assert cfg.optim_wrapper.dtype in inspect.getsource(AmpOptimWrapper)
    assert 'dtype' in inspect.signature(AmpOptimWrapper).parameters

    cfg = told('optim_wrapper.accumulative_counts')
    assert build_optimizer(cfg, build_model(cfg))._accumulative_counts == 4

    plain = told('sync_bn')
    plain = parameter_settings(model := build_model(plain), build_optimizer(plain, model))
    decayed = told('optim_wrapper.constructor')
    lr = decayed.optim_wrapper.optimizer.lr
    decayed = parameter_settings(model := build_model(decayed), build_optimizer(decayed, model))
    assert {n: s.weight_decay for n, s in plain.items()} == {
        n: s.weight_decay for n, s in decayed.items()}
    blocks = 3 + 4 + 9 + 3
    rates = {name: s.lr / lr for name, s in decayed.items()}
    assert rates['backbone.stages.0.embed.convs.0.weight'] == pytest.approx(0.9**(blocks + 1))
    assert rates['backbone.stages.1.blocks.0.mixer.proj.bias'] == pytest.approx(0.9**(blocks - 3))
    assert {r for n, r in rates.items() if not n.startswith('backbone.')} == {1.}

    hook = HOOKS.build(dict(told('default_hooks.ema.type').default_hooks.ema))
    assert type(hook).__name__ == 'EMAHook'
    hook.before_run(type('R', (), dict(model=torch.nn.BatchNorm2d(1))))
    assert (hook.ema_model.momentum, hook.ema_model.update_buffers) == (0.0002, True)

    assert told('sync_bn').sync_bn == 'torch'
    assert "'sync_bn'" in inspect.getsource(Runner.wrap_model)


@torch.no_grad()
def test_sliding_windows():
    line = shlex.split(options('segmentation')['model.test_cfg.mode'])
    cfg = load(README_CONFIGS['segmentation'])
    parser = Parser('a tool')
    parser.add_shared_options()
    merge_options(cfg, parser.parse_args(['config', '--cfg-options', *line]).cfg_options)
    cfg.model.backbone.update(
        arch=dict(stem_hidden_dim=8, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[1] * 4),
        init_cfg=None)
    cfg.model.decode_head.update(in_channels=[16] * 4, channels=8, num_classes=2)
    cfg.model.auxiliary_head = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    windows = []
    model.backbone.register_forward_pre_hook(lambda _, x: windows.append(x[0].shape[-2:]))
    image = torch.randn(1, 3, 530, 700)
    meta = dict(img_shape=(530, 700), ori_shape=(530, 700))
    logits = model.inference(image, [meta])
    assert logits.shape == (1, 2, 530, 700)
    assert windows == [(512, 512)] * 4  # two rows, two columns

    corner = model.encode_decode(image[..., :512, :512], [meta])
    # where the other windows do not reach
    torch.testing.assert_close(logits[..., :18, :188], corner[..., :18, :188])


@pytest.mark.parametrize('name, strategy', [
    (FSDP, 'FSDPStrategy'), (FSDP.replace('_fsdp', '_deepspeed'), 'DeepSpeedStrategy')
])
def test_strategies_of_many_gpus(name, strategy):
    cfg = load(name)
    assert RUNNERS.get(cfg.runner_type).__name__ == 'FlexibleRunner'
    cls = STRATEGIES.get(cfg.strategy.pop('type'))
    assert cls.__name__ == strategy
    assert set(cfg.strategy) <= set(inspect.signature(cls).parameters)
    assert OPTIM_WRAPPERS.get(cfg.optim_wrapper.type)
    if strategy == 'FSDPStrategy':
        wrapper = cfg.strategy.model_wrapper
        assert 'auto_wrap_policy' in inspect.signature(MODEL_WRAPPERS.get(wrapper.type)).parameters
        policy = MODEL_WRAPPERS.get(wrapper.auto_wrap_policy.pop('type'))
        assert set(wrapper.auto_wrap_policy) <= set(inspect.signature(policy).parameters)
    plain = load(name.replace('_fsdp', '').replace('_deepspeed', ''))
    assert cfg.model == plain.model and cfg.optim_wrapper.optimizer == plain.optim_wrapper.optimizer
