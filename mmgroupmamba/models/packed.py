"""Modules of a folded model whose weights are laid out for oneDNN once; see :func:`~.fuse.fuse`.

Each holds the plain module and is that module wherever oneDNN's operators do not serve: with
gradients, under autocast, traced, in another dtype or on another device; and where it was replaced
in part or whole, or has a hook.
"""
import torch.nn as nn
from torch import Tensor

from mmgroupmamba.ops import PackedConvs, feed_forward, infers_on_cpu, packs

from .layers import Block, ChannelsLastConv2d, ConvFFN, Downsample, Stem, is_plain

_CONVS = {nn.Conv2d, ChannelsLastConv2d}


class PackedConv(nn.Module):
    """A dense convolution, of maps as the plain one has them."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.plain = plain
        self.convs = PackedConvs()

    def forward(self, x: Tensor) -> Tensor:
        plain = self.plain
        channels_last = type(plain) is ChannelsLastConv2d  # (B, H, W, C)
        if not (infers_on_cpu(x) and is_plain(plain, _CONVS) and packs(x, plain.weight)
                and x.shape[3 if channels_last else 1] == plain.in_channels):
            return plain(x)
        y = self.convs.conv('', x.permute(0, 3, 1, 2) if channels_last else x, plain.weight,
                            plain.bias, plain.stride[0], plain.padding[0])
        return y.permute(0, 2, 3, 1) if channels_last else y


class PackedFFN(nn.Module):
    """The feed-forward."""

    def __init__(self, plain: ConvFFN) -> None:
        super().__init__()
        self.plain = plain
        self.convs = PackedConvs()

    def forward(self, x: Tensor) -> Tensor:
        ffn = self.plain
        fc1, conv, fc2 = ffn.fc1, ffn.conv, ffn.fc2
        if not (infers_on_cpu(x) and all(map(is_plain, (ffn, fc1, conv, fc2)))
                and packs(x, fc1.weight, conv.weight, fc2.weight)):
            return ffn(x)
        return feed_forward(x, fc1.weight, fc1.bias, conv.weight, conv.bias, conv.activation,
                            fc2.weight, fc2.bias, self.convs)


def pack(part: nn.Module) -> None:
    """Put such modules into a part of a model in their plain ones' place; again, nothing more.
    Where a module there is of another kind than the backbone's, it stays."""
    for module in list(part.modules()):
        if isinstance(module, Stem):
            for i, conv in enumerate(module.convs):
                if _is_usual(conv):
                    module.convs[i] = PackedConv(conv)
        if isinstance(module, (Stem, Downsample)) and _is_usual(module.proj):
            module.proj = PackedConv(module.proj)
        if (isinstance(module, Block) and type(module.ffn) is ConvFFN
                and module.ffn.conv.backend == 'torch'):
            module.ffn = PackedFFN(module.ffn)


def _is_usual(conv: nn.Module) -> bool:
    """Whether a module is a convolution of the kind that the backbone has before its stages."""
    return (type(conv) in _CONVS and conv.groups == 1 and conv.dilation == (1, 1)
            and conv.padding_mode == 'zeros' and conv.stride[0] == conv.stride[1]
            and not isinstance(conv.padding, str) and conv.padding[0] == conv.padding[1])
