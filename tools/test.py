"""Test a classifier, detector or segmentor: the config's default_scope picks the task."""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

import torch
from mmengine import fileio
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.evaluator import DumpResults

from mmgroupmamba.launch import (
    TASKS,
    LaunchError,
    Parser,
    build_runner,
    check_folder,
    check_run,
    leaf_datasets,
    load_config,
    run_tool,
    set_dataloaders,
    tidy_work_dir,
)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_shared_options()
    parser.add_argument('--out', metavar='FILE.pkl', help='write the results to a pickle file')
    parser.add_argument(
        '--out-item', choices=['pred', 'metrics'],
        help='what --out writes: the predictions (default) or the metrics')
    parser.add_argument('--show-dir', metavar='DIR', help='draw every image into this folder')
    parser.add_argument('--show', action='store_true', help='show every image in a window')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that --show shows an image')
    parser.add_argument(
        '--tta', action='store_true',
        help="test-time augmentation: the config's tta_model and tta_pipeline, else flips")
    parser.add_argument('--amp', action='store_true', help='test under automatic mixed precision')
    parser.add_argument(
        '--fuse', action='store_true',
        help='fold BatchNorm and the two heads for inference: the same results, sooner')
    return parser.parse_args(argv)


class DumpSegResults(DumpResults):
    """Dump the label map of each image; the class scores would fill the disk."""

    def process(self, data_batch: Any, predictions: Sequence[dict]) -> None:
        keep = ('img_path', 'ori_shape')
        self.results.extend(
            {**{k: p[k] for k in keep if k in p},
             'pred_sem_seg': p['pred_sem_seg']['data'].squeeze(0).to('cpu', torch.int16)}
            for p in predictions)


def result_dumper(scope: str, path: str) -> DumpResults:
    """The metric that writes a task's predictions to `path`."""
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults
        return DumpDetResults(path)
    return (DumpSegResults if scope == 'mmseg' else DumpResults)(path)


def set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the library's drawing hook; each library names its options differently."""
    if args.tta and cfg.default_scope == 'mmpretrain':
        raise LaunchError('--tta: mmpretrain does not draw augmented images: run --tta without '
                          '--show-dir and --show')
    cfg.setdefault('default_hooks', {})
    cfg.default_hooks.setdefault(
        'visualization', dict(type=TASKS[cfg.default_scope].visualization_hook))
    hook = cfg.default_hooks.visualization
    show_dir = args.show_dir and str(Path(args.show_dir).absolute())
    hook.update(show=args.show, wait_time=args.wait_time)
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, interval=1, out_dir=show_dir)
    elif cfg.default_scope == 'mmdet':
        hook.update(draw=True, test_out_dir=show_dir)
    else:
        hook.update(draw=True, interval=1)  # the original mmseg draws one in 50
        if show_dir:
            cfg.visualizer.vis_backends = [dict(type='LocalVisBackend', img_save_dir=show_dir)]


def has_masks(model: Any) -> Iterator[bool]:
    """Walk through a model's config; yields True for each mask head."""
    if isinstance(model, dict):
        for key, value in model.items():
            yield key == 'mask_head' and value is not None
            yield from has_masks(value)
    elif isinstance(model, (list, tuple)):
        for value in model:
            yield from has_masks(value)


def set_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation, with flips where the config has no pipeline."""
    scope = cfg.default_scope
    if scope == 'mmdet' and any(has_masks(cfg.model)):
        raise LaunchError('--tta: mmdet has no test-time augmentation for masks: test without '
                          '--tta, or a detector without a mask head')
    datasets = [dataset for _, dataset in leaf_datasets(cfg.test_dataloader.dataset, '')]
    if 'tta_pipeline' not in cfg:
        pipeline = deepcopy(datasets[0].pipeline)
        pack = pipeline.pop()
        if scope == 'mmdet':
            pack.meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                              'flip', 'flip_direction')
        # mmseg's test pipelines load the annotations last, for the flip to leave them alone
        annotations = [step for step in pipeline if step.type.endswith('LoadAnnotations')]
        steps = [step for step in pipeline if step not in annotations]
        flips = [dict(type='RandomFlip', prob=prob) for prob in (0., 1.)]
        cfg.tta_pipeline = [
            *steps,
            dict(type='TestTimeAug',
                 transforms=[flips, *([step] for step in annotations), [pack]])
        ]
    cfg.setdefault('tta_model', TASKS[scope].tta_model)
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def apply_args(cfg: Config, args: argparse.Namespace) -> None:
    for key in ('test_cfg', 'test_dataloader', 'test_evaluator'):
        if cfg.get(key) is None:
            raise LaunchError(f'{args.config} has no {key}: there is nothing to test on')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.amp:
        if cfg.default_scope == 'mmdet' and get_device() == 'cpu':
            raise LaunchError("--amp: mmcv's NMS and RoIAlign know no bfloat16 on CPU: leave it "
                              'out, or use a GPU')
        cfg.test_cfg.fp16 = True
    if args.fuse:
        if 'GroupMamba' not in str(cfg.model):
            raise LaunchError(f'--fuse: {args.config} has no GroupMamba to fold: leave it out')
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmgroupmamba.FuseHook')]
    if args.show_dir:
        check_folder(args.show_dir, '--show-dir')
    if args.show or args.show_dir:
        set_visualization(cfg, args)
    if args.tta:
        set_tta(cfg)
    set_dataloaders(cfg, not args.no_pin_memory)


def test(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise LaunchError(f'--out {args.out}: the results are pickled, so name it FILE.pkl')
    if args.out_item and not args.out:
        raise LaunchError('--out-item says what --out writes: give --out FILE.pkl too')
    cfg = load_config(args)
    apply_args(cfg, args)
    check_run(cfg, ('test', ))
    with tidy_work_dir(cfg.work_dir):
        runner = build_runner(cfg)
        if args.out and args.out_item != 'metrics':
            runner.test_evaluator.metrics.append(result_dumper(cfg.default_scope, args.out))
        metrics = runner.test()
        if args.out and args.out_item == 'metrics' and runner.rank == 0:
            fileio.dump(metrics, args.out)


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(test, argv)


if __name__ == '__main__':
    sys.exit(main())
