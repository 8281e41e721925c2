"""Launching a Triton kernel, at less cost to the host where it was launched like this before.

Triton looks at every argument of every launch to find the compiled kernel, which takes longer than
many kernels here. What it finds depends on no more than the key below holds, so it is asked once
for each key. Triton's hooks around a launch see every launch; a kernel's own pre-run hooks, and
what is switched on later for debugging, only the first.
"""
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

_MANY = 8192  # keys: training on images of very many sizes forgets them and asks again
_TRITON = '3.6.'  # whose compiled kernels are entered past their door; others go through it


class _Known(NamedTuple):
    compiled: Any  # Triton's kernel
    constants: tuple  # the last of its arguments
    triton: Any  # the module, where its version is known inside


_known: dict[tuple, _Known] = {}


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
    with _on(device):
        if known is not None:
            _enter(known, programs, device, (*tensors, *numbers, *known.constants))
            return
        compiled = kernel[programs, ](*tensors, *numbers, **constants)
    if compiled is None:  # interpreted
        return
    if len(_known) >= _MANY:
        _known.clear()
    names = kernel.arg_names[len(tensors) + len(numbers):]
    triton = import_module('triton')
    _known[key] = _Known(compiled, tuple(constants[name] for name in names),
                         triton if triton.__version__.startswith(_TRITON) else None)


def _on(device: int) -> AbstractContextManager:
    """Context with a GPU as the current one, or nothing to enter where it is."""
    if device < 0 or device == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _enter(known: _Known, programs: int, device: int, arguments: tuple) -> None:
    """``compiled[programs, 1, 1](*arguments)``; without the preparations for hooks where there are
    none."""
    compiled, _, triton = known
    if triton is not None:
        hooks = triton.knobs.runtime
        # a chain of hooks, or what somebody put in its place
        if not any(getattr(hook, 'calls', hook) for hook in (hooks.launch_enter_hook,
                                                             hooks.launch_exit_hook)):
            stream = triton.runtime.driver.active.get_current_stream(device)
            compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata,
                         None, None, None, *arguments)
            return
    compiled[programs, 1, 1](*arguments)
