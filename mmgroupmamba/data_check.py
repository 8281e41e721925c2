"""Checks of annotations that the libraries leave out or answer with a crash on the GPU.

Labels outside the classes, heads of another number of classes than the data set, and COCO files
whose categories, boxes or masks do not fit.
"""
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional

import torch.nn as nn
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper

from .registry import HOOKS

# the modules whose num_classes is that of the data set; an RPN head knows objects only
_HEADS = ('head', 'decode_head', 'auxiliary_head', 'bbox_head', 'mask_head')


class DataError(ValueError):
    """Annotations that do not fit; one line names the file and what mends it."""


def check_coco(path: str, classes: Optional[Sequence[str]] = None,
               with_mask: bool = False) -> list[str]:
    """Check a COCO annotation file before mmdetection reads it.

    Args:
        path: JSON file.
        classes: ``metainfo.classes``; None means those of the file.
        with_mask: Whether the pipeline loads masks.

    Returns:
        What mmdetection will pass over, one line each.

    Raises:
        DataError: The file is damaged, lacks a class, has the classes in another order, has
            annotations of unknown categories or images, or objects without a mask.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (ValueError, OSError) as error:
        raise DataError(f'{path} is no JSON file, or damaged: {error}') from None
    lacking = [key for key in ('images', 'annotations', 'categories')
               if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise DataError(f'{path} is no COCO instance file: it has no list {", ".join(lacking)}')

    names = {c['id']: c['name'] for c in content['categories']}
    if classes is not None:
        absent = [c for c in classes if c not in names.values()]
        if absent:
            raise DataError(
                f'{path} has no category {", ".join(absent)}: its categories are '
                f'{", ".join(names.values())}; set metainfo.classes to those wanted')
        order = [name for name in names.values() if name in classes]
        if order != list(classes):
            raise DataError(f'{path} lists the classes in another order, and labels follow the '
                            f'file: set metainfo.classes=({", ".join(map(repr, order))})')

    sizes = {i['id']: (i['width'], i['height']) for i in content['images']}
    passed_over: Counter = Counter()
    usable = 0
    for ann in content['annotations']:
        where = f'annotation {ann.get("id")} of {path}'
        if ann['category_id'] not in names:
            raise DataError(f'{where} has category_id {ann["category_id"]}, which is none of the '
                            f"file's categories ({', '.join(map(str, names))})")
        if ann['image_id'] not in sizes:
            raise DataError(f'{where} has image_id {ann["image_id"]}, which is none of its images')
        if ann.get('ignore') or classes is not None and names[ann['category_id']] not in classes:
            continue
        width, height = sizes[ann['image_id']]
        x, y, w, h = ann['bbox']
        inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        if not inside:
            passed_over['boxes outside their image'] += 1
        elif w < 1 or h < 1 or ann.get('area', 1) <= 0:
            passed_over['boxes below one pixel, or objects without area'] += 1
        elif with_mask and not ann.get('segmentation'):
            raise DataError(f'{where} has no mask, which the pipeline loads: remove it, or train '
                            'a detector without masks (with_mask=False)')
        else:
            usable += 1
    if not usable:
        reasons = ', '.join(f'{n} {what}' for what, n in passed_over.items())
        raise DataError(f'{path} has no object that could be learnt'
                        f'{f": {reasons}" if reasons else ""}')
    return [f'{path}: {n} {what}: mmdetection leaves them out'
            for what, n in passed_over.items()]


def classes_of(dataset: Any) -> Optional[tuple[str, ...]]:
    """Class names of a data set, wrapped or not."""
    inner = getattr(dataset, 'dataset', None)
    if inner is None:
        inner = (getattr(dataset, 'datasets', None) or [None])[0]
    if inner is not None:
        return classes_of(inner)
    return getattr(dataset, 'metainfo', {}).get('classes')


def head_classes(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and ``num_classes`` of each head of a model that predicts the data set's classes."""
    for name, module in model.named_modules():
        part = [p for p in name.split('.') if not p.isdigit()][-1:]
        classes = getattr(module, 'num_classes', None)
        if part and part[0] in _HEADS and isinstance(classes, int):
            yield name, classes


def wrong_labels(sample: Any, num_classes: int, ignore_index: int = 255) -> list[int]:
    """Labels of a data sample of mmpretrain or mmseg that are none of the classes.

    Args:
        sample: With ``gt_label`` (indices) or ``gt_sem_seg`` (a label map).
        num_classes: Labels are 0 to num_classes - 1.
        ignore_index: The label map's value for pixels that do not count.
    """
    if 'gt_label' in sample:
        labels, ignored = sample.gt_label, None
    elif 'gt_sem_seg' in sample:
        labels, ignored = sample.gt_sem_seg.data, ignore_index
    else:
        return []
    wrong = (labels < 0) | (labels >= num_classes)
    if ignored is not None:
        wrong &= labels != ignored
    return labels[wrong].unique().tolist() if wrong.any() else []


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Names labels outside the classes and heads that do not fit the data set.

    A head that does not fit stops training; a test on a part of the classes is only warned of.

    Raises:
        DataError: Before the first batch, or at the batch that holds such a label.
    """

    priority = 'VERY_HIGH'
    _num_classes = 0  # 0: the model has no head that we know
    _ignore_index = 255

    def _check_heads(self, runner, dataset: Any, training: bool) -> None:
        classes = classes_of(dataset)
        model = _plain_model(runner)
        heads = dict(head_classes(model))
        self._num_classes = max(heads.values(), default=0)
        self._ignore_index = getattr(getattr(model, 'decode_head', None), 'ignore_index', 255)
        if len(dataset) == 0:
            raise DataError(f'{type(dataset).__name__} is empty: no image is left of '
                            f'{getattr(dataset, "data_prefix", "its files")}; check the paths, '
                            'the suffixes and filter_cfg')
        for name, number in heads.items():
            # one class stands for a binary head, which has a background beside it
            if not classes or number in (1, len(classes)):
                continue
            line = (f'model.{name} has {number} classes, the data set {len(classes)}: set '
                    f'model.{name}.num_classes={len(classes)}, or metainfo.classes of the data set')
            if training:
                raise DataError(line)
            print_log(line, logger='current', level=logging.WARNING)

    def before_train(self, runner) -> None:
        self._check_heads(runner, runner.train_dataloader.dataset, training=True)

    def before_val(self, runner) -> None:
        self._check_heads(runner, runner.val_dataloader.dataset, training=False)

    def before_test(self, runner) -> None:
        self._check_heads(runner, runner.test_dataloader.dataset, training=False)

    def _before_iter(self, runner, batch_idx: int, data_batch: Any = None,
                     mode: str = 'train') -> None:
        """Look at the labels of a batch while they are on the CPU."""
        samples = data_batch.get('data_samples', []) if isinstance(data_batch, dict) else []
        number = self._num_classes
        for sample in samples if number and isinstance(samples, Iterable) else ():
            # with test-time augmentation a sample is a list, one a view, all of one label
            sample = sample[0] if isinstance(sample, (list, tuple)) else sample
            # a binary head of one channel knows the labels 0 and 1
            if wrong := wrong_labels(sample, max(number, 2), self._ignore_index):
                path = sample.get('seg_map_path') or sample.get('img_path')
                raise DataError(
                    f'{path} has the label{"s" if len(wrong) > 1 else ""} '
                    f'{", ".join(map(str, wrong[:5]))} outside the {number} classes '
                    f'0 to {number - 1}: mend the annotation, or set num_classes')


def _plain_model(runner) -> nn.Module:
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model

