"""Child registries of mmengine's, scope ``mmgroupmamba``.

mmengine imports ``<scope>.registry`` by itself when it meets ``type='mmgroupmamba.X'``, and a
registry imports its locations at the first look-up: no config needs custom_imports for them.
"""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

from . import check_versions

check_versions()

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmgroupmamba',
    locations=['mmgroupmamba.models', 'mmgroupmamba.models.segmentation'])
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmgroupmamba',
    locations=['mmgroupmamba.checkpoint', 'mmgroupmamba.data_check', 'mmgroupmamba.models.fuse'])
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmgroupmamba',
    locations=['mmgroupmamba.optim'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmgroupmamba',
    locations=['mmgroupmamba.optim'])
