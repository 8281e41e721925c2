"""Folding for inference: what can be computed once is computed once, outputs as before.

The plain modules stay the definition; nothing here is needed to run a model.
"""
from copy import deepcopy
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from mmgroupmamba.ops import block_diagonal, linear_dtype, with_padding, without_padding
from mmgroupmamba.registry import HOOKS

from .groupmamba import GroupMamba
from .joined import FirstConv, join, over_squares
from .layers import (
    Block,
    DepthwiseConv,
    Downsample,
    GroupedLinear,
    GroupedSSM,
    LayerNorm,
    ModulatedGroupMamba,
    Stem,
)
from .packed import PackedConv, PackedFFN, pack


@torch.no_grad()
def fuse(model: nn.Module, autocast_dtype: Optional[torch.dtype] = None) -> nn.Module:
    """Fold a trained model for inference, in place; its outputs stay within 1e-5.

    - BatchNorm into the convolutions before it (the stem's, and those of dense heads);
    - the two heads of a distilled classifier, whose average is the prediction, into one;
    - on a CPU, weights of feed-forwards and of the convolutions before the stages laid out for
      oneDNN once, as a second copy, and GELU within its convolution (:mod:`~.packed`);
    - on CUDA, the stem's first convolution over squares of pixels (:class:`_Squares`), and its
      convolutions with bias and ReLU, where cuDNN has them as one;
    - on CUDA, where norms are kernels, the bias of the convolution before a stage into its norm,
      which PyTorch would add in a pass of its own, and steps behind one another into one kernel
      (:mod:`~.joined`): in half precision the stem's first convolution with its ReLU; with all
      fused ops a stage's first two norms and, in half precision, all that up to 128 channels go
      through between the scan and the feed-forward, and a feed-forward's last map with the sum,
      the norm and the map behind it;
    - on CUDA, the linear maps of the four groups into one with a block-diagonal matrix;
    - on CUDA, stages whose rows are no multiple of 16 bytes in half precision get zero channels
      (:func:`pad_channels`).

    The model is put in eval mode and takes no gradient afterwards. It has other parameters than
    before, so checkpoints are loaded first and it is not saved.

    Args:
        model: Any model around our backbone, or one of its layers, on the device it will run on.
        autocast_dtype: Of the autocast it will run under, if it will: what autocast would cast in
            every forward pass of the backbone is cast here once. Outputs are as under autocast,
            which must be on then.

    Returns:
        The model.

    Raises:
        ValueError: There is no GroupMamba in it, nor a layer of one; or it is on a GPU and was
            folded on a CPU.
    """
    parts: list[nn.Module] = [m for m in model.modules() if isinstance(m, GroupMamba)]
    parts = parts or [m for m in model.modules() if isinstance(m, ModulatedGroupMamba)]
    if not parts:
        raise ValueError(f'{type(model).__name__} has no GroupMamba in it: there is nothing of '
                         'ours to fuse')
    if next(parts[0].parameters()).is_cuda and any(
            isinstance(m, (PackedConv, PackedFFN)) for m in model.modules()):
        raise ValueError(f'{type(model).__name__} was fused on a CPU: fuse the plain model on the '
                         'device it will run on')
    fuse_conv_bn(model)
    for module in model.modules():
        if getattr(module, 'dist_fc', None) is not None:
            _fold_heads(module)
    # below, what is done already stays as it is
    for part in parts:
        if next(part.parameters()).is_cuda:
            if isinstance(part, GroupMamba):
                pad_channels(part)
            _join_groups(part)
            _fold_biases(part)
            join(part, autocast_dtype)
            _pack_pixels(part)
            for module in [m for m in part.modules() if isinstance(m, Stem)]:
                _join_activations(module.convs)
        if autocast_dtype is not None:
            _cast_maps(part, autocast_dtype)
        elif next(part.parameters()).device.type == 'cpu':
            pack(part)
    model.eval()
    return model.requires_grad_(False)


@HOOKS.register_module()
class FuseHook(Hook):
    """Test with a folded copy of the model, see :func:`fuse`; the model itself is left as it is.

    It comes after mmengine's EMAHook, so the copy is of the averaged weights where there are any. A
    test loop under autocast gets weights cast for it.
    """
    priority = 'VERY_LOW'

    def before_test_epoch(self, runner: Runner) -> None:
        self.model = runner.model
        # testing needs no wrapper, and DDP's holds what is not to be copied
        model = self.model.module if is_model_wrapper(self.model) else self.model
        autocast_dtype = None
        if getattr(runner.test_loop, 'fp16', False):
            autocast_dtype = torch.get_autocast_dtype(next(model.parameters()).device.type)
        runner.model = fuse(deepcopy(model), autocast_dtype)

    def after_test_epoch(self, runner: Runner, metrics: Optional[dict] = None) -> None:
        runner.model = self.model


