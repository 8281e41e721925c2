"""Class-activation maps by mmpretrain's own tool, which this opens to our backbone.

    python tools/visualization/vis_cam.py IMAGE CONFIG CHECKPOINT --save-path FILE.jpg

All options are those of mmpretrain's tool (--help lists them). For a GroupMamba

- the default target layer is the last stage;
- maps inside the stages, (B, H, W, C), are handed over as (B, C, H, W);
- the checkpoint, official or ours, must match every key.
"""
import difflib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import numpy as np
from mmengine.config import Config
from torch import Tensor, nn

from mmgroupmamba.checkpoint import load_model
from mmgroupmamba.launch import LaunchError, load_config, run_tool
from mmgroupmamba.registry import MODELS

# all modules of a stage work on (B, H, W, C), except the stem's convolutions
IMAGE_LIKE = r'backbone(\.stages\.0\.embed\.(convs|proj)\b.*)?$'


def library_tool() -> ModuleType:
    """mmpretrain's vis_cam as a module.

    Raises:
        LaunchError: A package is missing.
    """
    if importlib.util.find_spec('pytorch_grad_cam') is None:
        raise LaunchError('class-activation maps need grad-cam: pip install grad-cam')
    spec = importlib.util.find_spec('mmpretrain')
    path = spec and Path(spec.origin).parent / '.mim/tools/visualization/vis_cam.py'
    if not path or not path.is_file():
        raise LaunchError("mmpretrain's tools/visualization/vis_cam.py is not installed: "
                          'python -m mmgroupmamba.doctor says what is')
    spec = importlib.util.spec_from_file_location('mmpretrain_vis_cam', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_groupmamba(model: nn.Module) -> bool:
    return isinstance(getattr(model, 'backbone', None), MODELS.get('GroupMamba'))


def is_channels_last(layer: str) -> bool:
    """Whether a layer of a model of ours, by its name, yields (B, H, W, C)."""
    return layer.startswith('backbone.') and not re.match(IMAGE_LIKE, layer)


def default_layer(model: nn.Module) -> str:
    """The last stage: what the class token is the mean of."""
    return f'backbone.stages.{len(model.backbone.stages) - 1}'


def load(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    """As mmpretrain's ``get_model``, with every key of the checkpoint matched."""
    from mmpretrain import get_model
    model = get_model(cfg, pretrained=False)
    load_model(model, checkpoint)
    return model.to(device)


def get_layer(name: str, model: nn.Module) -> nn.Module:
    """A module by its name; a wrong name is refused in one line."""
    layers = dict(model.named_modules())
    if name not in layers:
        close = difflib.get_close_matches(name, layers, 3)
        raise LaunchError(f'--target-layers: the model has no {name}; '
                          f'{"close: " + ", ".join(close) if close else "--preview-model"}')
    return layers[name]


def check(args: Any) -> None:
    """Look for what the tool would only meet half way."""
    args.launcher, args.work_dir = 'none', None
    cfg = load_config(args)
    if cfg.default_scope != 'mmpretrain':
        raise LaunchError(f'{args.config} is a config of {cfg.default_scope}: class-activation '
                          "maps are for mmpretrain's classifiers")
    if not Path(args.img).is_file():
        raise LaunchError(f'image {args.img} does not exist')
    classes = (cfg.model.get('head') or {}).get('num_classes')
    wrong = [c for c in args.target_category if classes and not 0 <= c < classes]
    if wrong:
        raise LaunchError(f'--target-category {wrong[0]}: the head has classes 0 to {classes - 1}')
    if not (args.save_path or args.preview_model or os.environ.get('DISPLAY')):
        raise LaunchError('there is no display to show the picture on: give --save-path FILE.jpg')


def vis_cam(argv: Optional[list[str]] = None) -> None:
    tool = library_tool()
    sys.argv[1:] = sys.argv[1:] if argv is None else argv
    args = tool.parse_args()
    check(args)

    their_reshape = tool.reshape_transform
    their_default = tool.get_default_target_layers
    channels_last = False

    def get_default_target_layers(model: nn.Module, args: Any) -> list[nn.Module]:
        nonlocal channels_last
        if not is_groupmamba(model):
            return their_default(model, args)
        channels_last = True
        print(f'target layer: {default_layer(model)}')
        return [get_layer(default_layer(model), model)]

    def get_target_layer(name: str, model: nn.Module) -> nn.Module:
        nonlocal channels_last
        channels_last = is_groupmamba(model) and is_channels_last(name)
        return get_layer(name, model)

    def reshape_transform(tensor: Tensor, model: nn.Module, args: Any) -> Tensor:
        if channels_last and tensor.ndim == 4:
            return tensor.permute(0, 3, 1, 2)
        return their_reshape(tensor, model, args)

    their_show = tool.show_cam_grad

    def show_cam_grad(grayscale_cam: np.ndarray, *rest: Any, **kwargs: Any) -> None:
        if not grayscale_cam.any():
            print('the map is empty: nowhere does this layer, as the method weighs it, raise the '
                  'class; try --method LayerCAM, or a norm such as '
                  '--target-layers backbone.stages.3.blocks.0.norm')
        their_show(grayscale_cam, *rest, **kwargs)

    tool.parse_args = lambda: args
    tool.show_cam_grad = show_cam_grad
    tool.get_model = load
    tool.get_default_target_layers = get_default_target_layers
    tool.get_layer = get_target_layer
    tool.reshape_transform = reshape_transform
    tool.main()
    if args.save_path and not args.preview_model:
        print(f'written to {args.save_path}')


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(vis_cam, argv)


if __name__ == '__main__':
    sys.exit(main())
