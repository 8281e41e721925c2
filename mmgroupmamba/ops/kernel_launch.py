"""Launching a Triton kernel, at less cost to the host where it was launched like this before.

Triton looks at every argument of every launch to find the compiled kernel, which takes longer than
many kernels here. What it finds depends on no more than the key below holds, so it is asked once
for each key. Triton's hooks around a launch see every launch; a kernel's own pre-run hooks, and
what is switched on later for debugging, only the first.
"""
from typing import Any, Optional, Union

import torch
from torch import Tensor

_MANY = 8192  # keys: training on images of very many sizes forgets them and asks again

_known: dict[tuple, tuple[Any, tuple]] = {}


def launch(kernel: Any, programs: int, tensors: tuple[Optional[Tensor], ...],
           numbers: tuple[Union[int, float], ...], **constants: Any) -> None:
    """``kernel[(programs,)](*tensors, *numbers, **constants)`` on the first tensor's device.

    Args:
        kernel: A ``triton.jit`` function that takes tensors first, then numbers.
        programs: How many.
        tensors: A None among them is compiled in.
        numbers: Of the same types in every launch of a kernel.
        constants: All that is ``tl.constexpr``, and options such as num_warps.
    """
    device = next(t for t in tensors if t is not None).get_device()
    key = (id(kernel), device, numbers, *constants.values(),
           *[t if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors])
    known = _known.get(key)
    with torch.cuda.device(device):
        if known is not None:
            compiled, rest = known
            compiled[programs, 1, 1](*tensors, *numbers, *rest)
            return
        compiled = kernel[programs, ](*tensors, *numbers, **constants)
    if compiled is None:  # interpreted
        return
    if len(_known) >= _MANY:
        _known.clear()
    names = kernel.arg_names[len(tensors) + len(numbers):]
    _known[key] = compiled, tuple(constants[name] for name in names)
