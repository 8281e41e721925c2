"""Draw how the four groups of a layer walk an image, and what their states pass on.

    python tools/visualization/scan_order.py CONFIG [CHECKPOINT] --image IMAGE --out FILE.png

Above, each group's path over the map, coloured from its first to its last token. Below, the mean of
|C h| over the group's channels: what the states bring to each place from the places before it on
the path and from itself, without the skip D u.
"""
import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import mmcv
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmgroupmamba.checkpoint import load_backbone, load_model
from mmgroupmamba.launch import LaunchError, OptionAction, Parser, load_config, run_tool
from mmgroupmamba.models.layers import GroupedSSM
from mmgroupmamba.ops import DIRECTIONS, to_sequences
from mmgroupmamba.registry import MODELS


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        'checkpoint', nargs='?',
        help='official file or one of ours; default: what the config starts from')
    parser.add_argument('--image', required=True, help='image file')
    parser.add_argument('--out', required=True, metavar='FILE', help='picture to write')
    parser.add_argument('--stage', type=int, default=1, help='1 to 4 (default 1)')
    parser.add_argument('--block', type=int, default=1, help='of the stage, from 1 (default 1)')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help="input size (default: the image's)")
    add_config_options(parser)
    return parser.parse_args(argv)


def add_config_options(parser: Parser) -> None:
    """What :func:`load_config` reads beside the config file."""
    parser.add_argument('--cfg-options', nargs='+', action=OptionAction, metavar='KEY=VALUE',
                        help='override config values, as in tools/test.py')
    parser.set_defaults(launcher='none', local_rank=0, work_dir=None)


def scan_paths(height: int, width: int) -> Tensor:
    """Where each group is at each step, as the scan's own unrolling has it.

    Returns:
        (4, L, 2): row and column of token l of group g, L = height * width.
    """
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # (L, 2)
    places = places.view(1, height, width, 1, 2).expand(-1, -1, -1, len(DIRECTIONS), -1)
    return to_sequences(places)[0].transpose(0, 1)


