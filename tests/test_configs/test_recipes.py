"""The values that reach the optimiser, the schedulers and the transforms are those of the paper,
the official code and the anchors, each written here a second time by hand."""
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from building import build_model, build_optimizer, learning_rates, load, parameter_settings
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import HOOKS
from torch import nn

from mmgroupmamba.checkpoint import official_name


def get_config(name: str) -> Config:
    """A library's own config, 'mmdet::swin/...'; mmengine.hub's would install the other family."""
    scope, file = name.split('::')
    folder = Path(import_module(scope).__file__).parent / '.mim/configs'
    return Config.fromfile(folder / file)


IMAGENET = 'classification/groupmamba-tiny_8xb128_in1k.py'
COCO = 'detection/mask-rcnn_groupmamba-tiny_fpn_1x_coco.py'
ADE = 'segmentation/groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'


def pipeline_of(cfg, split: str) -> dict:
    """Transform class name -> built transform."""
    transforms = Compose(cfg[f'{split}_dataloader'].dataset.pipeline).transforms
    return {type(t).__name__: t for t in transforms}


# ---- ImageNet
@pytest.mark.parametrize('name', [
    IMAGENET, IMAGENET.replace('tiny_', 'tiny_single-head_'),
    'classification/groupmamba-tiny_finetune_1xb64-50e_custom.py'
])
def test_imagenet_weight_decay_is_the_official_rule_on_the_official_tensors(
        name, official_keys):
    cfg = load(name)
    official = official_keys['tiny']
    model = build_model(cfg)
    settings = parameter_settings(model, build_optimizer(cfg, model))
    seen = set()
    for ours, setting in settings.items():
        # every group has tensors of the same shapes
        theirs = official_name(ours.removeprefix('backbone.')).replace('#', '1')
        no_decay = len(official[theirs]) == 1 or theirs.endswith('.bias')
        assert setting.weight_decay == (0. if no_decay else 0.05), (ours, theirs)
        seen.add(theirs)
    aside = ('running_', 'num_batches_tracked', 'mamba_g2', 'mamba_g3', 'mamba_g4')
    if name != IMAGENET:
        aside += ('dist_head', )
    assert seen == {k for k in official if not any(part in k for part in aside)}


def test_imagenet_optimizer_and_clipping():
    cfg = load(IMAGENET)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    model = build_model(cfg)
    wrapper = build_optimizer(cfg, model)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    assert {s.lr for s in parameter_settings(model, wrapper).values()} == {1e-3}
    for group in wrapper.optimizer.param_groups:
        assert group['betas'] == (0.9, 0.999) and group['eps'] == 1e-8
    assert wrapper.clip_grad_kwargs == dict(max_norm=5.0)
    assert cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.train_dataloader.batch_size == 128


def test_imagenet_learning_rate():
    epoch = 50  # iterations
    rates = learning_rates(load(IMAGENET), epoch)
    warmup, total = 20 * epoch, 300 * epoch
    assert len(rates) == total
    assert rates[0] == pytest.approx(1e-6)
    for i in (1, warmup // 4, warmup // 2, warmup - 2):
        # mmengine arrives at the last iteration of the warm-up, timm one later
        assert rates[i] == pytest.approx(1e-6 + (1e-3 - 1e-6) * i / (warmup - 1))
    assert rates[warmup] == pytest.approx(1e-3)
    for i in (warmup + 1, warmup + 333, 100 * epoch, 200 * epoch, total - 1):
        cosine = (1 + math.cos(math.pi * (i - warmup) / (total - warmup))) / 2
        assert rates[i] == pytest.approx(1e-5 + (1e-3 - 1e-5) * cosine, rel=1e-5)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-4)


