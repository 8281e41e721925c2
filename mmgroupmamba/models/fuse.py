"""Folding for inference: what can be computed once is computed once, outputs as before.

The plain modules stay the definition; nothing here is needed to run a model.
"""
from copy import deepcopy
from typing import Optional

import torch
import torch.nn as nn
from mmcv.cnn import fuse_conv_bn
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmgroupmamba.registry import HOOKS

from .groupmamba import GroupMamba


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Fold a trained model for inference, in place; its outputs stay within 1e-5.

    - BatchNorm into the convolutions before it (the stem's, and those of dense heads);
    - the two heads of a distilled classifier, whose average is the prediction, into one.

    The model is put in eval mode and takes no gradient afterwards. It has other parameters than
    before, so checkpoints are loaded first and it is not saved.

    Args:
        model: Any model around our backbone, or a part of one.

    Returns:
        The model.

    Raises:
        ValueError: There is no GroupMamba in it.
    """
    if not any(isinstance(module, GroupMamba) for module in model.modules()):
        raise ValueError(f'{type(model).__name__} has no GroupMamba in it: there is nothing of '
                         'ours to fuse')
    model.eval()
    fuse_conv_bn(model)
    for module in model.modules():
        if getattr(module, 'dist_fc', None) is not None:
            _fold_heads(module)
    return model.requires_grad_(False)


@HOOKS.register_module()
class FuseHook(Hook):
    """Test with a folded copy of the model, see :func:`fuse`; the model itself is left as it is.

    It comes after mmengine's EMAHook, so the copy is of the averaged weights where there are any.
    """
    priority = 'VERY_LOW'

    def before_test_epoch(self, runner: Runner) -> None:
        self.model = runner.model
        # testing needs no wrapper, and DDP's holds what is not to be copied
        model = self.model.module if is_model_wrapper(self.model) else self.model
        runner.model = fuse(deepcopy(model))

    def after_test_epoch(self, runner: Runner, metrics: Optional[dict] = None) -> None:
        runner.model = self.model


def _fold_heads(head: nn.Module) -> None:
    """``(W x + b + V x + c) / 2 = ((W + V) / 2) x + (b + c) / 2``."""
    for name, parameter in head.fc.named_parameters():
        parameter.add_(head.dist_fc.get_parameter(name)).div_(2)
    head.dist_fc = None
