"""Tiny data and configs for the three tasks, and the tools run on them."""
import importlib.util
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
SCOPES = ('mmpretrain', 'mmdet', 'mmseg')
COLOURS = {'red': (40, 40, 220), 'green': (40, 200, 40)}
SIZE = 64
ARCH = 'dict(stem_hidden_dim=8, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[2] * 4)'

COMMON = """
_base_ = r'{root}/configs/_base_/{base}_runtime.py'
load = [dict(type='LoadImageFromFile')]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
val_cfg = dict()
test_cfg = dict()
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=2, save_best=None))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
classes = ('red', 'green')
backbone = dict(type='mmgroupmamba.GroupMamba', arch={arch})


def loader(dataset, batch_size, sampler):
    return dict(
        batch_size=batch_size, num_workers=0, sampler=dict(type=sampler),
        dataset=dict(data_root=r'{data}', metainfo=dict(classes=classes), **dataset))
"""

CLASSIFICATION = """
backbone.update(out_indices=(3, ))
model = dict(
    type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=16,
              loss=dict(type='CrossEntropyLoss'), topk=(1, )))
data_preprocessor = dict(num_classes=2, mean=[127.] * 3, std=[64.] * 3, to_rgb=True)
dataset = dict(type='CustomDataset', data_prefix='folders',
               pipeline=[*load, dict(type='PackInputs')])
train_dataloader = loader(dataset, 4, 'InfiniteSampler')
val_dataloader = loader(dataset, 4, 'DefaultSampler')
val_evaluator = dict(type='Accuracy', topk=(1, ))
"""

DETECTION = """
anchors = dict(type='AnchorGenerator', scales=[4], ratios=[1.], strides=[4, 8, 16, 32])
coder = dict(type='DeltaXYWHBBoxCoder')
roi_extractor = dict(
    type='SingleRoIExtractor', out_channels=16, featmap_strides=[4, 8, 16, 32],
    roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=1))
assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3)
sampler = dict(type='RandomSampler', num=16, pos_fraction=0.5, add_gt_as_proposals=False)
proposals = dict(
    nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
model = dict(
    type='MaskRCNN', backbone=backbone,
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[127.] * 3, std=[64.] * 3,
                           bgr_to_rgb=True, pad_mask=True, pad_size_divisor=32),
    neck=dict(type='FPN', in_channels=[16] * 4, out_channels=16, num_outs=4),
    rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16, anchor_generator=anchors,
                  bbox_coder=coder),
    roi_head=dict(
        type='StandardRoIHead', bbox_roi_extractor=roi_extractor,
        bbox_head=dict(type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=16,
                       num_classes=2, bbox_coder=coder),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(type='FCNMaskHead', num_convs=1, in_channels=16, conv_out_channels=16,
                       num_classes=2)),
    train_cfg=dict(
        rpn=dict(assigner=assigner, sampler=sampler, allowed_border=-1, pos_weight=-1),
        rpn_proposal=proposals,
        rcnn=dict(assigner=assigner, sampler=sampler, mask_size=14, pos_weight=-1)),
    test_cfg=dict(
        rpn=proposals,
        rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5,
                  mask_thr_binary=0.5)))
steps = [*load, dict(type='Resize', scale=(64, 64)),
         dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
         dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                               'scale_factor'))]
dataset = dict(type='CocoDataset', ann_file='instances.json', data_prefix=dict(img='images'),
               pipeline=steps)
train_dataloader = loader(dataset, 2, 'InfiniteSampler')
val_dataloader = loader(dict(dataset, test_mode=True), 1, 'DefaultSampler')
val_evaluator = dict(type='CocoMetric', ann_file=r'{data}/instances.json', metric=['bbox', 'segm'])
"""

