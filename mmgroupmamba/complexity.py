"""Parameters and FLOPs of a model: mmengine's analyser, and a formula for the scan.

One FLOP is one multiply-add, as in mmengine, fvcore and the paper's tables. mmengine traces the
model and counts convolutions, linear maps, norms, pooling and resizing; what it does not count
(activations, sums, products, RoIAlign, NMS) is listed with the result. The scan is counted as
9 B L D N + B D L, whatever its backend, by the formula of the official
``classification/models/csms6s.py`` (after https://github.com/state-spaces/mamba/issues/110).
"""
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, Optional
from unittest.mock import patch

import torch
import torch.nn as nn
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from mmgroupmamba.launch import LaunchError, replace_sync_bn
from mmgroupmamba.models import GroupMamba, layers
from mmgroupmamba.models.groupmamba import MIN_SIZE
from mmgroupmamba.ops.directional_scan import over_sequences

# (H, W) at which the paper counts a task
PAPER_SHAPES = {'mmpretrain': (224, 224), 'mmdet': (800, 1280), 'mmseg': (512, 2048)}

# modules that a table shows by their children
_OPENED = ('backbone', 'backbone.stages', 'stages', 'roi_head')


class Part(NamedTuple):
    """What one part of a model, or all of it, costs.

    Attributes:
        params: Parameters.
        flops: Multiply-adds for one image, those of the scan included.
        scan: Those of the scan.
    """
    params: int
    flops: int
    scan: int


class Complexity(NamedTuple):
    """Parameters and FLOPs of a model for one image.

    Attributes:
        total: Of the whole model.
        parts: Module name to its own; they sum to the total. ``'elsewhere'`` is what the model
            computes outside its parts.
        layers: Layer to its own FLOPs, those of all stages and blocks together
            (``backbone.stages.*.blocks.*.ffn.fc1``); they sum to the total's.
        operators: Operator to FLOPs; they sum to the total's.
        uncounted: Operator to how often it ran, for those that count as nothing.
    """
    total: Part
    parts: dict[str, Part]
    layers: dict[str, int]
    operators: dict[str, int]
    uncounted: dict[str, int]


def scan_flops(batch: int, length: int, channels: int, states: int) -> int:
    """FLOPs of a selective scan with D: 9 B L D N + B D L.

    Args:
        batch: B.
        length: L, tokens of a sequence.
        channels: D, those of all groups together.
        states: N, states a channel.
    """
    return 9 * batch * length * channels * states + batch * channels * length


@torch.library.custom_op('mmgroupmamba::counted_scan', mutates_args=())
def _counted_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
                  delta_bias: Optional[Tensor]) -> Tensor:
    return u.clone()


@_counted_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias):
    return torch.empty_like(u)


def _scan_in_its_place(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A_log: Tensor, D: Tensor,
                       dt_bias: Tensor, backend: str = 'auto',
                       out_dtype: Optional[torch.dtype] = None) -> Tensor:
    return over_sequences(x, x_dbl, dt_weight, A_log, D, dt_bias,
                          lambda *args: _counted_scan(*args[:-1]))


def _count_scan(inputs: list[Any], outputs: list[Any]) -> Counter:
    batch, channels, length = inputs[0].type().sizes()
    return Counter(scan=scan_flops(batch, length, channels, inputs[2].type().sizes()[1]))


def _count_baddbmm(inputs: list[Any], outputs: list[Any]) -> Counter:
    """mmengine's analyser knows bmm only."""
    batch, rows, inner = inputs[1].type().sizes()
    return Counter(bmm=batch * rows * inner * inputs[2].type().sizes()[2])


@contextmanager
def counted_scans() -> Iterator[None]:
    """Replace the layers' scan by one operator that a trace shows and that returns its input.

    No backend runs inside, so one that this machine lacks is counted too.
    """
    with patch.object(layers, 'directional_scan', _scan_in_its_place):
        yield