def test_imagenet_transforms():
    cfg = load(IMAGENET)
    train = pipeline_of(cfg, 'train')
    assert list(train) == ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'RandAugment',
                           'RandomErasing', 'PackInputs']
    crop = train['RandomResizedCrop']
    assert (crop.scale, crop.backend, crop.interpolation) == ((224, 224), 'pillow', 'bicubic')
    assert crop.crop_ratio_range == (0.08, 1.0) and crop.aspect_ratio_range == (3 / 4, 4 / 3)
    assert train['RandomFlip'].prob == 0.5
    augment = train['RandAugment']
    assert (augment.num_policies, augment.magnitude_level, augment.magnitude_std,
            augment.total_level) == (2, 9, 0.5, 10)
    assert [p['type'] for p in augment.policies] == [
        'AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize', 'SolarizeAdd',
        'ColorTransform', 'Contrast', 'Brightness', 'Sharpness', 'Shear', 'Shear', 'Translate',
        'Translate'
    ]  # yapf: disable
    erasing = train['RandomErasing']
    assert (erasing.erase_prob, erasing.mode, erasing.min_area_ratio,
            erasing.max_area_ratio) == (0.25, 'rand', 0.02, 1 / 3)
    mean, std = cfg.model.data_preprocessor.mean, cfg.model.data_preprocessor.std
    assert list(erasing.fill_color) == mean[::-1] and list(erasing.fill_std) == std[::-1]

    for split in ('val', 'test'):
        test = pipeline_of(cfg, split)
        assert list(test) == ['LoadImageFromFile', 'ResizeEdge', 'CenterCrop', 'PackInputs']
        resize = test['ResizeEdge']
        assert (resize.scale, resize.edge, resize.backend,
                resize.interpolation) == (256, 'short', 'pillow', 'bicubic')
        assert test['CenterCrop'].crop_size == (224, 224)


def test_imagenet_model_and_mixing():
    cfg = load(IMAGENET)
    model = build_model(cfg)
    assert [(type(a).__name__, a.alpha) for a in model.data_preprocessor.batch_augments.augments
            ] == [('Mixup', 0.8), ('CutMix', 1.0)]
    assert model.data_preprocessor.batch_augments.probs is None  # evenly
    assert cfg.model.head.loss == dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    assert (cfg.model.distillation, cfg.model.alpha) == ('hard', 0.5)
    assert cfg.model.teacher.model_name == 'regnety_160.deit_in1k'
    assert cfg.model.teacher.data_preprocessor == cfg.model.data_preprocessor
    for size in ('tiny', 'small', 'base'):
        assert load(IMAGENET.replace('tiny', size)).model.backbone.drop_path_rate == 0.05
    drops = [b.drop_path for stage in model.backbone.stages for b in stage.blocks]
    assert drops[-1].drop_prob == pytest.approx(0.05)


def test_imagenet_weights_are_averaged_with_their_buffers():
    cfg = load(IMAGENET)
    hook = HOOKS.build(dict(cfg.custom_hooks[0]))
    module = nn.BatchNorm1d(1)
    hook.before_run(type('Runner', (), dict(model=module)))
    average = hook.ema_model
    average.update_parameters(module)  # the first call copies
    with torch.no_grad():
        module.weight.fill_(2.)
        module.running_mean.fill_(1.)
    average.update_parameters(module)
    assert average.module.weight.item() == pytest.approx(1 + 1e-4)
    assert average.module.running_mean.item() == pytest.approx(1e-4)


def test_finetuning_decays_the_learning_rate_by_depth():
    cfg = load('classification/groupmamba-tiny_finetune_1xb64-50e_custom.py')
    model = build_model(cfg)
    settings = parameter_settings(model, build_optimizer(cfg, model))
    blocks = 3 + 4 + 9 + 3
    rate = {name: s.lr / cfg.optim_wrapper.optimizer.lr for name, s in settings.items()}
    assert rate['head.fc.weight'] == 1
    assert rate['backbone.stages.3.blocks.2.mixer.proj.weight'] == pytest.approx(0.85)
    assert rate['backbone.stages.0.blocks.0.mixer.ssm.A_log'] == pytest.approx(0.85**blocks)
    assert rate['backbone.stages.0.embed.proj.weight'] == pytest.approx(0.85**(blocks + 1))


