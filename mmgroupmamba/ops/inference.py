"""Steps of a layer that inference takes in one kernel, because no backward needs what lies between.

Each has its definition here, in operations that have theirs elsewhere, and the backends of
``around_scan``: 'torch' is the definition, 'triton' a kernel in ``inference_triton``, which refuses
to take a gradient. Precision is the arguments', whatever autocast says.
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import inference_triton
from .around_scan import (
    GROUPS,
    add_layer_norm,
    check_backend_of,
    check_real,
    check_tensors,
    gated_layer_norm,
    layer_norm,
    modulate_layer_norm,
    norm_dtype_of,
)
from .inference_triton import joins_linear_sum as joins_linear_sum
from .inference_triton import joins_mixer_end as joins_mixer_end
from .precision import without_autocast


class MixerEnd(NamedTuple):
    """Weights of :func:`mixer_end`.

    Attributes:
        group_weight, group_bias, group_eps: Of the groups' norms, (4, d).
        out_proj: Of the groups' linear maps, as one block-diagonal matrix (C, C).
        norm_weight, norm_bias, norm_eps: Of the layer's norm, (C,).
        proj, proj_bias: Of its projection, (C, C) and (C,).
        next_weight, next_bias, next_eps: Of the norm of the residual stream behind it, (C,).
    """
    group_weight: Tensor
    group_bias: Tensor
    out_proj: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    next_weight: Tensor
    next_bias: Tensor
    group_eps: float = 1e-5
    norm_eps: float = 1e-5
    next_eps: float = 1e-6


def mixer_end(y: Tensor, gate: Tensor, x: Tensor, factor: Tensor, residual: Tensor,
              weights: MixerEnd, backend: str = 'torch') -> tuple[Tensor, Tensor]:
    """What a layer does behind its scan, to the norm of its feed-forward: groups' norms, gate,
    output map, modulation (equations 8 and 9), norm, projection, residual sum and its norm.

    Args:
        y: The scan's result, (batch, H, W, 4, d).
        gate, x: The layer's gate and normed input, (batch, H, W, C).
        factor: Channel affinity times skip, (batch, 1, 1, C).
        residual: The stream, (batch, H, W, C).
        weights: The two linear maps in x's dtype.
        backend: 'torch' or 'triton', which takes half precision and at most 128 channels, those of
            a group made up to a power of two. It rounds nothing between the two products but what
            goes into them.

    Returns:
        The stream in its dtype and its norm in x's, (batch, H, W, C).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or not the backend.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    if x.dim() != 4 or 0 in x.shape or x.shape[3] % GROUPS:
        raise ValueError('mixer_end: x must be (batch, H, W, 4 * d) and not empty, got '
                         f'{tuple(x.shape)}')
    channels = x.shape[3]
    grouped = GROUPS, channels // GROUPS
    vector = (channels, )
    check_tensors('mixer_end', x.device, y=(y, (*x.shape[:3], *grouped)), gate=(gate, x.shape),
                  factor=(factor, (len(x), 1, 1, channels)), residual=(residual, x.shape),
                  group_weight=(weights.group_weight, grouped),
                  group_bias=(weights.group_bias, grouped),
                  out_proj=(weights.out_proj, vector * 2), proj=(weights.proj, vector * 2),
                  **{name: (getattr(weights, name), vector) for name in (
                      'norm_weight', 'norm_bias', 'proj_bias', 'next_weight', 'next_bias')})
    if not x.dtype == weights.out_proj.dtype == weights.proj.dtype:
        raise ValueError(f'mixer_end: both linear maps must be in the dtype of x, {x.dtype}, got '
                         f'{weights.out_proj.dtype} and {weights.proj.dtype}')
    if check_backend_of('mixer_end', backend, x.device.type):
        if x.dtype.itemsize != 2 or not joins_mixer_end(channels):
            raise ValueError('mixer_end: the Triton kernel takes half precision and few channels, '
                             f"not {x.dtype} and {channels}: use backend='torch'")
        return inference_triton.MIXER_END(y, gate, x, factor, residual, *weights)
    w = weights
    with without_autocast(x.device.type):
        y = gated_layer_norm(y, gate.to(x.dtype), w.group_weight, w.group_bias, w.group_eps)
        y = modulate_layer_norm(F.linear(y, w.out_proj), x, factor, w.norm_weight, w.norm_bias,
                                w.norm_eps, x.dtype)
        y = F.linear(y, w.proj, w.proj_bias.to(x.dtype))
        total, normed = add_layer_norm(y, residual, w.next_weight, w.next_bias, w.next_eps,
                                       x.dtype)
    return total.to(residual.dtype), normed