def count(model: nn.Module, shape: tuple[int, int], scope: Optional[str] = None) -> Complexity:
    """Count a model's parameters and the FLOPs of its tensor mode on one image.

    The tensor mode ends with: the average of both heads (mmpretrain), the outputs of the second
    stage for the proposals of the first, masks for 100 of them (mmdet), the scores at a quarter
    of the image's size (mmseg). The model is left as it was.

    Args:
        model: Classifier, detector, segmentor or backbone; not on the meta device, where torch
            cannot trace.
        shape: (H, W) of the image; a detector pads it as its data_preprocessor says.
        scope: Library of the model: 'mmpretrain', 'mmdet', 'mmseg', or None for a bare backbone.

    Returns:
        The counts, by part and by operator.

    Raises:
        ValueError: The image is smaller than the backbone takes.
    """
    device = next(model.parameters()).device
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    training = {name: module.training for name, module in model.named_modules()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(counted_scans())
        if scope == 'mmdet':
            # as mmdet's tools/analysis_tools/get_flops.py
            data = _detector_input(model, image)
            image = data['inputs'][0]
            stack.enter_context(patch.object(
                model, 'forward', partial(model.forward, data_samples=data['data_samples'])))
        analyzer = FlopAnalyzer(model, (image[None].to(device), ))
        analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analyzer.set_op_handle('mmgroupmamba::counted_scan', _count_scan)
        analyzer.set_op_handle('aten::baddbmm', _count_baddbmm)
        try:
            model.eval()
            by_module = analyzer.by_module_and_operator()
        finally:
            for name, module in model.named_modules():
                module.training = training[name]

    params = parameter_count(model)
    everything = {
        name: Part(params[name], int(sum(ops.values())), ops['scan'])
        for name, ops in by_module.items()
    }
    total = everything['']
    parts = {name: everything[name] for name in _part_names(model) if any(everything[name])}
    rest = Part(*(whole - sum(values) for whole, *values in zip(total, *parts.values())))
    if any(rest):
        parts['elsewhere'] = rest
    layers: Counter = Counter()
    for name, part in everything.items():
        layers[_layer(name)] += part.flops
        if name:  # what is its own is not its parent's
            layers[_layer(name.rpartition('.')[0])] -= part.flops
    return Complexity(
        total, parts,
        layers={name: flops for name, flops in layers.most_common() if flops},
        operators={name: int(flops) for name, flops in by_module[''].most_common()},
        uncounted=dict(analyzer.unsupported_ops().most_common()))


def _detector_input(model: nn.Module, image: Tensor) -> dict:
    from mmdet.structures import DetDataSample
    shape = tuple(image.shape[1:])
    sample = DetDataSample(metainfo=dict(ori_shape=shape, img_shape=shape, scale_factor=(1., 1.)))
    return model.data_preprocessor(dict(inputs=[image], data_samples=[sample]))


def _layer(module_name: str) -> str:
    return re.sub(r'\b\d+\b', '*', module_name) or 'the model itself'


def _part_names(module: nn.Module, prefix: str = '') -> Iterator[str]:
    for name, child in module.named_children():
        if prefix + name in _OPENED:
            yield from _part_names(child, f'{prefix}{name}.')
        else:
            yield prefix + name


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model to be counted: no weights are read, no teacher is built.

    As in mmseg's own tool, a segmentor has no auxiliary head, which only training needs.

    Raises:
        LaunchError: The config has no model, or its backbone is not GroupMamba.
    """
    if not isinstance(cfg.get('model'), dict):
        raise LaunchError('the config has no model: there is nothing to count')
    init_default_scope(cfg.default_scope)
    model = deepcopy(cfg.model)
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model.train_cfg = None
    replace_sync_bn(model)
    _use_any_backend(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # those of losses, which do not run
        torch.manual_seed(0)  # the number of a detector's proposals depends on the weights
        model = MODELS.build(model)
    if not any(isinstance(module, GroupMamba) for module in model.modules()):
        raise LaunchError("the config's backbone is not GroupMamba: count it with get_flops.py of "
                          f'{cfg.default_scope}')
    if cfg.default_scope == 'mmseg' and hasattr(model, 'auxiliary_head'):
        model.auxiliary_head = None
    return model


def _use_any_backend(node: Any) -> None:
    """A backend asked for by name is refused where it cannot run; here none runs."""
    children = node if isinstance(node, (list, tuple)) else ()
    if isinstance(node, dict):
        if 'scan_backend' in node:
            node['scan_backend'] = 'auto'
        if 'fused_ops' in node:
            node['fused_ops'] = ()
        children = node.values()
    for child in children:
        _use_any_backend(child)


def count_config(cfg: Config, shape: Optional[tuple[int, int]] = None) -> Complexity:
    """Build a config's model and count it.

    Args:
        cfg: A config of one of the three tasks.
        shape: (H, W), None for the paper's of the task (:data:`PAPER_SHAPES`).

    Raises:
        LaunchError: The shape is too small; see also :func:`build_model`.
    """
    shape = shape or PAPER_SHAPES[cfg.default_scope]
    if min(shape) < MIN_SIZE:
        raise LaunchError(f'--shape {shape[0]} {shape[1]}: GroupMamba takes images of at least '
                          f'{MIN_SIZE} x {MIN_SIZE} pixels (H W)')
    return count(build_model(cfg), shape, cfg.default_scope)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads on a terminal and in Markdown; numbers stand right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells: list[str]) -> str:
        texts = [cells[0].ljust(widths[0]),
                 *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return f'| {" | ".join(texts)} |'

    rule = ['-' * widths[0], *(f'{"-" * (width - 1)}:' for width in widths[1:])]
    return '\n'.join(map(line, [header, rule, *rows]))
