"""Every config parses, and all it names builds and fits together."""
import re
from collections.abc import Iterable

import pytest
import yaml
from building import (
    CONFIGS,
    ROOT,
    build_model,
    build_optimizer,
    build_schedulers,
    load,
    parameter_settings,
)
from mmengine.dataset import Compose
from mmengine.evaluator import Evaluator
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, MODELS, VISUALIZERS

from mmgroupmamba.models.groupmamba import ARCHS

NAMED = [name for name in CONFIGS if not name.startswith('shapes/')]


@pytest.fixture(params=CONFIGS)
def cfg(request):
    return load(request.param)


def test_model_optimizer_and_schedules_build(cfg):
    model = build_model(cfg)
    wrapper = build_optimizer(cfg, model)
    assert parameter_settings(model, wrapper)
    for epoch_length in (1, 100):
        assert build_schedulers(cfg, wrapper, epoch_length)
    if 'tta_model' in cfg:
        MODELS.build(dict(cfg.tta_model, module=model))


def test_widths_follow_the_arch(cfg):
    dims = list(ARCHS[cfg.model.backbone.arch]['embed_dims'])
    if cfg.default_scope == 'mmpretrain':
        assert cfg.model.head.in_channels == dims[3]
        assert cfg.model.neck.get('embed_dim', dims[3]) == dims[3]
        return
    dims = [dims[i] for i in cfg.model.backbone.get('out_indices', range(4))]
    if 'neck' in cfg.model:
        assert list(cfg.model.neck.in_channels) == dims
    else:
        assert list(cfg.model.decode_head.in_channels) == dims
        assert cfg.model.auxiliary_head.in_channels == dims[cfg.model.auxiliary_head.in_index]


def dicts(value):
    """Every dict inside a config, at any depth."""
    if isinstance(value, dict):
        yield value
    if not isinstance(value, str) and isinstance(value, Iterable):
        for part in value.values() if isinstance(value, dict) else value:
            yield from dicts(part)


def test_heads_have_the_classes_of_the_data(cfg):
    dataset = DATASETS.build({**cfg.val_dataloader.dataset, 'lazy_init': True})
    if cfg.default_scope == 'mmpretrain':
        classes = cfg.model.data_preprocessor.num_classes
    else:
        classes = len(dataset.metainfo['classes'])
    found = [part['num_classes'] for part in dicts(cfg.model)
             if 'num_classes' in part and part.get('type') != 'mmpretrain.TimmClassifier']
    assert found and set(found) == {classes}
    if cfg.default_scope == 'mmseg':
        assert tuple(build_size(cfg)) == tuple(cfg.model.data_preprocessor.size)


def build_size(cfg):
    """(H, W) of a segmentation config's training images."""
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'RandomCrop':
            return step.crop_size
    return cfg.model.data_preprocessor.size  # the shapes are drawn in it


def test_data_builds_without_data(cfg):
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        dataset = DATASETS.build({**loader.dataset, 'lazy_init': True})
        assert len(dataset.pipeline.transforms) == len(loader.dataset.pipeline)
        assert DATA_SAMPLERS.get(loader.sampler.type)
    if 'tta_pipeline' in cfg:
        Compose(cfg.tta_pipeline)


def test_runtime_builds(cfg, tmp_path):
    VISUALIZERS.build(dict(cfg.visualizer, name=cfg.filename, save_dir=tmp_path))
    for hook in [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]:
        HOOKS.build(dict(hook))
    for key in ('val_evaluator', 'test_evaluator'):
        Evaluator({k: v for k, v in cfg[key].items() if k != 'ann_file'})  # read at once


@pytest.mark.parametrize('name', NAMED)
def test_conventions(name):
    """What the names promise, the learning rate is scaled from, and the files come from."""
    cfg = load(name)
    assert 'checkpoint_guard' in cfg.default_hooks
    size = re.search(r'_(\d+)xb(\d+)', name)  # mmdet's names leave their 8 x 2 out
    gpus, batch = map(int, size.groups()) if size else (8, 2)
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=gpus * batch)
    assert cfg.model.backbone.arch in name
    official = f'checkpoints/groupmamba_{cfg.model.backbone.arch}.pth'
    if cfg.default_scope == 'mmpretrain':
        assert cfg.load_from in (None, official)
    elif cfg.model.backbone.arch == 'nano':  # ours: nobody published weights
        assert cfg.load_from is None and cfg.model.backbone.init_cfg is None
    else:
        assert cfg.load_from is None
        assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=official)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_listed(name):
    folder, file = name.split('/')
    assert f']({file})' in (ROOT / 'configs' / folder / 'README.md').read_text()


@pytest.mark.parametrize('folder', ['classification', 'detection', 'segmentation'])
def test_example_of_the_readme(folder, tmp_path):
    readme = (ROOT / 'configs' / folder / 'README.md').read_text()
    example, = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
    file = tmp_path / 'own.py'
    file.write_text(example.replace("'configs/", f"'{ROOT}/configs/"))
    cfg = load(file)
    assert build_optimizer(cfg, build_model(cfg))
    for split in ('train', 'val', 'test'):
        DATASETS.build({**cfg[f'{split}_dataloader'].dataset, 'lazy_init': True})


def test_model_index_claims_nothing_of_ours():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    metafiles = [yaml.safe_load((ROOT / part).read_text()) for part in index['Import']]
    models = [model for metafile in metafiles for model in metafile['Models']]
    listed = {model['Config'].removeprefix('configs/') for model in models}
    dense = {name for name in NAMED if not name.startswith('classification/')}
    aside = re.compile('custom|_fsdp|_deepspeed')  # examples, no models
    assert {name for name in listed if name in dense} == {
        name for name in dense if not aside.search(name)}
    assert len(listed) == len(models)
    for model in models:
        assert (ROOT / model['Config']).is_file()
        assert 'Weights' not in model  # the authors' stand under Converted From
        for result in model.get('Results', []):
            assert all(metric.endswith('(paper)') for metric in result['Metrics'])
