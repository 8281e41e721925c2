"""What stands around the scan, each one operation on a channels-last map: shapes, checks and
definitions.

Each operator has the backends of ``_BACKENDS``: 'torch' is the definition, which is written in the
operator itself; another is a module with a function of the operator's name and::

    why_not(device_type: str) -> str | None   # None: it runs on such a device

Precision is the arguments', whatever autocast says, but for the sums inside: float32 at least.
"""
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from . import around_scan_triton
from .directions import DIRECTIONS
from .operator import infers_on_cpu
from .precision import cast, without_autocast
from .selective_scan import BackendUnavailableError, default_device

GROUPS = len(DIRECTIONS)
_BACKENDS: dict[str, Optional[ModuleType]] = {
    'torch': None,
    'triton': around_scan_triton,
}
FUSED_OPS = ('depthwise_conv', 'layer_norm', 'add_layer_norm', 'channel_affinity',
             'modulate_layer_norm', 'gated_layer_norm')
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    'gelu': F.gelu,
    'silu': F.silu,
    'none': lambda x: x,
}
# for inference, where nobody needs what went in
_IN_PLACE = {**_ACTIVATIONS, 'gelu': torch.ops.aten.gelu_, 'silu': torch.ops.aten.silu_}


def check_fused_ops(names: Union[str, Sequence[str]], device_type: Optional[str] = None
                    ) -> tuple[str, ...]:
    """Raise unless `names` are of :data:`FUSED_OPS`, and fused kernels run on `device_type`.

    Args:
        names: Of a model, or 'all'.
        device_type: 'cpu', 'cuda', ...; None means CUDA where there is a GPU, else CPU.

    Returns:
        The names.

    Raises:
        ValueError: A name is unknown; the message lists the legal ones.
        BackendUnavailableError: The kernels cannot run; the message says why.
    """
    if isinstance(names, str) and names == 'all':
        names = FUSED_OPS
    if isinstance(names, str) or not set(names) <= set(FUSED_OPS):
        raise ValueError(f"fused_ops must be 'all' or a list of {', '.join(FUSED_OPS)}, got "
                         f'{names!r}')
    for name in names:
        _module(name, 'triton', device_type or default_device())
    return tuple(names)


def depthwise_conv(x: Tensor,
                   weight: Tensor,
                   bias: Tensor,
                   activation: str,
                   backend: str = 'torch') -> Tensor:
    """Depthwise 3x3 convolution of a map that keeps H and W, and its activation.

    Args:
        x: Map (batch, H, W, C), floating.
        weight: (C, 1, 3, 3), as nn.Conv2d's.
        bias: (C,).
        activation: 'gelu' (the exact one), 'silu' or 'none'.
        backend: 'torch' or 'triton'. The Triton kernels keep only x for the backward.

    Returns:
        (batch, H, W, C) in x's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or an option is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    _check_conv(x, weight, bias, activation)
    channels = x.shape[3]
    module = _module('depthwise_conv', backend, x.device.type)
    if module is not None:
        return module.depthwise_conv(x, weight, bias, activation)
    with without_autocast(x.device.type):
        y = F.conv2d(x.permute(0, 3, 1, 2), *cast(x.dtype, weight, bias), padding=1,
                     groups=channels)
        activate = (_ACTIVATIONS if y.requires_grad else _IN_PLACE)[activation]
        return activate(y.permute(0, 2, 3, 1))


def depthwise_conv_linear(x: Tensor,
                          conv_weight: Tensor,
                          conv_bias: Tensor,
                          activation: str,
                          weight: Tensor,
                          bias: Tensor,
                          backend: str = 'torch') -> Tensor:
    """A linear layer of :func:`depthwise_conv`'s result, under autocast in its dtype.

    Args:
        x, conv_weight, conv_bias, activation: Of :func:`depthwise_conv`.
        weight: Of the linear layer, (D, C).
        bias: (D,).
        backend: 'torch' or 'triton'. With 'triton' the wide map between the two is not kept for
            the backward but computed again.

    Returns:
        (batch, H, W, D).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or an option is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    check_tensors('depthwise_conv_linear', x.device, weight=(weight, (len(bias), x.shape[-1])),
                  bias=(bias, (len(weight), )))
    if backend == 'triton' and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _check_conv(x, conv_weight, conv_bias, activation)
        module = _module('depthwise_conv_linear', backend, x.device.type)
        return module.depthwise_conv_linear(x, conv_weight, conv_bias, activation, weight, bias)
    return F.linear(depthwise_conv(x, conv_weight, conv_bias, activation, backend), weight, bias)