SEGMENTATION = """
model = dict(
    type='EncoderDecoder', backbone=backbone,
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.] * 3, std=[64.] * 3,
                           bgr_to_rgb=True, size=(64, 64), seg_pad_val=255),
    decode_head=dict(type='FCNHead', in_channels=16, in_index=3, channels=16, num_convs=1,
                     concat_input=False, num_classes=2, align_corners=False),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
dataset = dict(type='BaseSegDataset', img_suffix='.png',
               data_prefix=dict(img_path='images', seg_map_path='labels'),
               pipeline=[*load, dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
train_dataloader = loader(dataset, 4, 'InfiniteSampler')
val_dataloader = loader(dataset, 1, 'DefaultSampler')
val_evaluator = dict(type='IoUMetric')
"""

TASKS = {
    'mmpretrain': ('classification', CLASSIFICATION),
    'mmdet': ('detection', DETECTION),
    'mmseg': ('segmentation', SEGMENTATION),
}


class Trained(NamedTuple):
    """A config and the work_dir of its short training."""
    scope: str
    config: Path
    work_dir: Path
    log: str

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / 'iter_4.pth'


# 8 of the 9 seconds that a tool takes to start; none of it registers a model
PRELOADED = ['torch', 'torchvision', 'mmengine.runner', 'mmcv.ops', 'matplotlib.pyplot',
             'scipy.stats', 'sklearn.metrics']
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(PRELOADED)


def run_tool(tool: str, *args: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run tools/<tool>.py in a process of its own."""
    return run_script(ROOT / 'tools' / f'{tool}.py', *args, **kwargs)


def run_two(script: Path, *args: object, port: int) -> list[str]:
    """What two processes of a script that know of each other print."""

    def run(rank: int) -> subprocess.CompletedProcess:
        return run_script(script, *args, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2,
                          LOCAL_WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)

    with ThreadPoolExecutor() as pool:
        both = list(pool.map(run, range(2)))
    for done in both:
        assert done.returncode == 0, done.stderr
    return [done.stdout for done in both]


def run_script(script: Path, *args: object, cwd: Optional[Path] = None, timeout: int = 300,
               **env: object) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, which starts with PRELOADED imported."""
    argv = [str(script), *map(str, args)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in env.items()}}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        process = PROCESSES.Process(target=_run_script, args=(argv, cwd, env, outputs))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        texts = [output.read_text() for output in outputs]
    return subprocess.CompletedProcess(argv, process.exitcode, *texts)


def _run_script(argv: list[str], cwd: Optional[Path], env: dict[str, str], outputs: list[Path]
                ) -> None:
    for stream, output in zip((1, 2), outputs):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), stream)
    if cwd is not None:
        os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name='__main__')


def make_data(folder: Path, count: int = 8) -> None:
    """Grey noise with one coloured rectangle each, in the layouts of all three libraries."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for name in ('images', 'labels', *(f'folders/{colour}' for colour in COLOURS)):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        label = i % 2
        colour = list(COLOURS)[label]
        image = rng.integers(90, 160, (SIZE, SIZE, 3), np.uint8)
        x, y = rng.integers(2, SIZE // 2, 2).tolist()
        w, h = rng.integers(16, SIZE // 2 - 2, 2).tolist()
        image[y:y + h, x:x + w] = COLOURS[colour]
        labels = np.full((SIZE, SIZE), 255, np.uint8)
        labels[y:y + h, x:x + w] = label
        labels[:4] = 1 - label
        cv2.imwrite(str(folder / f'images/{i}.png'), image)
        cv2.imwrite(str(folder / f'folders/{colour}/{i}.png'), image)
        cv2.imwrite(str(folder / f'labels/{i}.png'), labels)
        images.append(dict(id=i, file_name=f'{i}.png', width=SIZE, height=SIZE))
        annotations.append(dict(
            id=i + 1, image_id=i, category_id=label + 1, bbox=[x, y, w, h], area=w * h, iscrowd=0,
            segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]))
    categories = [dict(id=i + 1, name=colour) for i, colour in enumerate(COLOURS)]
    (folder / 'instances.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def load_main(tool: str) -> Callable[[list[str]], int]:
    """tools/<tool>.py's main function, to try many bad inputs in one process."""
    spec = importlib.util.spec_from_file_location(f'{tool}_tool', ROOT / f'tools/{tool}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
