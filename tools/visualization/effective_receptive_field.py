"""Draw and measure the effective receptive field of one or several models, side by side.

    python tools/visualization/effective_receptive_field.py CONFIG [CHECKPOINT] \
        [CONFIG [CHECKPOINT] ...] --images FOLDER --out FILE.png

After Luo et al., "Understanding the effective receptive field in deep convolutional neural
networks" (NeurIPS 2016), in the form of RepLKNet (Ding et al., CVPR 2022): the gradient of the
centre of a stage's map, its positive features summed, with respect to the input pixels; |.| summed
over the colours and averaged over the images. One difference: RepLKNet drops negative gradients,
we take their size.
"""
import argparse
import copy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from mmengine.utils import scandir
from scan_order import add_config_options, build, is_groupmamba, read_image
from torch import Tensor, nn

from mmgroupmamba.launch import LaunchError, Parser, load_config, run_tool

SHARES = (0.5, 0.9)
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff')


class Field(NamedTuple):
    """A model's effective receptive field: (H, W) in input pixels, and its name."""
    name: str
    values: Tensor


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        'more', nargs='*', metavar='CHECKPOINT | CONFIG',
        help='checkpoint of the config before it, or one more config (.py)')
    parser.add_argument('--images', required=True, metavar='FOLDER', help='searched in depth')
    parser.add_argument('--num-images', type=int, default=50, help='at most (default 50)')
    parser.add_argument('--out', required=True, metavar='FILE', help='picture to write')
    parser.add_argument('--stage', type=int, default=4, help='1 to 4 (default 4)')
    parser.add_argument('--size', type=int, nargs=2, default=[224, 224], metavar=('H', 'W'),
                        help='input size (default 224 224)')
    add_config_options(parser)
    return parser.parse_args(argv)


def pair(names: list[str]) -> list[tuple[str, Optional[str]]]:
    """Configs, each with the checkpoint that follows it, if one does."""
    pairs: list[tuple[str, Optional[str]]] = []
    for name in names:
        if name.endswith('.py'):
            pairs.append((name, None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], name)
        else:
            raise LaunchError(f'{name} is neither a config (.py) nor follows one as its checkpoint')
    return pairs


def stage_map(backbone: nn.Module, inputs: Tensor, stage: int) -> Tensor:
    """The map (B, C, H', W') that leaves a stage (1 to 4) of any pyramid backbone."""
    if is_groupmamba(backbone):
        maps: list[Tensor] = []
        handle = backbone.stages[stage - 1].register_forward_hook(
            lambda module, args, output: maps.append(output.permute(0, 3, 1, 2)))
        backbone(inputs)
        handle.remove()
        return maps[0]
    return backbone(inputs)[tuple(backbone.out_indices).index(stage - 1)]


def effective_receptive_field(backbone: nn.Module, images: Iterable[Tensor],
                              stage: int) -> Tensor:
    """Mean over images of |d sum_c relu(f_c at the centre) / d input|.

    Args:
        backbone: In eval mode.
        images: Preprocessed (1, 3, H, W), all of one size.
        stage: 1 to 4. The centre of its map (C, H', W') is (H' // 2, W' // 2).

    Returns:
        (H, W), not negative.
    """
    fields = []
    for image in images:
        image = image.detach().requires_grad_()
        features = stage_map(backbone, image, stage)
        centre = features[0, :, features.shape[2] // 2, features.shape[3] // 2]
        gradient, = torch.autograd.grad(centre.relu().sum(), image)
        fields.append(gradient[0].abs().sum(0))
    return torch.stack(fields).mean(0)


def centre_of_mass(field: Tensor) -> tuple[float, float]:
    """Row and column of a field's (H, W) centre of mass."""
    total = field.double().sum()
    return tuple(
        ((field.double().sum(1 - axis) * torch.arange(field.shape[axis])).sum() / total).item()
        for axis in (0, 1))


def mass_radius(field: Tensor, share: float) -> float:
    """Radius of the smallest circle around the centre of mass with `share` of a field's mass.

    Args:
        field: (H, W), not negative.
        share: In (0, 1].

    Returns:
        Pixels.
    """
    row, column = centre_of_mass(field)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in field.shape)
    radii, order = torch.hypot(rows[:, None] - row, columns - column).flatten().sort()
    mass = field.double().flatten()[order].cumsum(0)
    return radii[torch.searchsorted(mass, share * mass[-1]).clamp(max=len(radii) - 1)].item()


def field_of(config: str, checkpoint: Optional[str], images: list[np.ndarray],
             args: argparse.Namespace) -> Field:
    """Build one model and measure it."""
    args = copy.copy(args)
    args.config = config
    model = build(load_config(args), checkpoint)
    if is_groupmamba(model.backbone):
        stages = range(1, 1 + len(model.backbone.stages))
    else:
        stages = [index + 1 for index in model.backbone.out_indices]
    if args.stage not in stages:
        raise LaunchError(f'--stage {args.stage}: the backbone of {config} yields '
                          f'{", ".join(map(str, stages))}')
    inputs = (model.data_preprocessor(dict(
        inputs=[torch.from_numpy(image).permute(2, 0, 1)], data_samples=None))['inputs']
        for image in images)
    name = Path(config).stem + ('' if checkpoint else ' (as the config starts)')
    return Field(name, effective_receptive_field(model.backbone, inputs, args.stage))


def draw(fields: list[Field], out: str) -> None:
    """Write the fields, each scaled to its maximum, with circles for the shares of mass."""
    figure = Figure(figsize=(4.2 * len(fields) + 0.8, 4.6), layout='constrained')
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    for axes, field in zip(panels, fields):
        values = (field.values / field.values.max()).clamp(min=1e-4)
        height, width = values.shape
        heat = axes.imshow(values.numpy(), cmap='viridis', norm=LogNorm(1e-4, 1))
        row, column = centre_of_mass(field.values)
        for share, style in zip(SHARES, ('-', '--')):
            radius = mass_radius(field.values, share)
            axes.add_patch(Circle((column, row), radius, fill=False, edgecolor='white',
                                  linestyle=style, label=f'{share:.0%}: {radius:.0f} px'))
        axes.set(title=field.name, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5),
                 xticks=[], yticks=[])
        axes.title.set_size(8)
        axes.legend(loc='lower right', facecolor='grey', labelcolor='white', fontsize=8)
    figure.colorbar(heat, ax=panels, label='|gradient| / its maximum', shrink=0.8)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)


def receptive_field(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    pairs = pair([args.config, *args.more])
    if not Path(args.images).is_dir():
        raise LaunchError(f'--images {args.images} is no folder')
    paths = sorted(scandir(args.images, SUFFIXES, recursive=True, case_sensitive=False))
    paths = paths[::max(1, len(paths) // max(1, args.num_images))][:args.num_images]
    if not paths:
        raise LaunchError(f'--images {args.images}, --num-images {args.num_images}: no image '
                          f'({", ".join(SUFFIXES)})')
    images = [read_image(str(Path(args.images) / path), args.size) for path in paths]

    fields = [field_of(config, checkpoint, images, args) for config, checkpoint in pairs]
    draw(fields, args.out)
    print(f'stage {args.stage}, {len(images)} images of {args.size[0]}x{args.size[1]}; radius in '
          'pixels around the centre of mass')
    for field in fields:
        radii = ', '.join(f'{share:.0%} {mass_radius(field.values, share):.1f}' for share in SHARES)
        print(f'{radii}  {field.name}')
    print(f'written to {args.out}')


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(receptive_field, argv)


if __name__ == '__main__':
    sys.exit(main())