def test_384px():
    cfg = load('classification/groupmamba-base_8xb64_in1k-384px.py')
    assert pipeline_of(cfg, 'train')['RandomResizedCrop'].scale == (384, 384)
    for split in ('val', 'test'):
        assert pipeline_of(cfg, split)['ResizeEdge'].scale == 438
        assert pipeline_of(cfg, split)['CenterCrop'].crop_size == (384, 384)
    rates = learning_rates(cfg, 10)
    assert len(rates) == 300 and rates[0] == pytest.approx(1e-8)
    assert rates[10:] == pytest.approx([1e-5] * 290)


# ---- COCO and ADE20K
@pytest.mark.parametrize('name, decay', [(COCO, 0.05), (ADE, 0.01)])
def test_dense_weight_decay(name, decay, official_keys):
    cfg = load(name)
    model = build_model(cfg)
    settings = parameter_settings(model, build_optimizer(cfg, model))
    norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    exempt = {
        f'{module_name}.{param_name}'
        for module_name, module in model.named_modules() if isinstance(module, norms)
        for param_name, _ in module.named_parameters(recurse=False)
    }
    assert 'backbone.stages.0.embed.convs.1.weight' in exempt  # the stem's BatchNorm
    official = official_keys['tiny']
    for ours in settings:
        if ours.startswith('backbone.'):
            theirs = official_name(ours.removeprefix('backbone.')).replace('#', '1')
            of_ssm = 'mamba_g1' in theirs or theirs.endswith('skip_scale')
            if of_ssm and len(official[theirs]) == 1:
                exempt.add(ours)
    assert {n for n, s in settings.items() if s.weight_decay == 0.} == exempt
    assert {s.weight_decay for s in settings.values()} == {0., decay}
    assert {s.lr for s in settings.values()} == {cfg.optim_wrapper.optimizer.lr}


@pytest.mark.parametrize('name, lr', [(COCO, 1e-4), (ADE, 6e-5)])
def test_dense_optimizer(name, lr):
    optimizer = load(name).optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.betas) == ('AdamW', lr, (0.9, 0.999))


def test_coco_learning_rate():
    epoch = 1500
    rates = learning_rates(load(COCO), epoch)
    assert len(rates) == 12 * epoch
    assert rates[0] == pytest.approx(1e-4 * 0.001)
    assert rates[500] == pytest.approx(1e-4 * (0.001 + 0.999 * 500 / 999))
    for i, factor in ((1000, 1), (9 * epoch - 1, 1), (9 * epoch, 0.1), (11 * epoch - 1, 0.1),
                      (11 * epoch, 0.01), (12 * epoch - 1, 0.01)):
        assert rates[i] == pytest.approx(1e-4 * factor)


def test_ade_learning_rate():
    rates = learning_rates(load(ADE), 1)
    assert len(rates) == 160_000
    assert rates[0] == pytest.approx(6e-5 * 1e-6)
    assert rates[750] == pytest.approx(6e-5 * 750 / 1499, rel=1e-5)
    assert rates[1500] == pytest.approx(6e-5)
    for i in (40_000, 80_750, 120_000, 159_999):
        # mmengine's arrives at the last iteration
        assert rates[i] == pytest.approx(6e-5 * (1 - (i - 1500) / 158_499), rel=1e-3, abs=1e-9)


def test_coco_data_and_model():
    cfg = load(COCO)
    train, test = pipeline_of(cfg, 'train'), pipeline_of(cfg, 'test')
    for pipeline in (train, test):
        assert pipeline['Resize'].scale == (1333, 800) and pipeline['Resize'].keep_ratio
    assert train['RandomFlip'].prob == 0.5
    assert cfg.train_cfg.max_epochs == 12
    model = build_model(cfg)
    assert model.data_preprocessor.pad_size_divisor == 32
    assert cfg.model.backbone.drop_path_rate == 0.2
    assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 80


