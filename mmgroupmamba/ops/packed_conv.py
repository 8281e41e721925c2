"""Convolutions with weights laid out once for oneDNN, for inference on a CPU.

PyTorch's own convolution lays its weight out anew in every call, which takes up to a quarter of the
time of a small map, and its activation passes over the result once more. The operators here are
the private ones that Inductor freezes models with (``torch/_inductor/fx_passes/mkldnn_fusion.py``
in PyTorch); :func:`packs` says where they serve.
"""
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import infers_on_cpu

# oneDNN's names; its ReLU makes 0 of NaN
ACTIVATIONS = {'none': 'none', 'silu': 'swish', 'gelu': 'gelu'}


def packs(x: Tensor, *weights: Tensor) -> bool:
    """Whether :class:`PackedConvs` serve: float32, eager inference on a CPU, PyTorch with oneDNN
    (on, and with the private operators), and weights that know when they are changed."""
    return (x.dtype == torch.float32 and infers_on_cpu(x)
            and all(weight.dtype == torch.float32 and weight.device.type == 'cpu'
                    and not weight.is_inference() for weight in weights)
            and torch.backends.mkldnn.enabled and available())


@lru_cache(maxsize=None)
def available() -> bool:
    """Whether this PyTorch has the operators, and they give what its convolution does."""
    if not torch.backends.mkldnn.is_available():
        return False
    options = dict(generator=torch.Generator().manual_seed(0), dtype=torch.float32, device='cpu')
    x = torch.randn(1, 8, 5, 6, **options).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(8, 2, 3, 3, **options), torch.randn(8, **options)
    plain = F.conv2d(x, weight, bias, stride=2, padding=1, groups=4)
    activations = dict(none=plain, silu=F.silu(plain), gelu=F.gelu(plain))
    try:
        with torch.no_grad():
            for name, want in activations.items():
                got = PackedConvs().conv(name, x, weight, bias, 2, 1, 4, name)
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    except (AttributeError, RuntimeError, AssertionError):
        return False
    return True


class _Packed(NamedTuple):
    packed: Tensor
    weight: Tensor  # its memory, kept so that it becomes no other's
    state: tuple


class PackedConvs:
    """The convolutions of a module, each by its name; a weight is laid out when it is first used,
    and again after it was changed or replaced, which is not seen of what is written through its
    ``.data``. What is laid out is neither copied nor saved."""

    def __init__(self) -> None:
        self._packed: dict[Hashable, _Packed] = {}

    def __getstate__(self) -> dict[str, Any]:
        return dict(_packed={})

    def conv(self, name: Hashable, x: Tensor, weight: Tensor, bias: Optional[Tensor],
             stride: int = 1, padding: int = 0, groups: int = 1, activation: str = 'none'
             ) -> Tensor:
        """Convolution and activation where :func:`packs` says so.

        Args:
            name: Of the convolution, which keeps its stride, padding and groups.
            x: (batch, C, H, W), channels last in memory.
            weight: (C', C / groups, k, k).
            bias: (C',) or None.
            stride, padding, groups: As of F.conv2d.
            activation: 'none', 'silu' or 'gelu' (the exact one).

        Returns:
            (batch, C', H', W'), channels last in memory.

        Raises:
            ValueError: The activation is unknown.
            RuntimeError: Shapes do not fit together.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f'packed convolution: unknown activation {activation!r}: choose one '
                             f'of {", ".join(ACTIVATIONS)}')
        sides = [padding, padding], [stride, stride], [1, 1], groups
        state = weight.data_ptr(), weight.shape, weight.stride(), weight._version
        known = self._packed.get(name)
        if known is None or known.state != state:
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(memory_format=torch.channels_last), *sides, list(x.shape))
            known = self._packed[name] = _Packed(packed, weight.detach(), state)
        algorithm = 'none' if activation == 'gelu' else ''
        return torch.ops.mkldnn._convolution_pointwise(
            x, known.packed, bias, *sides, ACTIVATIONS[activation], [], algorithm)
