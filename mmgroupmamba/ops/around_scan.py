"""What stands around the scan, each one operation on a channels-last map: shapes, checks and
definitions.

Each operator has the backends of ``_BACKENDS``: 'torch' is the definition, which is written in the
operator itself; another is a module with a function of the operator's name and::

    why_not(device_type: str) -> str | None   # None: it runs on such a device

Precision is the arguments', whatever autocast says, but for the sums inside: float32 at least.
"""
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import around_scan_triton
from .precision import cast, without_autocast
from .selective_scan import BackendUnavailableError, default_device

_BACKENDS: dict[str, Optional[ModuleType]] = {
    'torch': None,
    'triton': around_scan_triton,
}
FUSED_OPS = ('depthwise_conv', 'add_layer_norm', 'gated_layer_norm')
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    'gelu': F.gelu,
    'silu': F.silu,
    'none': lambda x: x,
}
# for inference, where nobody needs what went in
_IN_PLACE = {**_ACTIVATIONS, 'gelu': torch.ops.aten.gelu_, 'silu': torch.ops.aten.silu_}


def check_fused_ops(names: Sequence[str], device_type: Optional[str] = None) -> None:
    """Raise unless `names` are of :data:`FUSED_OPS`, and fused kernels run on `device_type`.

    Args:
        names: Of a model.
        device_type: 'cpu', 'cuda', ...; None means CUDA where there is a GPU, else CPU.

    Raises:
        ValueError: A name is unknown; the message lists the legal ones.
        BackendUnavailableError: The kernels cannot run; the message says why.
    """
    if isinstance(names, str) or not set(names) <= set(FUSED_OPS):
        raise ValueError(f'fused_ops must be a list of {", ".join(FUSED_OPS)}, got {names!r}')
    for name in names:
        _module(name, 'triton', device_type or default_device())


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
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError('depthwise_conv: x must be (batch, H, W, C) and not empty, got '
                         f'{tuple(x.shape)}')
    if activation not in _ACTIVATIONS:
        raise ValueError(f'depthwise_conv: unknown activation {activation!r}: choose one of '
                         f'{", ".join(_ACTIVATIONS)}')
    channels = x.shape[3]
    _check('depthwise_conv', x.device, x=(x, x.shape), weight=(weight, (channels, 1, 3, 3)),
           bias=(bias, (channels, )))
    module = _module('depthwise_conv', backend, x.device.type)
    if module is not None:
        return module.depthwise_conv(x, weight, bias, activation)
    with without_autocast(x.device.type):
        y = F.conv2d(x.permute(0, 3, 1, 2), *cast(x.dtype, weight, bias), padding=1,
                     groups=channels)
        activate = (_ACTIVATIONS if y.requires_grad else _IN_PLACE)[activation]
        return activate(y.permute(0, 2, 3, 1))


def add_layer_norm(x: Tensor,
                   residual: Tensor,
                   weight: Tensor,
                   bias: Tensor,
                   eps: float = 1e-5,
                   norm_dtype: Optional[torch.dtype] = None,
                   backend: str = 'torch') -> tuple[Tensor, Tensor]:
    """The residual stream after an addition, and its LayerNorm over the channels.

    Args:
        x: What is added, (batch, H, W, C), floating.
        residual: The stream, of x's shape.
        weight, bias: Of the norm, (C,).
        eps: Added to the variance.
        norm_dtype: Of the norm; None means what F.layer_norm gives: float32 under autocast on
            CUDA, else the sum's. To ask for the dtype of the linear layer that comes next saves
            its cast.
        backend: 'torch' or 'triton'. The Triton kernels keep only the sum for the backward.

    Returns:
        x + residual in the dtype of PyTorch's addition, and its norm; statistics are of the
        rounded sum, in float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError('add_layer_norm: x must be (batch, H, W, C) and not empty, got '
                         f'{tuple(x.shape)}')
    channels = (x.shape[3], )
    _check('add_layer_norm', x.device, x=(x, x.shape), residual=(residual, x.shape),
           weight=(weight, channels), bias=(bias, channels))
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if norm_dtype is None:
        amp = x.device.type == 'cuda' and torch.is_autocast_enabled('cuda')
        norm_dtype = torch.float32 if amp and dtype != torch.float64 else dtype
    module = _module('add_layer_norm', backend, x.device.type)
    if module is not None:
        return module.add_layer_norm(x, residual, weight, bias, eps, norm_dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(x.device.type):
        total = x + residual
        wide_total, weight, bias = cast(wide, total, weight, bias)
        normed = F.layer_norm(wide_total, channels, weight, bias, eps)
        return total, normed.to(norm_dtype)


def gated_layer_norm(y: Tensor,
                     gate: Tensor,
                     weight: Tensor,
                     bias: Tensor,
                     eps: float = 1e-5,
                     backend: str = 'torch') -> Tensor:
    """LayerNorm over the channels of each group of the scan's output, times SiLU of the gate.

    Args:
        y: The scan's output, (batch, H, W, G, d), floating.
        gate: Before its SiLU, (batch, H, W, G * d).
        weight, bias: Of the norms, (G, d).
        eps: Added to the variance.
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
    _check('gated_layer_norm', y.device, y=(y, y.shape),
           gate=(gate, (*y.shape[:3], grouped.numel())), weight=(weight, grouped),
           bias=(bias, grouped))
    module = _module('gated_layer_norm', backend, y.device.type)
    if module is not None:
        return module.gated_layer_norm(y, gate, weight, bias, eps)
    with without_autocast(y.device.type):
        wide = torch.promote_types(y.dtype, torch.float32)
        y, weight, bias = cast(wide, y, weight, bias)
        normed = F.layer_norm(y, grouped[1:], eps=eps)
        normed = torch.addcmul(bias, normed, weight).flatten(-2)
        return normed.to(gate.dtype) * F.silu(gate)


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


def _check(operator: str, device: torch.device,
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