def layer_norm(x: Tensor,
               weight: Tensor,
               bias: Tensor,
               eps: float = 1e-5,
               norm_dtype: Optional[torch.dtype] = None,
               real: Optional[int] = None,
               backend: str = 'torch',
               offset: Optional[Tensor] = None) -> Tensor:
    """LayerNorm over the channels of a map.

    Args:
        x: (batch, H, W, C), floating.
        weight, bias: (C,).
        eps: Added to the variance.
        norm_dtype: Of the result, as for :func:`add_layer_norm`.
        real: Of the channels of each quarter, how many count. The others, behind them, are zero,
            and so is what comes of them: padding that makes a row of the map a multiple of 16
            bytes. None: all count.
        backend: 'torch' or 'triton'. The Triton kernels keep only x for the backward.
        offset: (C,), added to x before the norm, such as the bias of a convolution; zero in what
            does not count.

    Returns:
        The norm, (batch, H, W, C); its statistics are in float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    _check_norm('layer_norm', x, weight, bias)
    check_real('layer_norm', x.shape[3], real)
    if offset is not None:
        check_tensors('layer_norm', x.device, offset=(offset, (x.shape[3], )))
    norm_dtype = norm_dtype or norm_dtype_of(x)
    module = _module('layer_norm', backend, x.device.type)
    if module is not None:
        return module.layer_norm(x, weight, bias, eps, norm_dtype, real, offset)
    if offset is not None:
        x = x + offset
    return _wide_layer_norm(x, weight, bias, eps, norm_dtype, real)


def add_layer_norm(x: Tensor,
                   residual: Tensor,
                   weight: Tensor,
                   bias: Tensor,
                   eps: float = 1e-5,
                   norm_dtype: Optional[torch.dtype] = None,
                   real: Optional[int] = None,
                   backend: str = 'torch') -> tuple[Tensor, Tensor]:
    """The residual stream after an addition, and its LayerNorm over the channels.

    Args:
        x: What is added, (batch, H, W, C), floating.
        residual: The stream, of x's shape.
        weight, bias: Of the norm, (C,).
        eps: Added to the variance.
        norm_dtype: Of the norm; None means what F.layer_norm gives: float32 under autocast on
            CUDA, else the sum's. To ask for the dtype of the linear layer that comes next
            (:func:`linear_dtype`) saves its cast.
        real: Of the channels of each quarter, how many count. The others, behind them, are zero,
            and so is what comes of them: padding that makes a row of the map a multiple of 16
            bytes. None: all count.
        backend: 'torch' or 'triton'. The Triton kernels keep only the sum for the backward.

    Returns:
        x + residual in the dtype of PyTorch's addition, and its norm; statistics are of the
        rounded sum, in float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    _check_norm('add_layer_norm', x, weight, bias, residual=residual)
    check_real('add_layer_norm', x.shape[3], real)
    norm_dtype = norm_dtype or norm_dtype_of(x, residual)
    module = _module('add_layer_norm', backend, x.device.type)
    if module is not None:
        return module.add_layer_norm(x, residual, weight, bias, eps, norm_dtype, real)
    with without_autocast(x.device.type):
        total = x + residual
    return total, _wide_layer_norm(total, weight, bias, eps, norm_dtype, real)


