"""What tools/model_converters share: whole checkpoints from one layout to the other, strictly.

Every tensor of the source is accounted for and every one of the target is written, or all the
culprits are named. What is written holds tensors, numbers and strings only.
"""
import argparse
import hashlib
import os
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from . import __version__
from .checkpoint import (
    CheckpointError,
    arch_of,
    extract_state_dict,
    from_official,
    infer_arch,
    is_official,
    read_checkpoint,
    to_official,
)
from .launch import run_tool

TARGETS = ('classifier', 'backbone')
_HEADS = ('post_network.', 'head.', 'dist_head.')


def official_to_mm(official: dict[str, Tensor], target: str, path: str) -> dict[str, Tensor]:
    """Our tensors of an official state dict.

    Args:
        official: State dict in the official layout.
        target: 'classifier', or 'backbone', which sets the class block and the heads aside.
        path: The file's name, for the error.

    Returns:
        Names and tensors of an mmpretrain classifier, or of a backbone alone (for ``init_cfg``).

    Raises:
        CheckpointError: Not in the official layout, or keys are missing, unknown or of another
            shape; all of them are named.
    """
    if not is_official(official):
        known = any('stages.0.embed.' in k for k in official)
        raise CheckpointError(f'{path} is not in the official layout: it starts with '
                              f'{", ".join(list(official)[:3])}'
                              f'{" (these are our names already)" if known else ""}')
    arch = infer_arch(official)
    if arch is None:
        raise CheckpointError(f'{path} is incomplete: the first block or the stem of a stage is '
                              'missing')
    hidden = official.get('post_network.0.mlp.fc1.weight')
    head = official.get('head.weight')
    wanted = template(arch, target, 'dist_head.weight' in official,
                      None if hidden is None else len(hidden), None if head is None else len(head))
    # what the wanted tensors stand for; whatever else the file holds has no place
    covered = to_official(wanted)
    aside = _HEADS if target == 'backbone' else ()
    unknown = [k for k in official if k not in covered and not k.startswith(aside)]
    _check(covered, official, unknown, f'{path} is no complete GroupMamba {target}')
    ours = from_official(official, wanted)
    if target == 'backbone':
        return ours
    return {k if k.startswith(('neck.', 'head.')) else f'backbone.{k}': v for k, v in ours.items()}


def mm_to_official(state: dict[str, Tensor], target: str, path: str) -> dict[str, Tensor]:
    """Official tensors of a checkpoint of ours, the inverse of :func:`official_to_mm`.

    Args:
        state: State dict of a classifier, or of any model or none around a GroupMamba backbone.
        target: 'classifier', or 'backbone', which sets all but the backbone aside.
        path: The file's name, for the error.

    Raises:
        CheckpointError: As :func:`official_to_mm`.
    """
    if is_official(state):
        raise CheckpointError(f'{path} is in the official layout already')
    prefix = 'backbone.' if any(k.startswith('backbone.') for k in state) else ''
    backbone = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    arch = infer_arch(backbone)
    if arch is None:
        raise CheckpointError(f'{path} holds no GroupMamba of four stages: it starts with '
                              f'{", ".join(list(state)[:3])}')
    rest = {k: v for k, v in state.items() if prefix and not k.startswith(prefix)}
    if target == 'backbone':
        # a classifier keeps the last norm in its neck
        norm = {k.replace('neck.norm.', 'stages.3.norm.'): v for k, v in rest.items()
                if k.startswith('neck.norm.')}
        rest = {}
        backbone = {**norm, **backbone}
    own = {**backbone, **rest}
    hidden, head = own.get('neck.ffn.fc1.weight'), own.get('head.fc.weight')
    wanted = template(arch, target, 'head.dist_fc.weight' in own,
                      None if hidden is None else len(hidden), None if head is None else len(head))
    unknown = [k for k in own if k not in wanted]
    _check(wanted, own, unknown, f'{path} is no complete GroupMamba {target}')
    return to_official(own)


