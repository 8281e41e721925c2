"""Write a checkpoint of this toolkit under the official GroupMamba names, tensors only.

    python tools/model_converters/mm_to_official.py work_dirs/NAME/epoch_300.pth official.pth
    python tools/model_converters/mm_to_official.py detector.pth official.pth --for backbone

The tensors stand under the key model, as in the authors' files. The inverse of official_to_mm.py,
bit for bit.
"""
import sys

from mmgroupmamba.convert import main

if __name__ == '__main__':
    sys.exit(main('official', __doc__))
