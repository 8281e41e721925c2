from copy import copy

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def restore_scope():
    """Leave the other tests the default scope they had."""
    before = copy(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)
