import pytest
import torch

from mmgroupmamba.checkpoint import CheckpointError, infer_arch, load_backbone, read_checkpoint
from mmgroupmamba.convert import convert_file, mm_to_official, official_to_mm, template
from mmgroupmamba.models import GroupMamba
from mmgroupmamba.models.groupmamba import ARCHS


def equal(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(
        torch.equal(v, other[k]) and v.dtype == other[k].dtype for k, v in one.items())


@pytest.mark.parametrize('variant', ['tiny', 'small', 'base'])
@pytest.mark.parametrize('target', ['classifier', 'backbone'])
def test_the_official_variants_convert_whole(official_keys, variant, target):
    """Each key has its place, in shapes that the model has, and comes back to it."""
    official = {k: torch.empty(shape, device='meta') for k, shape in official_keys[variant].items()}
    assert infer_arch(official) == ARCHS[variant]
    ours = official_to_mm(official, target, 'tiny.pth')
    want = template(ARCHS[variant], target, two_heads=True)
    if target == 'classifier':
        want = {k if k.startswith(('neck', 'head')) else f'backbone.{k}': v
                for k, v in want.items()}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in want.items()}
    back = mm_to_official(ours, target, 'mm.pth')
    heads = ('post_network.', 'head.', 'dist_head.')
    assert {k: list(v.shape) for k, v in back.items()} == {
        k: v for k, v in official_keys[variant].items()
        if target == 'classifier' or not k.startswith(heads)}


@pytest.mark.parametrize('target', ['classifier', 'backbone'])
def test_round_trip_of_files_is_bit_exact(golden, official_file, tmp_path, target):
    ours, back = str(tmp_path / 'ours.pth'), str(tmp_path / 'back.pth')
    line = convert_file(official_file, ours, 'mm', target)
    assert f'variant custom, made of {len(golden["state_dict"])} in' in line
    convert_file(ours, back, 'official', target)
    heads = ('post_network.', 'head.', 'dist_head.')
    want = {k: v for k, v in golden['state_dict'].items()
            if target == 'classifier' or not k.startswith(heads)}
    got = torch.load(back, weights_only=True)['model']
    assert equal({k: got[k] for k in want}, want) and len(got) == len(want)


def test_what_is_written(golden, official_file, tmp_path):
    path = tmp_path / 'ours.pth'
    convert_file(official_file, str(path), 'mm', 'backbone')
    content = torch.load(path, weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in content['state_dict'].values())
    meta = content['meta']
    assert (meta['source'], meta['variant'], meta['content']) == (
        'official_pico.pth', 'custom', 'backbone')
    assert len(meta['source_sha256']) == 64
    # no larger than its tensors: a view would drag its whole storage along
    size = sum(v.numel() * v.element_size() for v in content['state_dict'].values())
    assert path.stat().st_size < size + 1000 * len(content['state_dict'])
    one, other = GroupMamba(golden['arch']), GroupMamba(golden['arch'])
    load_backbone(one, str(path))
    load_backbone(other, official_file)
    assert equal(one.state_dict(), other.state_dict())
    with pytest.raises(CheckpointError, match='exists: name another file, or say --overwrite'):
        convert_file(official_file, str(path), 'mm', 'backbone')
    convert_file(official_file, str(path), 'mm', 'classifier', overwrite=True)
    assert 'head.dist_fc.weight' in torch.load(path, weights_only=True)['state_dict']


def test_a_file_with_one_head(golden, tmp_path):
    state = {k: v for k, v in golden['state_dict'].items() if not k.startswith('dist_head.')}
    torch.save(state, tmp_path / 'one.pth')
    convert_file(str(tmp_path / 'one.pth'), str(tmp_path / 'ours.pth'), 'mm', 'classifier')
    ours = torch.load(tmp_path / 'ours.pth', weights_only=True)['state_dict']
    assert {k for k in ours if k.startswith('head.')} == {'head.fc.weight', 'head.fc.bias'}


def test_of_both_weights_the_average_is_taken(golden, tmp_path):
    plain = {k: torch.zeros_like(v) for k, v in golden['state_dict'].items()}
    torch.save(dict(model=plain, model_ema=golden['state_dict']), tmp_path / 'both.pth')
    convert_file(str(tmp_path / 'both.pth'), str(tmp_path / 'ours.pth'), 'mm', 'classifier')
    ours = torch.load(tmp_path / 'ours.pth', weights_only=True)['state_dict']
    assert torch.equal(ours['head.fc.weight'], golden['state_dict']['head.weight'])


def test_every_unmatched_key_is_named(golden):
    state = dict(golden['state_dict'])
    gone = [k for k in state if k.startswith('block2.0.mlp.')] + ['norm3.weight']
    for key in gone:
        state.pop(key)
    with pytest.raises(CheckpointError, match='incomplete'):
        official_to_mm(state, 'classifier', 'f.pth')

    state = dict(golden['state_dict'])
    gone = [k for k in state if k.startswith('block2.0.attn.mamba_g3.')] + ['norm3.weight']
    for key in gone:
        state.pop(key)
    more = [f'extra.{i}' for i in range(7)]
    state.update({k: torch.zeros(1) for k in more})
    state['norm2.bias'] = torch.zeros(3)
    with pytest.raises(CheckpointError) as info:
        official_to_mm(state, 'classifier', 'f.pth')
    line = str(info.value)
    assert all(key in line for key in (*gone, *more)) and '\n' not in line
    assert f'{len(gone)} missing' in line and '7 unknown' in line
    assert 'norm2.bias (file (3,)' in line


@pytest.mark.parametrize('to, state, words', [
    ('mm', {'conv1.weight': torch.zeros(1)}, 'not in the official layout: it starts with conv1'),
    ('mm', {'backbone.stages.0.embed.proj.weight': torch.zeros(1)}, 'our names already'),
    ('official', {'patch_embed1.proj.weight': torch.zeros(1)}, 'in the official layout already'),
    ('official', {'layer4.weight': torch.zeros(1)}, 'holds no GroupMamba of four stages'),
])
def test_another_layout_is_refused(to, state, words, tmp_path):
    torch.save(state, tmp_path / 'src.pth')
    with pytest.raises(CheckpointError, match=words):
        convert_file(str(tmp_path / 'src.pth'), str(tmp_path / 'dst.pth'), to, 'classifier')
    assert [p.name for p in tmp_path.iterdir()] == ['src.pth']


def test_a_detector_gives_its_backbone_only(golden, tmp_path):
    detector = {f'backbone.{k}': v for k, v in GroupMamba(golden['arch']).state_dict().items()}
    detector['neck.lateral_convs.0.conv.weight'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r'unknown: .*neck\.lateral_convs'):
        mm_to_official(detector, 'classifier', 'd.pth')
    official = mm_to_official(detector, 'backbone', 'd.pth')
    assert torch.equal(official['norm4.weight'], detector['backbone.stages.3.norm.weight'])
    torch.save(dict(model=official), tmp_path / 'o.pth')
    load_backbone(GroupMamba(golden['arch']), str(tmp_path / 'o.pth'))
    assert read_checkpoint(str(tmp_path / 'o.pth'))