def test_ade_data_and_model():
    cfg = load(ADE)
    train, test = pipeline_of(cfg, 'train'), pipeline_of(cfg, 'test')
    assert list(train) == ['LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop',
                           'RandomFlip', 'PhotoMetricDistortion', 'PackSegInputs']
    resize, crop = train['RandomResize'], train['RandomCrop']
    assert (resize.scale, resize.ratio_range) == ((2048, 512), (0.5, 2.0))
    assert (crop.crop_size, crop.cat_max_ratio) == ((512, 512), 0.75)
    assert train['RandomFlip'].prob == 0.5
    assert test['Resize'].scale == (2048, 512) and test['Resize'].keep_ratio
    assert cfg.val_dataloader.batch_size == 1
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160_000, 16_000)

    model = build_model(cfg)
    assert model.test_cfg.mode == 'whole' and cfg.model.backbone.drop_path_rate == 0.3
    head, auxiliary = model.decode_head, model.auxiliary_head
    assert (head.channels, head.dropout_ratio, head.num_classes) == (512, 0.1, 150)
    assert head.psp_modules.pool_scales == (1, 2, 3, 6)
    assert (auxiliary.in_index, auxiliary.channels, auxiliary.num_classes) == (2, 256, 150)
    assert (head.loss_decode.loss_weight, auxiliary.loss_decode.loss_weight) == (1.0, 0.4)


def test_ade_multi_scale_test():
    augment = Compose(load(ADE).tta_pipeline).transforms[-1]
    seen = [(c.transforms[0].scale_factor, c.transforms[1].prob) for c in augment.subroutines]
    ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert seen == [((r, r), flip) for r in ratios for flip in (0., 1.)]


# ---- the other detectors
MASK_3X = 'detection/mask-rcnn_groupmamba-tiny_fpn_ms-crop-3x_coco.py'
CASCADE = 'detection/cascade-mask-rcnn_groupmamba-tiny_fpn_4conv1fc-giou_ms-crop-3x_coco.py'
RETINA = 'detection/retinanet_groupmamba-tiny_fpn_1x_coco.py'
FASTER = 'detection/faster-rcnn_groupmamba-tiny_fpn_1x_coco.py'
SEM_FPN = 'segmentation/groupmamba-tiny_fpn_4xb4-80k_ade20k-512x512.py'
CITYSCAPES = 'segmentation/groupmamba-tiny_upernet_4xb2-160k_cityscapes-512x1024.py'


def plain(value):
    """A config's value without what says nothing: defaults that our configs leave to mmdet."""
    if isinstance(value, dict):
        silent = dict(backend_args=None, target_means=[0.] * 4)
        return {k: plain(v) for k, v in value.items() if k not in silent or v != silent[k]}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize('name', [MASK_3X, CASCADE])
def test_coco_3x_learning_rate(name):
    epoch = 1200
    rates = learning_rates(load(name), epoch)
    assert len(rates) == 36 * epoch
    assert rates[0] == pytest.approx(1e-4 * 0.001)
    for i, factor in ((1000, 1), (27 * epoch - 1, 1), (27 * epoch, 0.1), (33 * epoch - 1, 0.1),
                      (33 * epoch, 0.01), (36 * epoch - 1, 0.01)):
        assert rates[i] == pytest.approx(1e-4 * factor)