def _fold_heads(head: nn.Module) -> None:
    """``(W x + b + V x + c) / 2 = ((W + V) / 2) x + (b + c) / 2``."""
    for name, parameter in head.fc.named_parameters():
        parameter.add_(head.dist_fc.get_parameter(name)).div_(2)
    head.dist_fc = None


# dims of a block's parameters that are its channels, all C or the d of each group
_CHANNELS = {
    'mixer.norm.weight': 0, 'mixer.norm.bias': 0,
    'mixer.affinity.fc1.weight': 1, 'mixer.affinity.fc2.weight': 0, 'mixer.affinity.fc2.bias': 0,
    'mixer.ssm.conv.weight': 0, 'mixer.ssm.conv.bias': 0,
    'mixer.ssm.dt_bias': 0, 'mixer.ssm.A_log': 0, 'mixer.ssm.D': 0,
    'mixer.proj.weight': (0, 1), 'mixer.proj.bias': 0,
    'norm.weight': 0, 'norm.bias': 0,
    'ffn.fc1.weight': 1, 'ffn.fc2.weight': 0, 'ffn.fc2.bias': 0,
}
_GROUP_CHANNELS = {
    'mixer.ssm.in_proj.weight': (1, 2), 'mixer.ssm.gate_proj.weight': (1, 2),
    'mixer.ssm.out_proj.weight': (1, 2), 'mixer.ssm.x_proj.weight': 2,
    'mixer.ssm.dt_proj.weight': 1, 'mixer.ssm.norm.weight': 1, 'mixer.ssm.norm.bias': 1,
}


