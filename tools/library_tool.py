"""Run a tool that mmpretrain, mmdet or mmseg ships, with this package's models and checkpoints.

    python tools/library_tool.py mmpretrain                    # lists the library's tools
    python tools/library_tool.py mmpretrain analysis_tools/analyze_logs plot_curve LOG.json ...

The tool is the library's own, and so are its options (--help lists them). What differs:
checkpoints are read as data (weights only), and where the model has a GroupMamba, official files
are translated and every key must match.
"""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import difflib
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

import mmengine.runner
import torch
from torch import nn

from mmgroupmamba.checkpoint import load_model, use_safe_reader
from mmgroupmamba.launch import TASKS, LaunchError, run_tool
from mmgroupmamba.registry import MODELS


def tools_of(library: str) -> tuple[Path, list[str]]:
    """Folder of a library's tools, and their names such as 'analysis_tools/get_flops'.

    Raises:
        LaunchError: The library is not installed, or came without its tools.
    """
    spec = importlib.util.find_spec(library)
    if spec is None:
        raise LaunchError(f'{library} is not installed: python -m mmgroupmamba.doctor names the '
                          'command')
    folder = Path(spec.origin).parent / '.mim/tools'
    if not folder.is_dir():  # an editable installation
        folder = Path(spec.origin).parents[1] / 'tools'
    names = sorted(p.relative_to(folder).with_suffix('').as_posix() for p in folder.rglob('*.py'))
    if not names:
        raise LaunchError(f'{library} is installed without its tools: reinstall it')
    return folder, names


def find_tool(library: str, name: str) -> tuple[Path, str]:
    """A tool's file and full name; suffix and folder may be left out where one tool is meant.

    Raises:
        LaunchError: There is none, or there are several.
    """
    folder, names = tools_of(library)
    wanted = name.removesuffix('.py').removeprefix('tools/')
    found = [n for n in names if n == wanted] or [n for n in names if n.endswith(f'/{wanted}')]
    if len(found) == 1:
        return folder / f'{found[0]}.py', found[0]
    close = found or difflib.get_close_matches(wanted, names, 3, cutoff=0.4)
    hint = f'did you mean {" or ".join(close)}? ' if close else ''
    raise LaunchError(f'{library} has {"several" if found else "no"} {wanted}: {hint}'
                      f'python tools/library_tool.py {library} lists its tools')


def with_a_style_that_exists(args: list[str]) -> list[str]:
    """The default of mmdet's --style, 'dark', was seaborn's; matplotlib has none of that name."""
    if args[:1] == ['plot_curve'] and not any(arg.startswith('--style') for arg in args):
        return [*args, '--style', 'default']
    return args


def with_what_benchmark_needs(args: list[str]) -> list[str]:
    """mmdet's benchmark ends in tracebacks without psutil, and without a GPU for inference."""
    if importlib.util.find_spec('psutil') is None:
        raise LaunchError('mmdet benchmark needs psutil, which is not installed: '
                          'pip install psutil')
    if 'inference' in ' '.join(args) and not torch.cuda.is_available():
        raise LaunchError('mmdet benchmark --task inference runs on CUDA GPUs only; --task dataset '
                          'and --task dataloader run anywhere')
    return args


def with_the_configs_classes(args: list[str]) -> list[str]:
    """mmseg's confusion matrix asks the dataset's class for its classes; a config may name them."""
    from mmseg.datasets import BaseSegDataset
    init = BaseSegDataset.__init__

    def init_with_metainfo(self: BaseSegDataset, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.METAINFO = self.metainfo

    BaseSegDataset.__init__ = init_with_metainfo
    return args


def with_todays_matplotlib(args: list[str]) -> list[str]:
    """mmpretrain's browse_dataset calls a private function that takes a renderer since 3.6."""
    from matplotlib import _tight_bbox
    adjust = _tight_bbox.adjust_bbox

    def adjust_bbox(figure: Any, box: Any, renderer: Any = None, **kwargs: Any) -> Any:
        return adjust(figure, box, renderer or figure.canvas.get_renderer(), **kwargs)

    _tight_bbox.adjust_bbox = adjust_bbox
    return args


# tools that cannot run as they are: each function takes the tool's arguments and returns them
MENDS: dict[str, Callable[[list[str]], list[str]]] = {
    'mmdet/analysis_tools/analyze_logs': with_a_style_that_exists,
    'mmdet/analysis_tools/benchmark': with_what_benchmark_needs,
    'mmpretrain/visualization/browse_dataset': with_todays_matplotlib,
    'mmseg/analysis_tools/confusion_matrix': with_the_configs_classes,
}


def has_groupmamba(model: nn.Module) -> bool:
    return isinstance(getattr(model, 'backbone', None), MODELS.get('GroupMamba'))


def install_reader() -> None:
    """Put this package's checkpoint reading in force for the process."""
    use_safe_reader()
    library_load = mmengine.runner.load_checkpoint

    def load_checkpoint(model: nn.Module, filename: str, *args: Any, **kwargs: Any) -> dict:
        if has_groupmamba(model):
            return load_model(model, filename)
        return library_load(model, filename, *args, **kwargs)

    mmengine.runner.load_checkpoint = load_checkpoint


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('library', help=', '.join(TASKS))
    parser.add_argument('tool', nargs='?', help='without one, the tools are listed')
    parser.add_argument('args', nargs=argparse.REMAINDER, help="the tool's own")
    return parser.parse_args(argv)


def library_tool(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    if args.library not in TASKS:
        raise LaunchError(f'no library {args.library}: choose one of {", ".join(TASKS)}')
    if args.tool is None:
        print('\n'.join(tools_of(args.library)[1]))
        return
    path, name = find_tool(args.library, args.tool)
    mend = MENDS.get(f'{args.library}/{name}', list)
    sys.argv = [str(path), *mend(args.args)]
    install_reader()
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name='__main__')
    except ModuleNotFoundError as error:
        raise LaunchError(f'{args.library} {args.tool} needs {error.name}, which is not '
                          f'installed: pip install {error.name}') from error


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(library_tool, argv)


if __name__ == '__main__':
    sys.exit(main())
