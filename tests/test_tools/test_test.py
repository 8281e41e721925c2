import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from tiny import ROOT, SCOPES, load_main, run_tool

from mmgroupmamba.checkpoint import from_official
from mmgroupmamba.registry import MODELS


def metrics(log: str, name: str) -> float:
    return float(re.search(rf'Iter\(test\) .*{name}: ([-\d.]+)', log)[1])


@pytest.mark.parametrize('scope', SCOPES)
def test_predictions_and_pictures(scope, trained, tmp_path):
    run = trained(scope)
    done = run_tool('test', run.config, run.checkpoint, '--out', 'pred.pkl', '--show-dir', 'show',
                    cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics(done.stdout, dict(mmpretrain='top1', mmdet='segm_mAP', mmseg='mIoU')[scope])
    predictions = pickle.loads((tmp_path / 'pred.pkl').read_bytes())
    assert len(predictions) == len(list((tmp_path / 'show').rglob('*.png'))) == 8
    if scope == 'mmseg':
        assert predictions[0]['pred_sem_seg'].shape == (64, 64)
    if scope == 'mmdet':
        assert 'pred_instances' in predictions[0]


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet'])
def test_fused(scope, trained, tmp_path):
    """The same predictions from the folded model."""
    run = trained(scope)
    predictions = []
    for options in ((), ('--fuse', )):
        done = run_tool('test', run.config, run.checkpoint, '--out', 'pred.pkl', *options,
                        cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        predictions.append(pickle.loads((tmp_path / 'pred.pkl').read_bytes()))
    for one, other in zip(*predictions):
        if scope == 'mmpretrain':
            torch.testing.assert_close(other['pred_score'], one['pred_score'])
        else:
            torch.testing.assert_close(other['pred_instances']['scores'],
                                       one['pred_instances']['scores'])


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
def test_tta(scope, trained, tmp_path):
    """Test-time augmentation by flips, without a tta_pipeline in the config."""
    run = trained(scope)
    done = run_tool('test', run.config, run.checkpoint, '--tta', '--out', 'metrics.pkl',
                    '--out-item', 'metrics', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    written = pickle.loads((tmp_path / 'metrics.pkl').read_bytes())
    name = dict(mmpretrain='accuracy/top1', mmseg='mIoU')[scope]
    assert written[name] == pytest.approx(metrics(done.stdout, name), abs=1e-3)


def test_tta_of_boxes(trained, tmp_path):
    run = trained('mmdet')
    args = ['--tta', '--cfg-options', 'model.type=FasterRCNN', 'model.roi_head.mask_head=None',
            'model.roi_head.mask_roi_extractor=None', 'test_evaluator.metric=bbox']
    state = torch.load(run.checkpoint, weights_only=False)['state_dict']
    boxes = {k: v for k, v in state.items() if 'mask' not in k}
    torch.save(dict(state_dict=boxes), tmp_path / 'boxes.pth')
    done = run_tool('test', run.config, 'boxes.pth', *args, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics(done.stdout, 'bbox_mAP')


class Pickled:
    """No tensor: what a checkpoint must not hold."""

    def __reduce__(self):
        return Path, ('a', )


def test_bad_inputs(trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    main = load_main('test')
    run, other = trained('mmdet'), trained('mmseg')

    def refused(*args: object) -> str:
        assert main([str(arg) for arg in args]) == 2
        lines = [s for s in capfd.readouterr().err.splitlines() if s.startswith('error: ')]
        assert len(lines) == 1 and not (tmp_path / 'work_dirs').exists()
        return lines[0]

    assert 'FILE.pkl' in refused(run.config, run.checkpoint, '--out', 'pred.json')
    assert '--out FILE.pkl' in refused(run.config, run.checkpoint, '--out-item', 'metrics')
    swin = ROOT / 'configs/camvid/swin/mask-rcnn_swin-nano_fpn_1xb4-12e_camvid.py'
    assert 'no GroupMamba to fold' in refused(swin, run.checkpoint, '--fuse')
    assert 'augmentation for masks' in refused(run.config, run.checkpoint, '--tta')
    classifier = trained('mmpretrain').config
    assert 'does not draw' in refused(classifier, run.checkpoint, '--tta', '--show-dir', 's')
    assert 'not found: nothing.pth' in refused(run.config, 'nothing.pth')
    assert 'does not fit MaskRCNN' in refused(run.config, other.checkpoint)
    torch.save(dict(state_dict=dict(a=torch.zeros(1)), extra=Pickled()), tmp_path / 'objects.pth')
    assert 'pickled objects' in refused(run.config, 'objects.pth')
    line = refused(run.config, run.checkpoint, '--cfg-options',
                   'test_dataloader.dataset.data_root=nowhere', 'test_evaluator.ann_file=no.json',
                   'train_dataloader.dataset.data_root=unread')
    assert 'test_dataloader.dataset.data_root=PATH test_evaluator.ann_file=PATH' in line
    assert 'unread' not in line
    assert 'has no test_evaluator' in refused(
        run.config, run.checkpoint, '--cfg-options', 'test_evaluator=None')
    line = refused(other.config, other.checkpoint, '--cfg-options',
                   'model.backbone.arch.embed_dims=[32,16,16,16]')
    assert 'does not fit' in line and 'another shape' in line


OFFICIAL = """
_base_ = '{base}'
custom_imports = dict(imports=['mmgroupmamba.models.classification'], allow_failed_imports=False)
arch = dict(stem_hidden_dim=8, embed_dims=[16, 32, 32, 48], depths=[1] * 4, mlp_ratios=[2] * 4)
model = dict(
    backbone=dict(arch=arch, final_norm=False),
    neck=dict(_delete_=True, type='mmgroupmamba.ClassBlockNeck', embed_dim=48, mlp_ratio=2),
    head=dict(type='mmgroupmamba.DistilledLinearHead', num_classes=10, in_channels=48))
"""


def test_official_file_as_it_is(configs, golden, official_file, tmp_path):
    """Straight from the authors' layout to predictions: those of the modules tested elsewhere."""
    config = tmp_path / 'official.py'
    config.write_text(OFFICIAL.format(base=configs['mmpretrain']))
    done = run_tool('test', config, official_file, '--out', 'pred.pkl', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    predictions = pickle.loads((tmp_path / 'pred.pkl').read_bytes())
    assert len(predictions) == 8 and predictions[0]['pred_score'].shape == (10, )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile(config).model).eval()
    official = golden['state_dict']
    model.backbone.load_state_dict(from_official(official, model.backbone.state_dict()))
    rest = [k for k in model.state_dict() if k.startswith(('neck.', 'head.'))]
    model.load_state_dict(from_official(official, rest), strict=False)
    for prediction in predictions:
        image = cv2.imread(prediction['img_path'])[..., ::-1].astype(np.float32)
        with torch.no_grad():
            score = model(torch.from_numpy((image - 127) / 64).permute(2, 0, 1)[None]).softmax(1)
        torch.testing.assert_close(prediction['pred_score'], score[0])

    single = run_tool('test', config, official_file, '--cfg-options',
                      'model.head.type=LinearClsHead', cwd=tmp_path)
    assert single.returncode == 2
    assert 'unexpected: dist_head.weight' in single.stderr.splitlines()[-1]
    assert 'mmgroupmamba.DistilledLinearHead' in single.stderr.splitlines()[-1]
