"""GroupMamba, a grouped visual state-space backbone, for mmpretrain, mmdet and mmseg.

Importing this package changes nothing and imports no library: mmengine finds the models through
``type='mmgroupmamba.X'`` in a config, and :mod:`mmgroupmamba.registry` checks the versions.
"""
__version__ = '0.1.0'

__all__ = ['__version__', 'check_versions']


def check_versions() -> None:
    """Check that the installed mmengine and mmcv are within the supported ranges.

    A library that is not installed passes: the scans work without mmengine, and mmengine's own
    ImportError names what is missing.

    Raises:
        RuntimeError: One line that names the library, its range and the command that mends it.
            No ImportError: mmengine passes over those when it looks for a scope.
    """
    from .doctor import installed_versions, out_of_range

    problems = out_of_range(installed_versions(), libraries=('mmengine', 'mmcv'))
    if problems:
        raise RuntimeError('; '.join(problems))
