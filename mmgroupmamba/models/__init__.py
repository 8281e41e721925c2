"""Backbone for any task. The ImageNet parts are in ``classification``, which alone needs
mmpretrain and is imported by the classification configs through ``custom_imports``."""
from .fuse import fuse
from .groupmamba import GroupMamba

__all__ = ['GroupMamba', 'fuse']