@pytest.mark.parametrize('name', [MASK_3X, CASCADE])
def test_coco_3x_trains_at_many_scales_and_tests_as_1x(name):
    cfg = load(name)
    choice = pipeline_of(cfg, 'train')['RandomChoice']
    whole, cropped = ([type(t).__name__ for t in branch.transforms]
                      for branch in choice.transforms)
    assert whole == ['RandomChoiceResize']
    assert cropped == ['RandomChoiceResize', 'RandomCrop', 'RandomChoiceResize']
    scales = [(side, 1333) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
    assert choice.transforms[0].transforms[0].scales == scales
    first, crop, last = choice.transforms[1].transforms
    assert first.scales == [(400, 1333), (500, 1333), (600, 1333)] and last.scales == scales
    assert (crop.crop_type, crop.crop_size) == ('absolute_range', (384, 600))
    assert crop.allow_negative_crop
    anchor = get_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py')
    assert plain(cfg.train_dataloader.dataset.pipeline) == plain(anchor.train_pipeline)
    assert cfg.test_dataloader == load(COCO).test_dataloader
    assert cfg.model.backbone == load(COCO).model.backbone
    assert cfg.optim_wrapper == load(COCO).optim_wrapper


def test_cascade_is_that_of_mmdet():
    ours = load(CASCADE).model
    anchor = get_config('mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-'
                        'ms-crop-3x_coco.py').model
    for part in ('roi_head', 'train_cfg', 'test_cfg'):
        assert plain(ours[part]) == plain(anchor[part]), part
    # the coder's standard deviations are 1 by default
    ours.rpn_head.bbox_coder.target_stds = [1.0] * 4
    assert plain(ours.rpn_head) == plain(anchor.rpn_head)
    heads = build_model(load(CASCADE)).roi_head.bbox_head
    assert [len(head.shared_convs) for head in heads] == [4] * 3
    assert [head.bbox_coder.stds[2] for head in heads] == [0.2, 0.1, 0.067]
    assert all(head.reg_decoded_bbox and type(head.loss_bbox).__name__ == 'GIoULoss'
               and head.loss_bbox.loss_weight == 10 for head in heads)


def test_retinanet_is_that_of_mmdet():
    ours = load(RETINA).model
    anchor = get_config('mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py').model
    assert tuple(ours.backbone.out_indices) == tuple(anchor.backbone.out_indices) == (1, 2, 3)
    ours.bbox_head.bbox_coder.target_stds = [1.0] * 4
    for part in ('bbox_head', 'train_cfg', 'test_cfg', 'data_preprocessor'):
        assert plain(ours[part]) == plain(anchor[part]), part
    anchor.neck.in_channels = [128, 348, 448]
    assert plain(ours.neck) == plain(anchor.neck)


def test_faster_rcnn_is_that_of_mmdet():
    ours = load(FASTER).model
    anchor = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py').model
    ours.rpn_head.bbox_coder.target_stds = [1.0] * 4
    for part in ('rpn_head', 'roi_head', 'train_cfg', 'test_cfg', 'data_preprocessor'):
        assert plain(ours[part]) == plain(anchor[part]), part


@pytest.mark.parametrize('name', [RETINA, FASTER])
def test_box_detectors_share_the_1x_recipe_without_masks(name):
    cfg, base = load(name), load(COCO)
    assert cfg.optim_wrapper == base.optim_wrapper
    assert cfg.param_scheduler == base.param_scheduler and cfg.train_cfg == base.train_cfg
    for split in ('train', 'test'):
        steps, with_masks = pipeline_of(cfg, split), pipeline_of(base, split)
        assert list(steps) == list(with_masks)
        assert steps['Resize'].scale == (1333, 800) and steps['Resize'].keep_ratio
        assert steps['LoadAnnotations'].with_bbox and not steps['LoadAnnotations'].with_mask
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == 'bbox'


def test_custom_coco_changes_data_classes_and_schedule_only():
    cfg, base = load('detection/mask-rcnn_groupmamba-tiny_fpn_24e_custom-coco.py'), load(COCO)
    heads = cfg.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == 2
    heads.bbox_head.num_classes = heads.mask_head.num_classes = 80
    changed = {key for key in {*cfg, *base} if cfg.get(key) != base.get(key)}
    variables = {'classes', 'num_classes', 'max_epochs', 'metainfo'}
    assert changed - variables == {
        'data_root', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator',
        'test_evaluator', 'param_scheduler', 'train_cfg'
    }
    data_keys = {'data_root', 'metainfo', 'ann_file', 'data_prefix'}
    for split in ('train', 'val', 'test'):
        ours, theirs = cfg[f'{split}_dataloader'].dataset, base[f'{split}_dataloader'].dataset
        assert {k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)} == data_keys
        assert ours.metainfo.classes == ('cat', 'dog')
    rates = learning_rates(cfg, 600)
    assert len(rates) == 24 * 600
    for i, factor in ((500, 1), (16 * 600 - 1, 1), (16 * 600, 0.1), (22 * 600, 0.01)):
        assert rates[i] == pytest.approx(1e-4 * factor)


