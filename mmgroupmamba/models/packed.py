"""Modules of a folded model whose weights are laid out for oneDNN once; see :func:`~.fuse.fuse`.

Each holds the plain module and is that module wherever oneDNN's operators do not serve: with
gradients, under autocast, traced, in another dtype or on another device.
"""
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgroupmamba.ops import PackedConvs, feed_forward, packs

from .layers import Block, ChannelsLastConv2d, ConvFFN, Downsample, Stem, is_plain


class PackedConv(nn.Module):
    """A convolution, with ReLU behind it if that is asked for; of maps as the plain one has them.
    """

    def __init__(self, plain: nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        self.plain, self.relu = plain, relu
        self.convs = PackedConvs()

    def forward(self, x: Tensor) -> Tensor:
        plain = self.plain
        if not packs(x, plain.weight):
            y = plain(x)
            return F.relu(y) if self.relu else y
        channels_last = isinstance(plain, ChannelsLastConv2d)  # (B, H, W, C)
        y = self.convs.conv('', x.permute(0, 3, 1, 2) if channels_last else x, plain.weight,
                            plain.bias, plain.stride[0], plain.padding[0], plain.groups,
                            'relu' if self.relu else 'none')
        return y.permute(0, 2, 3, 1) if channels_last else y


class PackedFFN(nn.Module):
    """The feed-forward."""

    def __init__(self, plain: ConvFFN) -> None:
        super().__init__()
        self.plain = plain
        self.convs = PackedConvs()

    def forward(self, x: Tensor) -> Tensor:
        fc1, conv, fc2 = self.plain.fc1, self.plain.conv, self.plain.fc2
        if not (packs(x, fc1.weight) and all(map(is_plain, (fc1, conv, fc2)))):
            return self.plain(x)
        return feed_forward(x, fc1.weight, fc1.bias, conv.weight, conv.bias, conv.activation,
                            fc2.weight, fc2.bias, self.convs)


def pack(part: nn.Module) -> None:
    """Put such modules into a part of a model in their plain ones' place; again, nothing more."""
    for module in list(part.modules()):
        if isinstance(module, Stem):
            module.convs = _pack_stem(module.convs)
        if isinstance(module, (Stem, Downsample)) and isinstance(module.proj, nn.Conv2d):
            module.proj = PackedConv(module.proj)
        if isinstance(module, Block) and isinstance(module.ffn, ConvFFN):
            module.ffn = PackedFFN(module.ffn)


def _pack_stem(convs: nn.Sequential) -> nn.Sequential:
    """Each convolution with its ReLU, the folded norm between them left out."""
    modules = [m for m in convs if not isinstance(m, nn.Identity)]
    packed = []
    for module in modules:
        if isinstance(module, nn.ReLU) and packed and isinstance(packed[-1], nn.Conv2d):
            packed[-1] = PackedConv(packed[-1], relu=True)
        else:
            packed.append(module)
    return nn.Sequential(*packed)