def channel_affinity(x: Tensor,
                     squeeze: Tensor,
                     squeeze_bias: Tensor,
                     excite: Tensor,
                     excite_bias: Tensor,
                     skip: Tensor,
                     backend: str = 'torch') -> Tensor:
    """Channel affinity modulation's weights (equations 5 to 7), times the layer's skip_scale.

    Args:
        x: Map (batch, H, W, C), floating.
        squeeze, squeeze_bias: Of the first linear map, (R, C) and (R,), R < C.
        excite, excite_bias: Of the second, (C, R) and (C,).
        skip: (1,).
        backend: 'torch' or 'triton'. The Triton kernels keep nothing of the map's size for the
            backward.

    Returns:
        skip * sigmoid(excite(relu(squeeze(mean of x)))), (batch, 1, 1, C), in float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError('channel_affinity: x must be (batch, H, W, C) and not empty, got '
                         f'{tuple(x.shape)}')
    channels, hidden = x.shape[3], len(squeeze)
    if not 0 < hidden < channels:
        raise ValueError(f'channel_affinity: squeeze must be (R, {channels}), R less than '
                         f'{channels}, got {tuple(squeeze.shape)}')
    check_tensors('channel_affinity', x.device, x=(x, x.shape),
                  squeeze=(squeeze, (hidden, channels)), squeeze_bias=(squeeze_bias, (hidden, )),
                  excite=(excite, (channels, hidden)), excite_bias=(excite_bias, (channels, )),
                  skip=(skip, (1, )))
    module = _module('channel_affinity', backend, x.device.type)
    if module is not None:
        return module.channel_affinity(x, squeeze, squeeze_bias, excite, excite_bias, skip)
    with without_autocast(x.device.type):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = x.mean((1, 2), keepdim=True, dtype=wide)
        squeeze, squeeze_bias, excite, excite_bias, skip = cast(
            wide, squeeze, squeeze_bias, excite, excite_bias, skip)
        # not by F.linear, whose backward autocast may stand around
        hidden = F.relu((mean[..., None, :] * squeeze).sum(-1) + squeeze_bias)
        return skip * torch.sigmoid((hidden[..., None, :] * excite).sum(-1) + excite_bias)


def modulate_layer_norm(y: Tensor,
                        x: Tensor,
                        factor: Tensor,
                        weight: Tensor,
                        bias: Tensor,
                        eps: float = 1e-5,
                        norm_dtype: Optional[torch.dtype] = None,
                        real: Optional[int] = None,
                        backend: str = 'torch') -> Tensor:
    """LayerNorm of two maps' product, whose channels are weighted in each image (equation 7).

    Args:
        y, x: Maps (batch, H, W, C), floating.
        factor: (batch, 1, 1, C).
        weight, bias: Of the norm, (C,).
        eps: Added to the variance.
        norm_dtype: Of the result, as for :func:`add_layer_norm`.
        real: Of the channels of each quarter, how many count. The others, behind them, are zero,
            and so is what comes of them: padding that makes a row of the map a multiple of 16
            bytes. None: all count.
        backend: 'torch' or 'triton'. The Triton kernels keep only y, x and factor for the
            backward.

    Returns:
        LayerNorm(y * x * factor), (batch, H, W, C); product and statistics are in float32 at
        least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    _check_norm('modulate_layer_norm', y, weight, bias, x=x)
    check_real('modulate_layer_norm', y.shape[3], real)
    check_tensors('modulate_layer_norm', y.device, factor=(factor, (len(y), 1, 1, y.shape[3])))
    norm_dtype = norm_dtype or norm_dtype_of(y, x, factor)
    module = _module('modulate_layer_norm', backend, y.device.type)
    if module is not None:
        return module.modulate_layer_norm(y, x, factor, weight, bias, eps, norm_dtype,
                                          real)
    with without_autocast(y.device.type):
        dtype = torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)
        y, x, factor = cast(dtype, y, x, factor)
        product = y * x * factor
    return _wide_layer_norm(product, weight, bias, eps, norm_dtype, real)


def norm_dtype_of(*tensors: Tensor) -> torch.dtype:
    """What F.layer_norm gives for tensors' sum or product."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    amp = tensors[0].is_cuda and torch.is_autocast_enabled('cuda')
    return torch.float32 if amp and dtype != torch.float64 else dtype


def _wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
                     real: Optional[int]) -> Tensor:
    """The definition, in float32 at least; rounded once."""
    with without_autocast(x.device.type):
        x, weight, bias = cast(torch.promote_types(x.dtype, torch.float32), x, weight, bias)
        channels = x.shape[-1:]
        if real is None:
            return F.layer_norm(x, channels, weight, bias, eps).to(dtype)
        x, weight, bias = (without_padding(t, real) for t in (x, weight, bias))
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)
        return with_padding(normed, channels.numel() // GROUPS)


def with_padding(x: Tensor, width: int) -> Tensor:
    """(..., 4 * d) -> (..., 4 * width): zeros behind the channels of each quarter."""
    quarters = x.unflatten(-1, (GROUPS, -1))
    return F.pad(quarters, (0, width - quarters.shape[-1])).flatten(-2)


def without_padding(x: Tensor, real: int) -> Tensor:
    """(..., 4 * width) -> (..., 4 * real), the first of each quarter."""
    return x.unflatten(-1, (GROUPS, -1))[..., :real].flatten(-2)


def gated_layer_norm(y: Tensor,
                     gate: Tensor,
                     weight: Tensor,
                     bias: Tensor,
                     eps: float = 1e-5,
                     real: Optional[int] = None,
                     backend: str = 'torch') -> Tensor:
    """LayerNorm over the channels of each group of the scan's output, times SiLU of the gate.

    Args:
        y: The scan's output, (batch, H, W, G, d), floating.
        gate: Before its SiLU, (batch, H, W, G * d).
        weight, bias: Of the norms, (G, d).
        eps: Added to the variance.
        real: Of each group's d channels, how many count, as for :func:`layer_norm`.
        backend: 'torch' or 'triton'. The Triton kernels keep only the arguments for the backward.

    Returns:
        (batch, H, W, G * d) in the gate's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    if y.dim() != 5 or 0 in y.shape:
        raise ValueError('gated_layer_norm: y must be (batch, H, W, G, d) and not empty, got '
                         f'{tuple(y.shape)}')
    grouped = y.shape[3:]
    check_tensors('gated_layer_norm', y.device, y=(y, y.shape),
                  gate=(gate, (*y.shape[:3], grouped.numel())), weight=(weight, grouped),
                  bias=(bias, grouped))
    check_real('gated_layer_norm', grouped.numel(), real, grouped[0])
    module = _module('gated_layer_norm', backend, y.device.type)
    if module is not None:
        return module.gated_layer_norm(y, gate, weight, bias, eps, real)
    with without_autocast(y.device.type):
        wide = torch.promote_types(y.dtype, torch.float32)
        y, weight, bias = cast(wide, y, weight, bias)
        if real is None:
            normed = F.layer_norm(y, grouped[1:], eps=eps)
        else:
            normed = F.layer_norm(y[..., :real], (real, ), eps=eps)
            normed = F.pad(normed, (0, grouped[1] - real))
        normed = torch.addcmul(bias, normed, weight, out=normed if infers_on_cpu(y) else None)
        normed = normed.flatten(-2).to(gate.dtype)
        return torch.mul(normed, F.silu(gate), out=normed if infers_on_cpu(gate) else None)