# ---- the other segmenters
def test_semantic_fpn():
    cfg = load(SEM_FPN)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 1e-4)
    rates = learning_rates(cfg, 1)
    assert len(rates) == 80_000
    for i in (0, 1, 40_000, 79_000):
        assert rates[i] == pytest.approx(1e-4 * (1 - i / 80_000)**0.9, rel=1e-3)
    assert cfg.train_dataloader.batch_size == 4 and cfg.train_cfg.val_interval == 8000
    assert cfg.train_dataloader.dataset == load(ADE).train_dataloader.dataset
    anchor = get_config('mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py').model
    assert plain(cfg.model.decode_head) == plain(anchor.decode_head)
    anchor.neck.in_channels = [64, 128, 348, 448]
    assert plain(cfg.model.neck) == plain(anchor.neck)


def test_cityscapes():
    cfg = load(CITYSCAPES)
    anchor = get_config('mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py')
    for split in ('train', 'test'):
        ours = cfg[f'{split}_dataloader'].dataset
        theirs = anchor[f'{split}_dataloader'].dataset
        assert ours.type == theirs.type and ours.data_prefix == theirs.data_prefix
        assert plain(ours.pipeline) == plain(theirs.pipeline)
    assert pipeline_of(cfg, 'train')['RandomCrop'].crop_size == (512, 1024)
    assert pipeline_of(cfg, 'test')['Resize'].scale == (2048, 1024)
    assert tuple(cfg.model.data_preprocessor.size) == (512, 1024)
    assert cfg.optim_wrapper == load(ADE).optim_wrapper
    assert cfg.param_scheduler == load(ADE).param_scheduler
    assert build_model(cfg).decode_head.num_classes == 19


# ---- CamVid
CAMVID = {
    'camvid/groupmamba-tiny_upernet_1xb8-4k_camvid-360x480.py': (4000, 200, 1e-4, 1e-3),
    'camvid/groupmamba-nano_upernet_1xb8-2k_camvid-240x320.py': (2000, 100, 2e-3, 1e-2),
}


@pytest.mark.parametrize('name', CAMVID)
def test_camvid_segmentation(name):
    iterations, warmup, lr, start = CAMVID[name]
    cfg = load(name)
    rates = learning_rates(cfg, 1)
    assert len(rates) == iterations and cfg.train_cfg.val_interval == iterations // 4
    assert rates[0] == pytest.approx(lr * start) and rates[warmup] == pytest.approx(lr)
    assert rates[-1] == pytest.approx(0, abs=lr * 1e-3)
    height, width = map(int, name.removesuffix('.py').rsplit('-', 1)[1].split('x'))
    assert pipeline_of(cfg, 'train')['RandomCrop'].crop_size == (height, width)
    assert 'Resize' not in pipeline_of(cfg, 'test')
    assert len(cfg.test_dataloader.dataset.metainfo.palette) == 11


@pytest.mark.parametrize('name, drops, lr', [
    ('camvid/mask-rcnn_groupmamba-tiny_fpn_1xb4-24e_camvid.py', (16, 22, 24), 1e-4),
    ('camvid/mask-rcnn_groupmamba-nano_fpn_1xb4-12e_camvid.py', (8, 11, 12), 1e-3),
])
def test_camvid_instances(name, drops, lr):
    epoch = 100
    cfg = load(name)
    rates = learning_rates(cfg, epoch)
    assert len(rates) == drops[2] * epoch
    for i, factor in ((200, 1), (drops[0] * epoch, 0.1), (drops[1] * epoch, 0.01)):
        assert rates[i] == pytest.approx(lr * factor)
    assert cfg.model.rpn_head.anchor_generator.scales == [4]
    assert pipeline_of(cfg, 'test')['Resize'].scale == (480, 360)