@contextmanager
def recorded_scan(ssm: GroupedSSM) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what a layer scans: pairs of maps (x, y), (B, H, W, C) and (B, H, W, 4, d)."""
    records: list[tuple[Tensor, Tensor]] = []
    scan = ssm.scan

    def record(x: Tensor) -> Tensor:
        y = scan(x)
        records.append((x, y))
        return y

    ssm.scan = record
    try:
        yield records
    finally:
        del ssm.scan


@torch.no_grad()
def state_response(backbone: nn.Module, inputs: Tensor, stage: int, block: int) -> Tensor:
    """Mean over a group's channels of what the states alone give, |C h| = |y - D u|.

    Args:
        backbone: A GroupMamba in eval mode.
        inputs: Preprocessed image (1, 3, H, W).
        stage: 1 to 4.
        block: From 1.

    Returns:
        (4, ceil(H / 2**(stage + 1)), ceil(W / 2**(stage + 1))).
    """
    ssm = backbone.stages[stage - 1].blocks[block - 1].mixer.ssm
    with recorded_scan(ssm) as records:
        backbone(inputs)
    x, y = records[0]
    states = y - ssm.D.view(len(DIRECTIONS), -1) * x.unflatten(-1, (len(DIRECTIONS), -1))
    return states.abs().mean(-1)[0].permute(2, 0, 1)


def build(cfg: Config, checkpoint: Optional[str]) -> nn.Module:
    """The config's model in eval mode, loaded; of a GroupMamba the backbone alone is enough.

    Raises:
        CheckpointError: The file does not fit.
    """
    init_default_scope(cfg.default_scope)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = ROOT_MODELS.build(cfg.model)
    if not checkpoint:
        if model.backbone.init_cfg:
            model.backbone.init_weights()
    elif is_groupmamba(model.backbone):
        load_backbone(model.backbone, checkpoint)
    else:
        load_model(model, checkpoint)
    return model.eval().requires_grad_(False)


def is_groupmamba(backbone: nn.Module) -> bool:
    return isinstance(backbone, MODELS.get('GroupMamba'))


def read_image(path: str, size: Optional[list[int]]) -> np.ndarray:
    """BGR image (H, W, 3), resized to `size` (H, W) where one is given."""
    if not Path(path).is_file():
        raise LaunchError(f'image {path} does not exist')
    image = mmcv.imread(path)
    if image is None:
        raise LaunchError(f'{path} is no image that can be read')
    return mmcv.imresize(image, tuple(size[::-1])) if size else image


def draw_path(axes: Axes, path: Tensor, cell: int) -> None:
    """One group's path (L, 2) over the map, each token a square of `cell` pixels."""
    points = (path.flip(-1).numpy() + 0.5) * cell  # (L, 2) of x, y
    steps = np.diff(points, axis=0)
    colours = np.linspace(0, 1, len(steps))
    lines = LineCollection(np.stack([points[:-1], points[1:]], 1), cmap='turbo', array=colours,
                           linewidths=1.2)
    axes.add_collection(lines)
    neighbours = np.flatnonzero(np.abs(steps).sum(1) == cell)
    some = neighbours[::max(1, len(neighbours) // 48)]
    axes.quiver(*points[some].T, *steps[some].T, colours[some], cmap='turbo', clim=(0, 1),
                angles='xy', scale_units='xy', scale=1, width=0.007, headwidth=6,
                headlength=6, headaxislength=6)
    axes.plot(*points[0], 'o', color='white', markeredgecolor='black', markersize=8)
    axes.plot(*points[-1], 's', color='white', markeredgecolor='black', markersize=8)


def draw(image: np.ndarray, response: Tensor, stage: int, title: str, out: str) -> None:
    """Write the picture: a column for each group.

    Args:
        image: BGR (H, W, 3).
        response: (4, H', W') of :func:`state_response`.
        stage: 1 to 4.
        title: Stands above the picture.
        out: File to write.
    """
    cell = 2**(stage + 1)
    groups, height, width = response.shape
    grey = mmcv.bgr2gray(image)
    figure = Figure(figsize=(3.1 * groups, 6.6), layout='constrained')
    rows = figure.subplots(2, groups)
    figure.suptitle(title)
    for axes in rows.flat:
        axes.imshow(grey, cmap='gray', vmin=0, vmax=255, extent=(0, grey.shape[1],
                                                                 grey.shape[0], 0))
        axes.set(xticks=[], yticks=[])
    paths = scan_paths(height, width)
    for g, direction in enumerate(DIRECTIONS):
        draw_path(rows[0, g], paths[g], cell)
        rows[0, g].set_title(f'group {g + 1}: {direction.name}')
        heat = rows[1, g].imshow(response[g].numpy(), cmap='inferno', alpha=0.75,
                                 extent=(0, width * cell, height * cell, 0))
        rows[1, g].set_title('mean |C h|')
        figure.colorbar(heat, ax=rows[1, g], orientation='horizontal', shrink=0.9)
    for axes in rows.flat:
        axes.set(xlim=(0, width * cell), ylim=(height * cell, 0))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)


def scan_order(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    image = read_image(args.image, args.size)
    model = build(load_config(args), args.checkpoint)
    if not is_groupmamba(model.backbone):
        raise LaunchError(f'the backbone is a {type(model.backbone).__name__}: only GroupMamba '
                          'has these scans')
    stages = model.backbone.stages
    if not 1 <= args.stage <= len(stages):
        raise LaunchError(f'--stage {args.stage}: the backbone has stages 1 to {len(stages)}')
    blocks = len(stages[args.stage - 1].blocks)
    if not 1 <= args.block <= blocks:
        raise LaunchError(f'--block {args.block}: stage {args.stage} has blocks 1 to {blocks}')

    data = dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)], data_samples=None)
    inputs = model.data_preprocessor(data)['inputs']
    response = state_response(model.backbone, inputs, args.stage, args.block)
    title = f'stage {args.stage}, block {args.block}: {response.shape[1]} x {response.shape[2]}'
    draw(image, response, args.stage, title, args.out)
    for direction, group in zip(DIRECTIONS, response):
        print(f'{direction.name:<18} mean |C h| {group.mean():.4g}, max {group.max():.4g}')
    print(f'written to {args.out}')


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(scan_order, argv)


if __name__ == '__main__':
    sys.exit(main())
