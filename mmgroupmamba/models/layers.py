"""The parts of GroupMamba, from small to large.

Maps are (B, H, W, C) with the channels contiguous, from the stem to the last norm: linear layers
and norms take them as they are, and convolutions see them as channels-last images.

Sources: GroupMamba (CVPR 2025), section 3 and equations 2 to 9; ``classification/models`` of the
official repository for what the paper leaves open.
"""
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from mmgroupmamba.ops import (
    DIRECTIONS,
    FUSED_OPS,
    BlockWeights,
    MixerEnd,
    add_layer_norm,
    channel_affinity,
    depthwise_conv,
    depthwise_conv_linear,
    directional_scan,
    feed_forward,
    gated_layer_norm,
    grouped_linear,
    infers_on_cpu,
    layer_norm,
    layer_norm_pair,
    linear_dtype,
    linear_sum,
    mixer_end,
    modulate_layer_norm,
    norm_dtype_of,
    projected_scan,
    scans_projected,
    training_block,
    trains_whole,
)

GROUPS = len(DIRECTIONS)


def backend_of(operator: str, fused_ops: Sequence[str]) -> str:
    """What an operator around the scan runs as: 'triton' where it is named, else 'torch'."""
    return 'triton' if operator in fused_ops else 'torch'


class ChannelsLastConv2d(nn.Conv2d):
    """Conv2d from (B, H, W, C_in) to (B, H', W', C_out), its weight laid out as its maps are."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution with bias and its activation, 'gelu' or 'silu': (B, H, W, C) in
    and out."""

    def __init__(self, channels: int, activation: str, fused_ops: Sequence[str] = ()) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        self.activation = activation
        self.backend = backend_of('depthwise_conv', fused_ops)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, self.activation, self.backend)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels, (B, H, W, C) in and out.

    Args:
        before_linear: The result goes into nothing but linear layers or convolutions: where it is
            one kernel, it is in their dtype.

    Attributes:
        real: Of each quarter of the channels, how many count; see :func:`~.fuse.pad_channels`.
        offset: Added to the map before it is normed: the bias of the convolution before it, where
            that was folded.
    """

    def __init__(self, channels: int, eps: float = 1e-5, before_linear: bool = False,
                 fused_ops: Sequence[str] = ()) -> None:
        super().__init__(channels, eps)
        self.before_linear = before_linear
        self.backend = backend_of('layer_norm', fused_ops)
        self.real: Optional[int] = None
        self.offset: Optional[nn.Parameter] = None

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == 'torch' and self.real is None:
            return super().forward(x)
        fused = self.backend == 'triton'
        dtype = linear_dtype(x) if fused and self.before_linear else None
        return layer_norm(x, self.weight, self.bias, self.eps, dtype, self.real, self.backend,
                          self.offset)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual and its norm, in one kernel."""
        dtype = linear_dtype(residual) if self.before_linear else None
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, dtype, self.real,
                              'triton')

    def of_product(self, y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """The norm of y * x * factor, in one kernel; the factor is (B, 1, 1, C)."""
        return modulate_layer_norm(y, x, factor, self.weight, self.bias, self.eps,
                                   linear_dtype(y), self.real, 'triton')


class GroupedLinear(nn.Module):
    """One linear map for each of the four groups of channels, without bias, as a single operation.

    The weight stacks the four: (4, out, in), for (..., 4 * in) -> (..., 4 * out).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(GROUPS, out_channels, in_channels))

    def forward(self, x: Tensor) -> Tensor:
        return grouped_linear(x, self.weight)


class GatedLayerNorm(nn.Module):
    """LayerNorm over the channels of each of the four groups, times SiLU of the gate.

    (B, H, W, 4, d) and the gate (B, H, W, 4 * d) -> (B, H, W, 4 * d).
    """

    def __init__(self, channels: int, fused_ops: Sequence[str] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(GROUPS, channels))
        self.bias = nn.Parameter(torch.zeros(GROUPS, channels))
        self.backend = backend_of('gated_layer_norm', fused_ops)
        self.real: Optional[int] = None

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return gated_layer_norm(y, gate, self.weight, self.bias, real=self.real,
                                backend=self.backend)


class GroupedSSM(nn.Module):
    """The four visual single selective scans (VSSS, equations 2 to 4) of a layer as one.

    Group g has its own quarter of the channels, its own parameters and the direction
    ``DIRECTIONS[g]``; all are stacked, and one scan call serves the four.

    Args:
        channels: C, divisible by 4.
        d_state: N, states a channel.
        scan_backend: See :func:`mmgroupmamba.ops.selective_scan`.
        fused_ops: See :class:`~.groupmamba.GroupMamba`.
    """

    def __init__(self,
                 channels: int,
                 d_state: int = 1,
                 scan_backend: str = 'auto',
                 fused_ops: Sequence[str] = ()) -> None:
        super().__init__()
        self.dim = channels // GROUPS
        self.d_state = d_state
        self.dt_rank = math.ceil(self.dim / 16)
        self.scan_backend = scan_backend

        self.in_proj = GroupedLinear(self.dim, self.dim)
        self.gate_proj = GroupedLinear(self.dim, self.dim)
        self.joint_proj: Optional[nn.Linear] = None  # in place of these two; see models/fuse.py
        self.conv = DepthwiseConv(channels, 'silu', fused_ops)
        self.x_proj = GroupedLinear(self.dim, self.dt_rank + 2 * d_state)
        self.dt_proj = GroupedLinear(self.dt_rank, self.dim)  # applied by the scan
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(channels, d_state))
        self.D = nn.Parameter(torch.empty(channels))
        self.norm = GatedLayerNorm(self.dim, fused_ops)
        self.out_proj = GroupedLinear(self.dim, self.dim)

    def init_weights(self, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        """Mamba's initialisation: A = -(1..N), D = 1, softplus(dt_bias) log-uniform in
        [dt_min, dt_max]."""
        for projection in (self.in_proj, self.gate_proj, self.out_proj):
            nn.init.trunc_normal_(projection.weight, std=.02)
        bound = self.dim**-0.5  # what nn.Linear would draw from
        nn.init.uniform_(self.x_proj.weight, -bound, bound)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        with torch.no_grad():
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            states = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype)
            self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.out_proj(self.norm(*self.scan_and_gate(x)))

    def scan_and_gate(self, x: Tensor, joint: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """What is gated, (B, H, W, 4, d), and the gate, (B, H, W, C). `joint` is ``joint_proj`` of
        x, where that is known."""
        if self.joint_proj is None:
            x, gate = self.in_proj(x), self.gate_proj(x)
        else:
            x, gate = (self.joint_proj(x) if joint is None else joint).chunk(2, -1)
        return self.scan(self.conv(x)), gate

    def scan(self, x: Tensor) -> Tensor:
        """Scan a map (B, H, W, C) with its input-dependent step, B and C: (B, H, W, 4, d), float32
        or, where the norms are one kernel with the gate, in the map's dtype."""
        out_dtype = x.dtype if self.norm.backend == 'triton' else None
        if type(self.x_proj) is GroupedLinear and is_plain(self.x_proj):
            inputs = (x, self.x_proj.weight, self.dt_proj.weight, self.A_log, self.D, self.dt_bias)
            if scans_projected(*inputs, self.scan_backend):
                return projected_scan(*inputs, out_dtype)
        grouped = *x.shape[:3], GROUPS, -1
        x_dbl, values = self.x_proj(x).view(grouped), self.dt_rank + 2 * self.d_state
        if x_dbl.shape[-1] > values:  # padded; see models/fuse.py
            x_dbl = x_dbl[..., :values]
        return directional_scan(
            x.view(grouped),
            x_dbl,  # (B, H, W, 4, R + 2N)
            self.dt_proj.weight,
            self.A_log,
            self.D,
            self.dt_bias,
            backend=self.scan_backend,
            out_dtype=out_dtype)


class ChannelAffinity(nn.Module):
    """Channel affinity modulation (CAM, equations 5 to 7): (B, H, W, C) -> weights (B, 1, 1, C)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.relu(self.fc1(x.mean((1, 2), keepdim=True)))
        return torch.sigmoid(self.fc2(squeezed))


class ModulatedGroupMamba(nn.Module):
    """The modulated group Mamba layer (figure 2, equations 5 to 9): (B, H, W, C) in and out.

    The released code norms with one LayerNorm twice, at the door and before the projection, and
    multiplies the groups with the layer's normed input; so do we.
    """

    def __init__(self,
                 channels: int,
                 scan_backend: str = 'auto',
                 fused_ops: Sequence[str] = ()) -> None:
        super().__init__()
        self.norm = LayerNorm(channels, before_linear=True, fused_ops=fused_ops)
        self.affinity = ChannelAffinity(channels)
        self.ssm = GroupedSSM(channels, scan_backend=scan_backend, fused_ops=fused_ops)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.fused_affinity = 'channel_affinity' in fused_ops
        self.fused_modulation = 'modulate_layer_norm' in fused_ops
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.modulate(self.norm(x))

    def modulate(self, x: Tensor) -> Tensor:
        """The layer but for the norm at its door."""
        y = self.ssm(x)
        factor = self.factor(x)
        if self.fused_modulation:
            return self.proj(self.norm.of_product(y, x, factor))
        return self.proj(self.norm(y * x * factor))

    def factor(self, x: Tensor) -> Tensor:
        """What the channels of each image are multiplied by, (B, 1, 1, C)."""
        affinity = self.affinity
        if self.fused_affinity and all(map(is_plain, (affinity, affinity.fc1, affinity.fc2))):
            fc1, fc2 = affinity.fc1, affinity.fc2
            return channel_affinity(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
                                    self.skip_scale, 'triton')
        return self.skip_scale * affinity(x)


class ConvFFN(nn.Module):
    """Feed-forward with a depthwise convolution before its GELU: (B, H, W, C) in and out."""

    def __init__(self,
                 channels: int,
                 hidden_channels: int,
                 fused_ops: Sequence[str] = ()) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.conv = DepthwiseConv(hidden_channels, 'gelu', fused_ops)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        fc1, conv, fc2 = self.fc1, self.conv, self.fc2
        as_defined = conv.backend == 'torch'
        if (as_defined and infers_on_cpu(x) and all(map(is_plain, (fc1, conv, fc2)))
                and x.dtype == fc1.weight.dtype == fc2.weight.dtype):
            return feed_forward(x, fc1.weight, fc1.bias, conv.weight, conv.bias, conv.activation,
                                fc2.weight, fc2.bias)
        x = fc1(x)
        if as_defined:
            return fc2(conv(x))
        return depthwise_conv_linear(x, conv.weight, conv.bias, conv.activation, fc2.weight,
                                     fc2.bias, conv.backend)

    def hidden(self, x: Tensor) -> Tensor:
        """All but the last linear map: (B, H, W, C) -> (B, H, W, D)."""
        return self.conv(self.fc1(x))


class Pending(NamedTuple):
    """A feed-forward that is still without its last linear map, which goes with the sum behind it.
    """
    hidden: Tensor
    linear: nn.Linear

    def settle(self) -> Tensor:
        """The feed-forward's result, (B, H, W, C)."""
        return self.linear(self.hidden)

    def sum_and_norm(self, residual: Tensor, norm: LayerNorm, behind: Optional[nn.Module] = None
                     ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """The stream (B, H, W, C), its norm, and the linear map behind it, if there is one, all in
        one kernel where the modules are plain and in one dtype."""
        linear, dtype = self.linear, self.hidden.dtype
        if not (is_plain(linear) and is_plain(norm) and linear.weight.dtype == dtype):
            return *norm.of_sum(self.settle(), residual), None
        if not (behind is not None and is_plain(behind, {nn.Linear}, without_bias=True)
                and behind.bias is None and behind.weight.dtype == dtype):
            behind = None
        norm_dtype = linear_dtype(residual) if norm.before_linear else norm_dtype_of(residual)
        return linear_sum(self.hidden, linear.weight, linear.bias, residual, norm.weight,
                          norm.bias, norm.eps, norm_dtype,
                          None if behind is None else behind.weight, 'triton')


class Normed(NamedTuple):
    """What a block's first norm makes of its input, where that is known before it."""
    value: Tensor


class Block(nn.Module):
    """Layer, then feed-forward, each with its residual: (B, H, W, C) in and out.

    The layer norms its own input; ``norm`` is the feed-forward's. With the fused op add_layer_norm,
    a block leaves its last sum to the next one: it takes and returns two maps. With all of them it
    trains as one function, :func:`~mmgroupmamba.ops.training_block`.

    Attributes:
        joins_end, joins_sum: Steps that are one in inference; see ``models/joined.py``.
    """

    def __init__(self,
                 channels: int,
                 mlp_ratio: float,
                 drop_path: float = 0.,
                 scan_backend: str = 'auto',
                 fused_ops: Sequence[str] = ()) -> None:
        super().__init__()
        self.mixer = ModulatedGroupMamba(channels, scan_backend, fused_ops)
        self.norm = LayerNorm(channels, 1e-6, before_linear=True, fused_ops=fused_ops)
        self.fused_sums = 'add_layer_norm' in fused_ops
        self.all_fused = set(fused_ops) == set(FUSED_OPS)
        self.scan_backend = scan_backend
        self.ffn = ConvFFN(channels, int(channels * mlp_ratio), fused_ops)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.joins_end = self.joins_sum = False

    def forward(self, x: Tensor, branch: Union[Tensor, Pending, Normed, None] = None
                ) -> Union[Tensor, tuple[Tensor, Union[Tensor, Pending]]]:
        if self.fused_sums:
            return self._fused(x, branch)
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.ffn(self.norm(x)))

    def _fused(self, x: Tensor, branch: Union[Tensor, Pending, Normed, None]
               ) -> tuple[Tensor, Union[Tensor, Pending]]:
        """The same, each sum in one kernel with the norm that follows it.

        Args:
            x: The stream.
            branch: What the block before this one left to be added to it, if there is one; or the
                norm of x, where the stage knows it.

        Returns:
            The stream, and what is left to be added.
        """
        if self.training and self.all_fused:
            weights = self._weights()
            if weights is not None and trains_whole(x, weights, self.scan_backend):
                return training_block(x, branch, self._keep(x), weights, self.mixer.norm.eps,
                                      self.norm.eps)
        joint = None
        if isinstance(branch, Pending):
            ssm = self.mixer.ssm
            behind = ssm.joint_proj if is_plain(self.mixer) and is_plain(ssm) else None
            x, normed, joint = branch.sum_and_norm(x, self.mixer.norm, behind)
        elif isinstance(branch, Normed):
            normed = branch.value
        elif branch is not None:
            x, normed = self.mixer.norm.of_sum(branch, x)
        else:
            normed = self.mixer.norm(x)
        end = self._end(normed) if self.joins_end else None
        if end is not None:
            scanned, gate = self.mixer.ssm.scan_and_gate(normed, joint)
            x, normed = mixer_end(scanned, gate, normed, self.mixer.factor(normed), x, end,
                                  'triton')
        else:
            x, normed = self.norm.of_sum(self.drop_path(self.mixer.modulate(normed)), x)
        if self.joins_sum and end is not None and is_plain(self.ffn) and is_plain(self, {Block}):
            return x, Pending(self.ffn.hidden(normed), self.ffn.fc2)
        return x, self.drop_path(self.ffn(normed))

    def _end(self, normed: Tensor) -> Optional[MixerEnd]:
        """The weights of what is one step behind the scan in inference; None as :meth:`_weights`.
        """
        mixer, drop_path = self.mixer, self.drop_path
        if (self.training or drop_path.training and isinstance(drop_path, DropPath)
                or torch.is_grad_enabled() or not is_plain(drop_path, {nn.Identity, DropPath})
                or not is_plain(mixer) or not is_plain(mixer.ssm)):
            return None
        ssm = mixer.ssm
        modules = ssm.norm, mixer.norm, mixer.proj, self.norm
        if (not all(map(is_plain, modules))
                or not is_plain(ssm.out_proj, {nn.Linear}, without_bias=True)
                or normed.dtype.itemsize != 2
                or not normed.dtype == ssm.out_proj.weight.dtype == mixer.proj.weight.dtype):
            return None
        return MixerEnd(
            group_weight=ssm.norm.weight, group_bias=ssm.norm.bias, out_proj=ssm.out_proj.weight,
            norm_weight=mixer.norm.weight, norm_bias=mixer.norm.bias, proj=mixer.proj.weight,
            proj_bias=mixer.proj.bias, next_weight=self.norm.weight, next_bias=self.norm.bias,
            norm_eps=mixer.norm.eps, next_eps=self.norm.eps)

    def _weights(self) -> Optional[BlockWeights]:
        """For training as one function; None where a module inside is not as it is here (folded,
        replaced, or with a hook), so that it has its say."""
        mixer, ffn = self.mixer, self.ffn
        if type(ffn) is not ConvFFN:
            return None
        ssm, affinity = mixer.ssm, mixer.affinity
        linears = (ssm.in_proj, ssm.gate_proj, ssm.x_proj, ssm.out_proj, affinity.fc1,
                   affinity.fc2, mixer.proj, ffn.fc1, ffn.fc2, ssm.dt_proj)
        others = mixer.norm, ssm.conv, ssm.norm, self.norm, ffn.conv
        for module in (mixer, ssm, affinity, ffn, *linears, *others):
            if not is_plain(module):
                return None
        in_proj, gate_proj, x_proj, out_proj, squeeze, excite, proj, fc1, fc2, dt_proj = linears
        norm, conv, group_norm, ffn_norm, ffn_conv = others
        if norm.real is not None:
            return None
        return BlockWeights(
            in_proj=in_proj.weight, gate_proj=gate_proj.weight, x_proj=x_proj.weight,
            out_proj=out_proj.weight, proj=proj.weight, fc1=fc1.weight, fc2=fc2.weight,
            proj_bias=proj.bias, fc1_bias=fc1.bias, fc2_bias=fc2.bias,
            excite=excite.weight, excite_bias=excite.bias,
            squeeze=squeeze.weight, squeeze_bias=squeeze.bias,
            norm=norm.weight, norm_bias=norm.bias, conv=conv.weight, conv_bias=conv.bias,
            dt_proj=dt_proj.weight, dt_bias=ssm.dt_bias, A_log=ssm.A_log, D=ssm.D,
            group_norm=group_norm.weight, group_norm_bias=group_norm.bias,
            skip_scale=mixer.skip_scale, ffn_norm=ffn_norm.weight, ffn_norm_bias=ffn_norm.bias,
            ffn_conv=ffn_conv.weight, ffn_conv_bias=ffn_conv.bias)

    def _keep(self, x: Tensor) -> Optional[Tensor]:
        """Stochastic depth's factors, (2, B, 1, 1, 1): 0 or what keeps the mean."""
        dropped = getattr(self.drop_path, 'drop_prob', 0.)
        if not dropped:
            return None
        factors = x.new_empty(2, len(x), 1, 1, 1, dtype=torch.float32)
        return factors.bernoulli_(1 - dropped).div_(1 - dropped)


_GLOBAL_HOOKS = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks,
                 _global_backward_pre_hooks)
