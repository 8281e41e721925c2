import os
import re
import sys
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.optim import OptimWrapper
from mmengine.runner import CheckpointLoader

from mmgroupmamba.checkpoint import (
    CheckpointError,
    CheckpointHook,
    extract_state_dict,
    from_official,
    load_backbone,
    official_name,
    read_checkpoint,
    to_official,
    use_safe_reader,
)
from mmgroupmamba.models import GroupMamba


class Arbitrary:
    """Something a checkpoint should not hold."""


@pytest.fixture
def save(tmp_path):

    def _save(content, name='file.pth') -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return _save


def fake_official(keys, variant):
    """A state dict with the names and shapes of an official one."""
    return {k: torch.full(shape, 0.5) for k, shape in keys[variant].items()}


@pytest.mark.parametrize('variant', ['tiny', 'small', 'base'])
def test_every_official_key_has_its_place(official_keys, variant):
    official = official_keys[variant]
    with torch.device('meta'):
        backbone = GroupMamba(variant).state_dict()
    neck = [k for k in official if k.startswith('post_network.')]
    used = [official_name(name) for name in backbone]
    used = {u.replace('#', g) for u in used for g in '1234'}
    assert used <= set(official)
    left = set(official) - used - set(neck)
    assert left == {'head.weight', 'head.bias', 'dist_head.weight', 'dist_head.bias'}
    tensors = {k: torch.empty(shape, device='meta') for k, shape in official.items()}
    ours = from_official(tensors, backbone)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in backbone.items()}


