"""Write an official GroupMamba checkpoint under this toolkit's names, tensors only.

    python tools/model_converters/official_to_mm.py groupmamba_tiny.pth tiny_classifier.pth
    python tools/model_converters/official_to_mm.py groupmamba_tiny.pth tiny.pth --for backbone

Official files load as they are, and need it nowhere. It makes a file that holds nothing but
tensors, its origin beside them; mm_to_official.py is the inverse, bit for bit.
"""
import sys

from mmgroupmamba.convert import main

if __name__ == '__main__':
    sys.exit(main('mm', __doc__))
