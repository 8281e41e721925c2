"""What mmengine's optimisers lack: mixed precision on CPU, layer-wise LR decay for any task."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from .registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """OptimWrapper whose forward runs under bfloat16 autocast; bfloat16 needs no loss scale."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay for any model around a backbone with ``get_layer_depth``.

    A parameter of depth k of n has the learning rate times ``layer_decay_rate**(n - 1 - k)``:
    the stem the lowest, neck and heads the whole of it. All other keys of ``paramwise_cfg`` are
    those of mmengine's constructor. mmpretrain's does the same for classifiers only, mmdet's and
    mmseg's for ConvNeXt and BEiT only.

    Raises:
        ValueError: No ``layer_decay_rate`` in (0, 1] in ``paramwise_cfg``.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        rate = (self.paramwise_cfg or {}).get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError('optim_wrapper.paramwise_cfg.layer_decay_rate must be in (0, 1], got '
                             f'{rate!r}')
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   **kwargs: Any) -> None:
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        names = {id(p): name for name, p in module.named_parameters()}
        for group in params:
            depth, depths = module.backbone.get_layer_depth(
                names[id(group['params'][0])], 'backbone.')
            scale = self.paramwise_cfg['layer_decay_rate']**(depths - depth - 1)
            group['lr'] = group.get('lr', self.base_lr) * scale
