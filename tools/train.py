"""Train a classifier, detector or segmentor: the config's default_scope picks the task."""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import sys
from typing import Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from mmgroupmamba.launch import (
    LaunchError,
    Parser,
    build_runner,
    check_run,
    load_config,
    run_tool,
    set_dataloaders,
    tidy_work_dir,
)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared_options()
    parser.add_argument(
        '--resume', nargs='?', const='auto', metavar='CKPT',
        help='go on from a checkpoint; without a value, from the latest one in the work_dir')
    parser.add_argument(
        '--amp', action='store_true',
        help='automatic mixed precision (float16 with loss scaling; bfloat16 on CPU)')
    parser.add_argument(
        '--auto-scale-lr', action='store_true',
        help="scale the learning rate to the real batch by the config's auto_scale_lr")
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate during training')
    parser.add_argument(
        '--no-persistent-workers', action='store_true',
        help='start the dataloader workers anew each epoch')
    return parser.parse_args(argv)


def set_amp(cfg: Config, wanted: bool) -> None:
    """Switch the optimiser wrapper to mixed precision, in the form that the device can run."""
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if wanted and kind == 'OptimWrapper':
        kind = wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    elif wanted and kind not in ('AmpOptimWrapper', 'mmgroupmamba.CPUAmpOptimWrapper'):
        raise LaunchError(f'--amp switches OptimWrapper to AmpOptimWrapper, but the config has '
                          f'optim_wrapper.type={kind}: leave --amp out or change the type')
    if kind == 'AmpOptimWrapper' and get_device() == 'cpu':
        if cfg.default_scope == 'mmdet':
            raise LaunchError("mixed precision: mmcv's NMS and RoIAlign know no bfloat16 on CPU: "
                              'leave --amp out and set optim_wrapper.type=OptimWrapper, or use a '
                              'GPU')
        print_log('AMP on CPU: bfloat16 autocast, no loss scaling')
        wrapper.type = 'mmgroupmamba.CPUAmpOptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)


def apply_args(cfg: Config, args: argparse.Namespace) -> None:
    for key in ('optim_wrapper', 'train_cfg', 'train_dataloader'):
        if cfg.get(key) is None:
            raise LaunchError(f'{args.config} has no {key}: it is no config to train from')
    set_amp(cfg, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise LaunchError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
                              'the config: the batch size that the learning rate was set for')
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    set_dataloaders(cfg, not args.no_pin_memory, not args.no_persistent_workers)


def train(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    apply_args(cfg, args)
    check_run(cfg, ('train', 'val') if cfg.get('val_dataloader') else ('train', ))
    with tidy_work_dir(cfg.work_dir):
        build_runner(cfg).train()


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(train, argv)


if __name__ == '__main__':
    sys.exit(main())
