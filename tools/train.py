"""Train a classifier, detector or segmentor: the config's default_scope picks the task."""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import sys
from typing import Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

from mmgroupmamba.launch import (
    Parser,
    build_runner,
    check_run,
    load_config,
    run_tool,
    set_training,
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


def train(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    set_training(cfg, args)
    check_run(cfg, ('train', 'val') if cfg.get('val_dataloader') else ('train', ))
    with tidy_work_dir(cfg.work_dir):
        build_runner(cfg).train()


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(train, argv)


if __name__ == '__main__':
    sys.exit(main())