@torch.no_grad()
def pad_channels(backbone: GroupMamba, multiple: int = 8, most: float = 1.05) -> None:
    """Widen the groups of a stage's blocks to a multiple of channels, in place, for inference.

    The channels that are added are zero everywhere, from the convolution before the stage to the
    one behind it, and do not count in the norms, so the outputs stay as they are. A GPU's matrix
    units want rows of 16 bytes: with 4 * 88 channels instead of tiny's 4 * 87 they take a third of
    the time.

    Args:
        backbone: Not padded yet.
        multiple: Of which a group's channels become one.
        most: A stage that would become wider than this many times its channels is left as it is.
    """
    stages = list(backbone.stages)
    for stage, following in zip(stages, [*stages[1:], None]):
        real = stage.blocks[0].mixer.ssm.dim
        width = -(-real // multiple) * multiple
        if not real < width <= most * real:
            continue
        _pad_conv(stage.embed.proj, width, outputs=True)
        for norm in (stage.embed.norm, stage.norm):
            if isinstance(norm, LayerNorm):  # the last stage may have none
                _pad_norm(norm, real, width)
        for block in stage.blocks:
            _pad_block(block, real, width)
        if following is not None:
            _pad_conv(following.embed.proj, width, outputs=False)
        stage.crop = _WithoutPadding(real)


class _WithoutPadding(nn.Module):

    def __init__(self, real: int) -> None:
        super().__init__()
        self.real = real

    def forward(self, x: Tensor) -> Tensor:
        return without_padding(x, self.real)


def _pad_block(block: Block, real: int, width: int) -> None:
    for table, pad in ((_CHANNELS, lambda t: with_padding(t, width)),
                       (_GROUP_CHANNELS, lambda t: F.pad(t, (0, width - real)))):
        for name, dims in table.items():
            parameter = block.get_parameter(name)
            value = parameter.data
            for dim in (dims, ) if isinstance(dims, int) else dims:
                value = pad(value.movedim(dim, -1)).movedim(-1, dim)
            parameter.data = value.contiguous()
    for norm in (block.norm, block.mixer.norm, block.mixer.ssm.norm):
        norm.real = real
    block.mixer.ssm.dim = width
    for module in block.modules():  # what is printed of them
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.in_channels = module.out_channels = module.groups = len(module.weight)


def _pad_conv(conv: nn.Conv2d, width: int, outputs: bool) -> None:
    """Zero channels among a dense convolution's outputs or inputs."""
    weight = conv.weight.movedim(0 if outputs else 1, -1)
    weight = with_padding(weight, width).movedim(-1, 0 if outputs else 1)
    conv.weight.data = weight.contiguous(memory_format=torch.channels_last)
    if outputs and conv.bias is not None:
        conv.bias.data = with_padding(conv.bias.data, width)
    conv.out_channels, conv.in_channels = weight.shape[:2]


def _pad_norm(norm: LayerNorm, real: int, width: int) -> None:
    for parameter in norm.parameters():
        parameter.data = with_padding(parameter.data, width)
    norm.normalized_shape = norm.weight.shape
    norm.real = real


def _join_groups(part: nn.Module) -> None:
    """Each grouped linear map as one; where kernels read parts of a map, two of them as one. Rows
    of step, B and C are made a multiple of 16 bytes in half precision."""
    for ssm in [m for m in part.modules() if isinstance(m, GroupedSSM)]:
        names = [name for name in ('in_proj', 'gate_proj', 'x_proj', 'out_proj')
                 if isinstance(getattr(ssm, name), GroupedLinear)]
        for name in names:
            weight = getattr(ssm, name).weight
            if name == 'x_proj':
                weight = F.pad(weight, (0, 0, 0, weight.shape[1] % 2))
            setattr(ssm, name, _linear(block_diagonal(weight)))
        if names and ssm.conv.backend == ssm.norm.backend == 'triton':
            ssm.joint_proj = _linear(torch.cat([ssm.in_proj.weight, ssm.gate_proj.weight]))
            ssm.in_proj = ssm.gate_proj = None


class _Squares(nn.Module):
    """Image (B, 3, H, W) to its squares of 2 x 2 pixels, (B, 16, ceil(H / 2) + 3, ceil(W / 2) + 3).

    Channels are as :func:`~mmgroupmamba.ops.image_squares` has them, with two squares of zeros
    before and one after, all in one copy: a convolution of 7 x 7 and stride 2 is then one of 4 x 4
    and stride 1 without padding, of rows of channels that suit a GPU's matrix units. Three channels
    do not: over them, it takes longer than a stage's products.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = F.pad(x, (0, width % 2, 0, height % 2)) if width % 2 or height % 2 else x
        squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, 3, H / 2, 2, W / 2, 2)
        height, width = squares.shape[2], squares.shape[4]
        packed = x.new_zeros(batch, height + 3, width + 3, 16, dtype=linear_dtype(x))
        inside = packed[:, 2:-1, 2:-1, :4 * channels].unflatten(-1, (channels, 2, 2))
        inside.copy_(squares.permute(0, 2, 4, 1, 3, 5))
        return packed.permute(0, 3, 1, 2)


def _pack_pixels(part: nn.Module) -> None:
    """The stem's first convolution over :class:`_Squares`."""
    for stem in [m for m in part.modules() if isinstance(m, Stem)]:
        conv = stem.convs[0]
        if not isinstance(conv, nn.Conv2d):  # done already
            continue
        weight = over_squares(conv.weight)
        packed = nn.Conv2d(16, len(weight), 4, device='meta')
        packed.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        packed.bias = conv.bias
        stem.convs = nn.Sequential(_Squares(), packed, *stem.convs[1:]).eval()


def _fold_biases(part: nn.Module) -> None:
    for embed in [m for m in part.modules() if isinstance(m, (Stem, Downsample))]:
        norm = embed.norm
        if (isinstance(norm, LayerNorm) and norm.backend == 'triton'
                and embed.proj.bias is not None):
            norm.offset, embed.proj.bias = embed.proj.bias, None


class _ConvReLU(nn.Module):
    """Convolution, bias and ReLU in one of cuDNN's."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv, dtype = self.conv, linear_dtype(x)
        return torch.cudnn_convolution_relu(
            x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), conv.stride, conv.padding,
            conv.dilation, conv.groups)


def _join_activations(convs: nn.Sequential) -> None:
    """Each folded convolution of a stem with its ReLU, where this cuDNN gives the same."""
    modules = [m for m in convs if not isinstance(m, (nn.Identity, FirstConv, _Squares))]
    for conv, relu in zip(modules[::2], modules[1::2]):
        if not isinstance(conv, nn.Conv2d) or not isinstance(relu, nn.ReLU):
            return
        joint = _ConvReLU(conv)
        values = torch.arange(conv.in_channels * 32**2, device=conv.weight.device)
        probe = torch.sin(values.float()).view(1, conv.in_channels, 32, 32)
        try:
            for dtype in (torch.float32, torch.bfloat16):
                x = probe.to(memory_format=torch.channels_last)
                with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
                    torch.testing.assert_close(joint(x), F.relu(conv(x)), atol=0.05, rtol=0.05)
        except (RuntimeError, AssertionError):
            return
        convs[list(convs).index(conv)] = joint
        convs[list(convs).index(relu)] = nn.Identity()


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False, device='meta')
    linear.weight = nn.Parameter(weight)
    return linear.eval()


def _cast_maps(part: nn.Module, dtype: torch.dtype) -> None:
    for module in part.modules():
        depthwise = isinstance(module, DepthwiseConv)  # its kernel reads float32
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not depthwise:
            module.to(dtype)