_PLAIN = {ModulatedGroupMamba, GroupedSSM, ChannelAffinity, ConvFFN, GroupedLinear, nn.Linear,
          LayerNorm, GatedLayerNorm, DepthwiseConv}


def is_plain(module: nn.Module, kinds: Collection[type] = frozenset(_PLAIN),
             without_bias: bool = False) -> bool:
    """Whether a module is one of ours (or of `kinds`) as it is here, with ordinary parameters (or
    without a bias), not replaced in part or whole and without a hook, so that a function may
    compute in its place."""
    return (type(module) in kinds and 'forward' not in module.__dict__
            and all(type(p) is nn.Parameter or without_bias and name == 'bias' and p is None
                    for name, p in module._parameters.items())
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks or any(_GLOBAL_HOOKS)))


class Stem(nn.Module):
    """Image (B, 3, H, W) -> normed map (B, ceil(H / 4), ceil(W / 4), C).

    Attributes:
        channels_last: Whether the convolutions want the image so; see ``models/joined.py``.
    """

    def __init__(self, hidden_channels: int, channels: int,
                 fused_ops: Sequence[str] = ()) -> None:
        super().__init__()
        layers = []
        for in_channels, kernel, stride in ((3, 7, 2), (hidden_channels, 3, 1),
                                            (hidden_channels, 3, 1)):
            layers += [
                nn.Conv2d(
                    in_channels, hidden_channels, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(hidden_channels),
                nn.ReLU(inplace=True)
            ]
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden_channels, channels, 3, stride=2, padding=1)
        self.norm = LayerNorm(channels, fused_ops=fused_ops)
        self.channels_last = True
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.before_norm(x))

    def before_norm(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ceil(H / 4), ceil(W / 4), C)."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.proj(self.convs(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """(B, H, W, C_in) -> normed map (B, ceil(H / 2), ceil(W / 2), C_out)."""

    def __init__(self, in_channels: int, channels: int, fused_ops: Sequence[str] = ()) -> None:
        super().__init__()
        self.proj = ChannelsLastConv2d(in_channels, channels, 3, stride=2, padding=1)
        self.norm = LayerNorm(channels, fused_ops=fused_ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.before_norm(x))

    def before_norm(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) -> (B, ceil(H / 2), ceil(W / 2), C_out)."""
        return self.proj(x)


def norm_twice(embed: nn.Module, block: nn.Module, x: Tensor) -> Optional[tuple[Tensor, Normed]]:
    """What an embedding makes of x, and what the first block's norm makes of that, (B, H, W, C)
    both, the two norms in one kernel; None where a gradient is wanted or a module is not as it is
    here."""
    if (torch.is_grad_enabled() or not is_plain(embed, {Stem, Downsample})
            or not is_plain(block, {Block}) or not is_plain(block.mixer)):
        return None
    first, second = embed.norm, block.mixer.norm
    if not (is_plain(first, {LayerNorm}) and is_plain(second, {LayerNorm})):
        return None
    x = embed.before_norm(x)
    x, normed = layer_norm_pair(x, first.weight, first.bias, first.eps, second.weight, second.bias,
                                second.eps, None, linear_dtype(x), first.real, first.offset,
                                'triton')
    return x, Normed(normed)


def init_weights(module: nn.Module) -> None:
    """The one weight initialisation, for ``nn.Module.apply``; the official code's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, GroupedSSM):
        module.init_weights()
