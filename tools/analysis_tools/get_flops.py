"""Count the parameters and FLOPs of a config's model for one image, by part and by operator.

    python tools/analysis_tools/get_flops.py CONFIG
    python tools/analysis_tools/get_flops.py CONFIG --shape 512 512 --layers

One FLOP is one multiply-add. mmengine's analyser counts, and the scan is 9 B L D N + B D L
whatever backend the config names. No checkpoint, teacher or data is read. docs/paper_numbers.md
says what is counted and what is not.
"""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import sys
from pathlib import Path
from typing import Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

from mmgroupmamba.complexity import PAPER_SHAPES, Complexity, count_config, markdown_table
from mmgroupmamba.launch import OptionAction, Parser, load_config, run_tool

MODES = {
    'mmpretrain': 'the whole classifier in tensor mode, all heads',
    'mmdet': "mmdet's tensor mode; a Mask R-CNN: boxes for each proposal, masks for 100 of them",
    'mmseg': "mmseg's tensor mode: whole image, without the auxiliary head",
}


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    shapes = ', '.join(f'{h} {w} for {scope}' for scope, (h, w) in PAPER_SHAPES.items())
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'),
                        help=f"size of the image; default the paper's: {shapes}")
    parser.add_argument('--layers', action='store_true',
                        help='one more table: FLOPs by layer, all stages and blocks together')
    parser.add_argument('--cfg-options', nargs='+', action=OptionAction, metavar='KEY=VALUE',
                        help='override config values: model.backbone.arch=small')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args(argv)


def flops_table(kind: str, flops: dict[str, int]) -> str:
    """FLOPs by operator or layer, which sum to the model's."""
    total = sum(flops.values())
    return markdown_table(
        [kind, 'FLOPs, G', 'share, %'],
        [[name, f'{value / 1e9:.4f}', f'{100 * value / total:.1f}']
         for name, value in flops.items()])


def report(counted: Complexity, with_layers: bool) -> str:
    """The totals, tables by part, operator and perhaps layer, and what is not counted."""
    total = counted.total
    parts = markdown_table(
        ['part', 'params, M', 'FLOPs, G', 'share, %', 'scan, G'],
        [[name, f'{part.params / 1e6:.3f}', f'{part.flops / 1e9:.3f}',
          f'{100 * part.flops / total.flops:.1f}', f'{part.scan / 1e9:.4f}']
         for name, part in (*counted.parts.items(), ('total', total))])
    tables = [parts, flops_table('operator', counted.operators)]
    if with_layers:
        tables.append(flops_table('layer', counted.layers))
    uncounted = ', '.join(sorted(name.split('::')[-1] for name in counted.uncounted))
    return (f'parameters {total.params / 1e6:.3f} M\n'
            f'FLOPs      {total.flops / 1e9:.3f} G (one FLOP is one multiply-add)\n'
            f'scan       {total.scan / 1e9:.3f} G of them, {100 * total.scan / total.flops:.2f} %'
            + '\n\n'.join(['', *tables, f'not counted: {uncounted}']))


def get_flops(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    shape = tuple(args.shape or PAPER_SHAPES[cfg.default_scope])
    counted = count_config(cfg, shape)
    print(f'{Path(args.config).name}, image of {shape[0]} x {shape[1]} (H x W)\n'
          f'{MODES[cfg.default_scope]}')
    print(report(counted, args.layers))


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(get_flops, argv)


if __name__ == '__main__':
    sys.exit(main())