@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: {'model': state},
    lambda state: {'model': {}, 'model_ema': state, 'epoch': 3},
    lambda state: {'state_dict': state, 'meta': {'epoch': 3}},
    lambda state: {'model': OrderedDict((f'module.{k}', v) for k, v in state.items())},
], ids=['plain', 'model', 'model_ema', 'state_dict', 'module.'])
def test_official_file_loads_as_it_is(golden, save, wrap):
    path = save(wrap(golden['state_dict']))
    model = GroupMamba(golden['arch'], init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    want = from_official(golden['state_dict'], model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize('kwargs', [dict(out_indices=(0, 1)), dict(out_indices=(3, ),
                                                                   final_norm=False)])
def test_what_is_not_built_is_set_aside(golden, official_file, kwargs):
    model = GroupMamba(golden['arch'], **kwargs)
    load_backbone(model, official_file)
    assert torch.equal(model.state_dict()['stages.1.norm.weight'],
                       golden['state_dict']['norm2.weight'])


def test_round_trip_is_bit_exact(golden):
    ours = from_official(golden['state_dict'], GroupMamba(golden['arch']).state_dict())
    back = to_official(ours)
    left = {k for k in golden['state_dict'] if k not in back}
    assert all(k.startswith(('post_network.', 'head.', 'dist_head.')) for k in left)
    for name, tensor in back.items():
        assert torch.equal(tensor, golden['state_dict'][name]), name


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_own_checkpoint(golden, save, prefix):
    source = GroupMamba(golden['arch'])
    state = {prefix + k: v for k, v in source.state_dict().items()}
    if prefix:
        state['roi_head.bbox_head.fc_cls.weight'] = torch.zeros(3, 3)
    target = GroupMamba(golden['arch'])
    load_backbone(target, save({'state_dict': state, 'meta': {}}))
    for one, other in zip(source.state_dict().values(), target.state_dict().values()):
        assert torch.equal(one, other)


def test_own_classifier_gives_its_last_norm(golden, save):
    classifier = GroupMamba(golden['arch'], out_indices=(3, ), final_norm=False)
    state = {f'backbone.{k}': v for k, v in classifier.state_dict().items()}
    state['neck.norm.weight'] = torch.full((48, ), 2.)
    state['neck.norm.bias'] = torch.full((48, ), 3.)
    dense = GroupMamba(golden['arch'])
    load_backbone(dense, save({'state_dict': state}))
    assert (dense.stages[3].norm.weight == 2).all() and (dense.stages[3].norm.bias == 3).all()


def test_another_variant_is_named(official_keys, save):
    path = save(fake_official(official_keys, 'small'))
    with pytest.raises(CheckpointError) as info:
        load_backbone(GroupMamba('tiny'), path)
    message = str(info.value)
    assert "does not fit GroupMamba arch 'tiny' (the file is of arch 'small')" in message
    assert 'unexpected: block3.' in message and 'of another shape: stages.0' in message
    assert '\n' not in message


def test_one_missing_and_one_unknown_key_are_named(golden, save):
    state = dict(golden['state_dict'])
    del state['block2.0.attn.mamba_g3.Ds']
    state['block1.0.attn.extra'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r'1 missing: stages\.1\.blocks\.0\.mixer\.ssm\.D; '
                       r'1 unexpected: block1\.0\.attn\.extra$'):
        load_backbone(GroupMamba(golden['arch']), save(state))


def test_another_model_is_refused(save):
    path = save({'state_dict': {'layer1.0.conv1.weight': torch.zeros(3, 3)}})
    with pytest.raises(CheckpointError, match='holds no GroupMamba.*layer1.0.conv1.weight'):
        load_backbone(GroupMamba('nano'), path)


def test_missing_file():
    with pytest.raises(CheckpointError, match='checkpoint not found: nowhere/tiny.pth'):
        read_checkpoint('nowhere/tiny.pth')


@pytest.mark.parametrize('keep', [0, 10, 1000, -1000])
def test_truncated_file(official_file, keep):
    content = open(official_file, 'rb').read()
    with open(official_file, 'wb') as f:
        f.write(content[:keep])
    with pytest.raises(CheckpointError, match='damaged') as info:
        read_checkpoint(official_file)
    assert '\n' not in str(info.value)


def test_text_file_is_no_checkpoint(tmp_path):
    path = tmp_path / 'readme.pth'
    path.write_text('version https://git-lfs.github.com/spec/v1\n')
    with pytest.raises(CheckpointError, match='damaged'):
        read_checkpoint(str(path))


@pytest.mark.parametrize('content', [torch.zeros(3), [1, 2], {'epoch': 3}])
def test_file_without_state_dict(save, content):
    path = save(content)
    with pytest.raises(CheckpointError, match='holds (a|no)'):
        extract_state_dict(read_checkpoint(path), path)


def test_pickled_object_is_named_with_the_way_out(golden, save, tmp_path):
    path = save({'model': golden['state_dict'], 'config': Arbitrary()})
    with pytest.raises(CheckpointError, match=r'holds pickled objects \(\S*Arbitrary\)') as info:
        read_checkpoint(path)
    assert '\n' not in str(info.value)
    command = re.search(r'python -c "(.*)"', str(info.value))[1]
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(command)  # what the message tells the user to run
        load_backbone(GroupMamba(golden['arch']), 'tensors_only.pth')
    finally:
        os.chdir(before)


def test_mmengine_history_is_no_obstacle(golden, save):
    buffer = HistoryBuffer(np.array([1., 2.]), np.array([1, 1]))
    content = {
        'state_dict': GroupMamba(golden['arch']).state_dict(),
        'message_hub': {'log_scalars': OrderedDict(loss=buffer), 'loss': np.float64(3.)},
    }
    read = read_checkpoint(save(content))
    assert read['message_hub']['log_scalars']['loss'].current() == 2


class CfgNode(dict):
    """As yacs has it, for a file from the official training script."""

    def __init__(self, content):
        super().__init__(content)
        self.__dict__['__immutable__'] = True


@pytest.fixture
def yacs_file(golden, save, monkeypatch):
    """An official training checkpoint, which carries its yacs config; yacs is not installed."""
    module = SimpleNamespace(CfgNode=CfgNode)
    monkeypatch.setitem(sys.modules, 'yacs', SimpleNamespace(config=module))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    monkeypatch.setattr(CfgNode, '__module__', 'yacs.config')
    path = save({'model': golden['state_dict'], 'config': CfgNode({'A': CfgNode({'B': 1})})})
    monkeypatch.undo()
    return path


def test_yacs_config_is_read_as_data(golden, yacs_file):
    assert read_checkpoint(yacs_file)['config'] == {'A': {'B': 1}}
    load_backbone(GroupMamba(golden['arch']), yacs_file)


def test_mmengine_reads_through_ours(yacs_file, save, monkeypatch):
    """load_from, resume and every init_cfg: all go through mmengine's loader."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    evil = save({'state_dict': {'a': torch.zeros(1)}, 'x': Evil()}, 'evil.pth')
    use_safe_reader()
    assert CheckpointLoader.load_checkpoint(yacs_file, 'cpu')['config'] == {'A': {'B': 1}}
    with pytest.raises(CheckpointError, match='holds pickled objects'):
        PretrainedInit(evil)(torch.nn.Linear(1, 1))


class Evil:
    """Asks for an attribute of something that is not mmengine's history."""

    def __reduce__(self):
        return getattr, (OrderedDict, 'fromkeys')


def test_getattr_is_for_the_history_only(golden, save):
    with pytest.raises(CheckpointError, match='holds pickled objects'):
        read_checkpoint(save({'model': golden['state_dict'], 'x': Evil()}))


class Dense(torch.nn.Module):

    def __init__(self, arch):
        super().__init__()
        self.backbone = GroupMamba(arch)
        self.decode_head = torch.nn.Conv2d(48, 3, 1)


def make_runner(model, training=True, resume=False):
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1)) if training else dict()
    return SimpleNamespace(model=model, optim_wrapper=wrapper, _resume=resume, _load_from='x.pth')


