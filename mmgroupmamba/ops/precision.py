"""The precision of an operator's inside, whatever stands around it."""
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device_type: str) -> AbstractContextManager:
    """Context with autocast off on a device type ('cpu', 'cuda'); where it is off already there is
    nothing to enter, which takes some 40 microseconds."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype, each as it is where it has it."""
    return tuple(t if t.dtype == dtype else t.to(dtype) for t in tensors)


def linear_dtype(x: Tensor) -> torch.dtype:
    """Of a linear layer's input: autocast's, or as it is."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