def template(arch: dict, target: str, two_heads: bool, hidden_channels: Optional[int] = None,
             num_classes: Optional[int] = None) -> dict[str, Tensor]:
    """State dict on the meta device of a classifier (no ``backbone.`` prefix) or a backbone.

    Args:
        arch: A row of the arch table.
        target: 'classifier' or 'backbone'.
        two_heads: Whether the classifier has the distillation head.
        hidden_channels: Of the class block's MLP; None means the paper's four times C.
        num_classes: Of the heads; None means ImageNet's 1000.
    """
    from .models import GroupMamba
    with torch.device('meta'):
        state = GroupMamba(arch, final_norm=target == 'backbone').state_dict()
        if target == 'backbone':
            return state
        from .models.classification import ClassBlockNeck, DistilledLinearHead, LinearClsHead
        channels = arch['embed_dims'][3]
        ratio = (hidden_channels or 4 * channels) / channels
        head = (DistilledLinearHead if two_heads else LinearClsHead)(num_classes or 1000, channels)
        parts = dict(neck=ClassBlockNeck(channels, ratio), head=head)
    for prefix, part in parts.items():
        state.update({f'{prefix}.{k}': v for k, v in part.state_dict().items()})
    return state


def _check(wanted: dict[str, Tensor], found: dict[str, Tensor], unknown: list[str],
           what: str) -> None:
    missing = [k for k in wanted if k not in found]
    reshaped = [
        f'{k} (file {tuple(found[k].shape)}, expected {tuple(v.shape)})'
        for k, v in wanted.items() if k in found and found[k].shape != v.shape
    ]
    parts = [f'{len(keys)} {kind}: {", ".join(keys)}' for kind, keys in
             (('missing', missing), ('unknown', unknown), ('of another shape', reshaped)) if keys]
    if parts:
        raise CheckpointError(f'{what}: {"; ".join(parts)}')


def main(to: str, description: str, argv: Optional[list[str]] = None) -> int:
    """The tools' main: arguments, :func:`convert_file`, one line; returns the exit code."""

    def convert(argv: Optional[list[str]]) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument('src', metavar='SRC', help='checkpoint to convert')
        parser.add_argument('dst', metavar='DST', help='file to write')
        parser.add_argument(
            '--for', dest='target', choices=TARGETS, default='classifier',
            help='classifier: backbone, class block and heads (default); backbone: it alone')
        parser.add_argument('--overwrite', action='store_true', help='replace DST')
        args = parser.parse_args(argv)
        print(convert_file(args.src, args.dst, to, args.target, args.overwrite))

    return run_tool(convert, argv)


def convert_file(src: str, dst: str, to: str, target: str, overwrite: bool = False) -> str:
    """Convert a file; the whole of a tool.

    Args:
        src: File to read, weights only.
        dst: File to write.
        to: 'mm' or 'official'.
        target: 'classifier' or 'backbone'.
        overwrite: Replace `dst`.

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: `src` does not convert, or `dst` is in the way.
    """
    target_file = Path(dst)
    if target_file.exists() and (target_file.is_dir() or not overwrite):
        raise CheckpointError(f'{dst} exists: name another file'
                              f'{"" if target_file.is_dir() else ", or say --overwrite"}')
    if not target_file.absolute().parent.is_dir():
        raise CheckpointError(f'{dst}: there is no folder {target_file.parent}')
    checkpoint = read_checkpoint(src)
    state = extract_state_dict(checkpoint, src)
    if to == 'mm':
        converted = official_to_mm(state, target, src)
        variant = arch_of(state)
        output = dict(state_dict=converted)
    else:
        converted = mm_to_official(state, target, src)
        variant = arch_of(converted)
        output = dict(model=converted)
    source = Path(src).expanduser()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    output['meta'] = dict(
        source=source.name, source_sha256=digest, variant=variant or 'custom', content=target,
        mmgroupmamba_version=__version__)
    # all or nothing: a half-written checkpoint never stands under its name
    part = target_file.with_name(target_file.name + '.part')
    try:
        torch.save(output, part)
        os.replace(part, target_file)
    finally:
        part.unlink(missing_ok=True)
    return (f'{dst}: {len(converted)} tensors of a {target}, variant {variant or "custom"}, '
            f'made of {len(state)} in {src}')