def test_hook_translates_official_files(golden):
    model = Dense(golden['arch'])
    checkpoint = {'model': golden['state_dict']}
    CheckpointHook().after_load_checkpoint(make_runner(model), checkpoint)
    state = checkpoint['state_dict']
    assert torch.equal(state['backbone.stages.3.norm.weight'], golden['state_dict']['norm4.weight'])
    assert set(model.state_dict()) - set(state) == {'decode_head.weight', 'decode_head.bias'}


@pytest.mark.parametrize('training, resume', [(False, False), (True, True)])
def test_hook_wants_every_key_to_test_and_to_resume(golden, training, resume):
    model = Dense(golden['arch'])
    runner = make_runner(model, training, resume)
    CheckpointHook().after_load_checkpoint(runner, {'state_dict': model.state_dict()})
    with pytest.raises(CheckpointError, match='does not fit Dense: 2 missing: decode_head.weight'):
        CheckpointHook().after_load_checkpoint(runner, {'model': golden['state_dict']})


def test_hook_takes_our_classifier_into_a_dense_model(golden):
    classifier = GroupMamba(golden['arch'], out_indices=(3, ), final_norm=False)
    state = {f'backbone.{k}': v for k, v in classifier.state_dict().items()}
    state['neck.norm.weight'] = torch.full((48, ), 2.)
    state['neck.norm.bias'] = torch.zeros(48)
    checkpoint = {'state_dict': state}
    model = Dense(golden['arch'])
    CheckpointHook().after_load_checkpoint(make_runner(model), checkpoint)
    assert (checkpoint['state_dict']['backbone.stages.3.norm.weight'] == 2).all()


def test_hook_leaves_other_backbones_alone():
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
    checkpoint = {'state_dict': model.state_dict()}
    CheckpointHook().after_load_checkpoint(make_runner(model), checkpoint)
    assert set(checkpoint['state_dict']) == {'backbone.0.weight', 'backbone.0.bias'}


@pytest.mark.parametrize('training', [True, False])
def test_hook_keeps_the_average_for_training_only(golden, training):
    """To test, the state dict is the average already; EMAHook's swap would load nothing in TTA."""
    model = Dense(golden['arch'])
    checkpoint = {'state_dict': model.state_dict(), 'ema_state_dict': {'steps': torch.zeros(1)}}
    CheckpointHook().after_load_checkpoint(make_runner(model, training), checkpoint)
    assert ('ema_state_dict' in checkpoint) == training


def test_hook_refuses_another_variant(golden):
    model = Dense({**golden['arch'], 'depths': (1, 1, 2, 1)})
    with pytest.raises(CheckpointError, match='missing: stages.2.blocks.1'):
        CheckpointHook().after_load_checkpoint(make_runner(model), {'model': golden['state_dict']})