def linear_sum(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor,
               norm_bias: Tensor, eps: float, norm_dtype: torch.dtype,
               next_weight: Optional[Tensor] = None, backend: str = 'torch'
               ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """A feed-forward's last linear map, the residual sum, its norm and the linear map behind that:
    from one layer into the next.

    Args:
        x: The hidden map, (batch, H, W, D).
        weight, bias: Of the linear map, (C, D) in x's dtype and (C,).
        residual: The stream, (batch, H, W, C).
        norm_weight, norm_bias, eps: Of the norm, (C,).
        norm_dtype: Of the norm's result.
        next_weight: Of the linear map of the norm, without bias, (E, C) in x's dtype.
        backend: 'torch' or 'triton', which takes half precision, E a multiple of C, and C and D for
            which :func:`joins_linear_sum`: at most 128, a multiple of 8, and a multiple of 64. The
            linear map's result is not rounded there.

    Returns:
        The stream in its dtype, its norm, and the last map in x's dtype, (batch, H, W, E), or None.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or not the backend.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError('linear_sum: x must be (batch, H, W, D) and not empty, got '
                         f'{tuple(x.shape)}')
    channels = len(weight)
    vectors = dict(bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check_tensors('linear_sum', x.device, weight=(weight, (channels, x.shape[3])),
                  residual=(residual, (*x.shape[:3], channels)),
                  **{name: (t, (channels, )) for name, t in vectors.items()})
    linears = [weight]
    if next_weight is not None:
        check_tensors('linear_sum', x.device,
                      next_weight=(next_weight, (len(next_weight), channels)))
        linears.append(next_weight)
    if any(t.dtype != x.dtype for t in linears):
        raise ValueError(f'linear_sum: the linear maps must be in the dtype of x, {x.dtype}, got '
                         f'{", ".join(str(t.dtype) for t in linears)}')
    if check_backend_of('linear_sum', backend, x.device.type):
        if (x.dtype.itemsize != 2 or not joins_linear_sum(*weight.shape)
                or any(len(t) % channels for t in linears)):
            raise ValueError('linear_sum: the Triton kernel takes half precision and few channels, '
                             f"not {x.dtype}, {channels} and {x.shape[3]}: use backend='torch'")
        total, normed, out = inference_triton.LINEAR_SUM(
            x, weight, bias, residual, norm_weight, norm_bias, eps, norm_dtype, next_weight)
        return total, normed, None if next_weight is None else out
    with without_autocast(x.device.type):
        y = F.linear(x, weight, bias.to(x.dtype))
        total, normed = add_layer_norm(y, residual, norm_weight, norm_bias, eps, norm_dtype)
        out = None if next_weight is None else F.linear(normed.to(x.dtype), next_weight)
    return total.to(residual.dtype), normed, out


def layer_norm_pair(x: Tensor, weight: Tensor, bias: Tensor, eps: float, next_weight: Tensor,
                    next_bias: Tensor, next_eps: float, norm_dtype: Optional[torch.dtype] = None,
                    next_dtype: Optional[torch.dtype] = None, real: Optional[int] = None,
                    offset: Optional[Tensor] = None, backend: str = 'torch'
                    ) -> tuple[Tensor, Tensor]:
    """The LayerNorm of a map, and the LayerNorm of that: a stage's door and its first layer's.

    Args:
        x: (batch, H, W, C), floating.
        weight, bias, next_weight, next_bias: (C,).
        eps, next_eps: Added to the variances.
        norm_dtype, next_dtype: Of the two results, as for :func:`layer_norm`.
        real, offset: As for :func:`layer_norm`.
        backend: 'torch' or 'triton'.

    Returns:
        Both, (batch, H, W, C).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    vectors = dict(weight=weight, bias=bias, next_weight=next_weight, next_bias=next_bias)
    if offset is not None:
        vectors['offset'] = offset
    check_tensors('layer_norm_pair', x.device,
                  **{name: (t, x.shape[-1:]) for name, t in vectors.items()})
    if check_backend_of('layer_norm_pair', backend, x.device.type):
        norm_dtype = norm_dtype or norm_dtype_of(x)
        next_dtype = next_dtype or norm_dtype_of(x.new_empty(0, dtype=norm_dtype))
        if x.dim() != 4 or 0 in x.shape or torch.float64 in (x.dtype, norm_dtype, next_dtype):
            raise ValueError('layer_norm_pair: x must be (batch, H, W, C), not empty and not '
                             f'float64, got {tuple(x.shape)} of {x.dtype}')
        check_real('layer_norm_pair', x.shape[3], real)
        return inference_triton.NORM_PAIR(x, offset, weight, bias, next_weight, next_bias, eps,
                                          next_eps, norm_dtype, next_dtype, real)
    first = layer_norm(x, weight, bias, eps, norm_dtype, real, offset=offset)
    return first, layer_norm(first, next_weight, next_bias, next_eps, next_dtype, real)


def image_squares(image: Tensor, dtype: torch.dtype, backend: str = 'torch') -> Tensor:
    """Images as maps of their squares of 2 x 2 pixels: of a convolution of stride 2 over three
    channels it makes one of stride 1 over rows of channels that suit a GPU's matrix units.

    Args:
        image: (batch, 3, H, W), in any layout.
        dtype: Of the result.
        backend: 'torch' or 'triton'.

    Returns:
        (batch, ceil(H / 2), ceil(W / 2), 16): channel ``4 * c + 2 * dy + dx`` of the square, then
        four zeros; pixels outside the image are zero.

    Raises:
        ValueError: Not images of three channels, or the backend is unknown.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError('image_squares: image must be (batch, 3, H, W) and not empty, got '
                         f'{tuple(image.shape)}')
    if check_backend_of('image_squares', backend, image.device.type):
        return inference_triton.SQUARES(image, dtype)
    height, width = image.shape[2:]
    image = F.pad(image, (0, width % 2, 0, height % 2))
    squares = image.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return F.pad(squares.flatten(3), (0, 4)).to(dtype)


def convolves_with_relu(weight: Tensor) -> bool:
    """Whether :func:`conv_relu`'s kernel is for such a weight: half precision, few channels."""
    channels, out = weight.shape[2:]
    return weight.dtype.itemsize == 2 and all(
        16 <= n <= most and not n & (n - 1) for n, most in ((channels, 64), (out, 128)))


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, before: int, backend: str = 'torch'
              ) -> Tensor:
    """Convolution that keeps H and W, and ReLU.

    Args:
        x: Map (batch, H, W, C_in).
        weight: (K, K, C_in, C_out), in x's dtype.
        bias: (C_out,).
        before: Zeros above and to the left; K - 1 - before are below and to the right.
        backend: 'torch' or 'triton', whose kernel takes what :func:`convolves_with_relu`.

    Returns:
        (batch, H, W, C_out) in x's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or not the backend.
        BackendUnavailableError: The backend asked for cannot run on this device.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError('conv_relu: x must be (batch, H, W, C) and not empty, got '
                         f'{tuple(x.shape)}')
    kernel, out = len(weight), weight.shape[-1]
    check_tensors('conv_relu', x.device, weight=(weight, (kernel, kernel, x.shape[3], out)),
                  bias=(bias, (out, )))
    if x.dtype != weight.dtype:
        raise ValueError(f'conv_relu: x must be in the dtype of the weight, {weight.dtype}, got '
                         f'{x.dtype}')
    if not 0 <= before < kernel:
        raise ValueError(f'conv_relu: before must be 0 to {kernel - 1}, got {before}')
    if check_backend_of('conv_relu', backend, x.device.type):
        if not convolves_with_relu(weight):
            raise ValueError('conv_relu: the Triton kernel takes half precision and powers of two '
                             f'of channels, not {weight.dtype} and {x.shape[3]} to {out}: use '
                             "backend='torch'")
        return inference_triton.CONV_RELU(x, weight, bias, before)
    after = kernel - 1 - before
    image = F.pad(x.permute(0, 3, 1, 2), (before, after, before, after))
    with without_autocast(x.device.type):
        y = F.conv2d(image, weight.permute(3, 2, 0, 1), bias.to(x.dtype))
    return F.relu(y).permute(0, 2, 3, 1)