def _module(operator: str, backend: str, device_type: str) -> Optional[ModuleType]:
    """The backend's module, checked; None means the definition."""
    if backend not in _BACKENDS:
        raise ValueError(f'{operator}: unknown backend {backend!r}: choose one of '
                         f'{", ".join(_BACKENDS)}')
    module = _BACKENDS[backend]
    if module is None or torch.compiler.is_compiling():  # the check imports: no graph for it
        return module
    reason = module.why_not(device_type)
    if reason is not None:
        raise BackendUnavailableError(f'{operator}: backend {backend!r} cannot run: {reason}')
    return module


def check_backend_of(operator: str, backend: str, device_type: str) -> bool:
    """Whether an operator's backend is another than the definition.

    Raises:
        ValueError: There is no such backend; the message lists the legal ones.
        BackendUnavailableError: It cannot run on such a device.
    """
    return _module(operator, backend, device_type) is not None


def check_tensors(operator: str, device: torch.device,
                  **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise unless each tensor has its shape, is on the map's device and floating."""
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f'{operator}: {name} must be {tuple(shape)}, got '
                             f'{tuple(tensor.shape)}')
        if tensor.device != device:
            raise ValueError(f'{operator}: {name} is on {tensor.device}, the map on {device}')
        if not tensor.is_floating_point():
            raise ValueError(f'{operator}: {name} must be real floating, got {tensor.dtype}')


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> None:
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError('depthwise_conv: x must be (batch, H, W, C) and not empty, got '
                         f'{tuple(x.shape)}')
    if activation not in _ACTIVATIONS:
        raise ValueError(f'depthwise_conv: unknown activation {activation!r}: choose one of '
                         f'{", ".join(_ACTIVATIONS)}')
    channels = x.shape[3]
    check_tensors('depthwise_conv', x.device, x=(x, x.shape), weight=(weight, (channels, 1, 3, 3)),
                  bias=(bias, (channels, )))


def _check_norm(operator: str, x: Tensor, weight: Tensor, bias: Tensor, /,
                **like_x: Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape:
        name = 'y' if 'x' in like_x else 'x'
        raise ValueError(f'{operator}: {name} must be (batch, H, W, C) and not empty, got '
                         f'{tuple(x.shape)}')
    channels = (x.shape[3], )
    check_tensors(operator, x.device, **{k: (v, x.shape) for k, v in like_x.items()},
                  weight=(weight, channels), bias=(bias, channels))
    if not x.is_floating_point():
        raise ValueError(f'{operator}: the map must be real floating, got {x.dtype}')


def check_real(operator: str, channels: int, real: Optional[int], groups: int = GROUPS) -> None:
    """Raise a ValueError unless `real` of each group's channels may count; None: all do."""
    if real is not None and (channels % groups or not 0 < real <= channels // groups):
        raise ValueError(f'{operator}: real must be 1 to {channels // groups}, of {groups} groups '
                         f'of channels, got {real} of {channels}')
