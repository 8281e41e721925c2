"""Print parameters and FLOPs of the paper's tables 1 to 3 beside ours.

    python tools/analysis_tools/paper_table.py --json paper_table.json

One FLOP is one multiply-add; get_flops.py counts one model part by part in the same way, and
docs/paper_numbers.md explains the differences.
"""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple, Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

from mmengine.config import Config

from mmgroupmamba.complexity import PAPER_SHAPES, Complexity, count_config, markdown_table
from mmgroupmamba.launch import LaunchError, run_tool

CONFIGS = Path(__file__).parents[2] / 'configs'


class Row(NamedTuple):
    """A model of the paper.

    Attributes:
        table: Number of the paper's table.
        model: What the row is called.
        config: File below configs/.
        params: The paper's, in millions.
        flops: The paper's, in 10^9.
    """
    table: int
    model: str
    config: str
    params: float
    flops: float


PAPER = (
    Row(1, 'GroupMamba tiny', 'classification/groupmamba-tiny_8xb128_in1k.py', 23, 4.5),
    Row(1, 'GroupMamba small', 'classification/groupmamba-small_8xb128_in1k.py', 34, 7.0),
    Row(1, 'GroupMamba base', 'classification/groupmamba-base_8xb128_in1k.py', 57, 14),
    Row(2, 'Mask R-CNN tiny', 'detection/mask-rcnn_groupmamba-tiny_fpn_1x_coco.py', 40, 279),
    Row(3, 'UperNet tiny',
        'segmentation/groupmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py', 49, 955),
)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', metavar='FILE', help='write the figures and their parts here too')
    parser.add_argument('--tables', type=int, nargs='+', choices=(1, 2, 3), default=(1, 2, 3),
                        help="the paper's tables to count (default all)")
    return parser.parse_args(argv)


def compare(paper: float, ours: int, unit: float) -> dict[str, float]:
    """The paper's figure in its unit, ours in ones, and the difference in percent."""
    return dict(paper=paper, ours=ours, difference_percent=100 * (ours / unit / paper - 1))


def record(row: Row) -> dict:
    """Count a row's model; what --json writes of it."""
    cfg = Config.fromfile(CONFIGS / row.config)
    counted: Complexity = count_config(cfg)
    return dict(
        table=row.table,
        model=row.model,
        config=f'configs/{row.config}',
        shape=PAPER_SHAPES[cfg.default_scope],
        params=compare(row.params, counted.total.params, 1e6),
        flops=compare(row.flops, counted.total.flops, 1e9),
        scan_flops=counted.total.scan,
        parts={name: part._asdict() for name, part in counted.parts.items()},
        operators=counted.operators)


def cells(counted: dict) -> list[str]:
    """A line of the table."""
    height, width = counted['shape']
    params, flops = counted['params'], counted['flops']
    return [
        counted['model'], str(counted['table']), f'{height} x {width}',
        f'{params["paper"]:g}', f'{params["ours"] / 1e6:.2f}',
        f'{params["difference_percent"]:+.1f}',
        f'{flops["paper"]:g}', f'{flops["ours"] / 1e9:.2f}', f'{flops["difference_percent"]:+.1f}',
    ]


def paper_table(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise LaunchError(f'--json {args.json}: give a file in a folder that exists')
    records = [record(row) for row in PAPER if row.table in args.tables]
    print(markdown_table(
        ['model', 'table', 'H x W', 'params paper, M', 'ours, M', 'diff, %', 'FLOPs paper, G',
         'ours, G', 'diff, %'], [cells(counted) for counted in records]))
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=2) + '\n')


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(paper_table, argv)


if __name__ == '__main__':
    sys.exit(main())
