import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement, PixelData
from torch import nn

from mmgroupmamba.data_check import DataCheckHook, DataError, check_coco, classes_of, wrong_labels

MASK = [[1, 1, 9, 1, 9, 9]]


def annotation(**kwargs) -> dict:
    return {**dict(id=1, image_id=1, category_id=7, bbox=[1, 1, 8, 8], area=64, iscrowd=0,
                   segmentation=MASK), **kwargs}


@pytest.fixture
def coco(tmp_path):
    """Function that writes an annotation file of one image of 20 x 10 pixels."""

    def write(*annotations: dict, **kwargs) -> str:
        content = dict(images=[dict(id=1, width=20, height=10, file_name='1.png')],
                       categories=[dict(id=7, name='car'), dict(id=3, name='bike')],
                       annotations=list(annotations))
        path = tmp_path / 'instances.json'
        path.write_text(json.dumps({**content, **kwargs}))
        return str(path)

    return write


def test_a_good_file_has_no_notes(coco):
    path = coco(annotation(), annotation(id=2, category_id=3))
    assert check_coco(path, ('car', 'bike'), with_mask=True) == []
    assert check_coco(path, ('bike', )) == check_coco(path) == []  # a part of the categories


@pytest.mark.parametrize('kwargs, classes, words', [
    (dict(), ('car', 'van'), 'no category van: its categories are car, bike'),
    (dict(), ('bike', 'car'), r"another order.*metainfo.classes=\('car', 'bike'\)"),
    (dict(category_id=5), None, 'annotation 1 .* category_id 5, which is none .*7, 3'),
    (dict(image_id=2), None, 'image_id 2'),
    (dict(segmentation=[]), None, 'annotation 1 .* has no mask'),
    (dict(bbox=[30, 1, 8, 8]), None, 'no object that could be learnt: 1 boxes outside'),
])
def test_refused(coco, kwargs, classes, words):
    with pytest.raises(DataError, match=words):
        check_coco(coco(annotation(**kwargs)), classes, with_mask=True)


def test_passed_over(coco):
    path = coco(annotation(), annotation(id=2, bbox=[25, 1, 8, 8]),
                annotation(id=3, bbox=[-9, 1, 9, 8]), annotation(id=4, bbox=[1, 1, 0.5, 8]),
                annotation(id=5, area=0))
    assert check_coco(path, ('car', ), with_mask=True) == [
        f'{path}: 2 boxes outside their image: mmdetection leaves them out',
        f'{path}: 2 boxes below one pixel, or objects without area: mmdetection leaves them out']


def test_damaged(coco, tmp_path):
    with pytest.raises(DataError, match='has no list annotations'):
        check_coco(coco(annotations={}))
    (tmp_path / 'half.json').write_text('{"images": [')
    with pytest.raises(DataError, match='half.json is no JSON file, or damaged'):
        check_coco(str(tmp_path / 'half.json'))


class Head(nn.Module):

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes


def runner(num_classes: int, classes: tuple, images: int = 2) -> SimpleNamespace:
    model = nn.Module()
    model.rpn_head = Head(1)
    model.roi_head = nn.Module()
    model.roi_head.bbox_head = nn.ModuleList([Head(num_classes), Head(num_classes)])

    class Dataset(list):
        metainfo = dict(classes=classes)

    loader = SimpleNamespace(dataset=Dataset(range(images)))
    return SimpleNamespace(model=model, train_dataloader=loader)


def test_a_head_of_other_classes_is_named():
    DataCheckHook().before_train(runner(3, ('a', 'b', 'c')))
    DataCheckHook().before_train(runner(3, None))  # a data set that tells none
    with pytest.raises(DataError, match=r'bbox_head\.0 has 4 classes, the data set 3'):
        DataCheckHook().before_train(runner(4, ('a', 'b', 'c')))
    with pytest.raises(DataError, match='is empty'):
        DataCheckHook().before_train(runner(3, ('a', 'b', 'c'), images=0))


def test_classes_of_wrapped_data():
    inner = SimpleNamespace(metainfo=dict(classes=('a', )))
    assert classes_of(SimpleNamespace(dataset=SimpleNamespace(datasets=[inner]))) == ('a', )


def sample(**kwargs) -> BaseDataElement:
    data = BaseDataElement(metainfo=dict(img_path='1.png'))
    for key, value in kwargs.items():
        data.set_field(value, key)
    return data


def test_wrong_labels():
    assert wrong_labels(sample(gt_label=torch.tensor([2])), 3) == []
    assert wrong_labels(sample(gt_label=torch.tensor([3])), 3) == [3]
    assert wrong_labels(sample(gt_label=torch.tensor([255])), 3) == [255]
    label_map = PixelData(data=torch.tensor([[[0, 255], [2, 1]]]))
    assert wrong_labels(sample(gt_sem_seg=label_map), 3) == []
    assert wrong_labels(sample(gt_sem_seg=label_map), 2) == [2]
    assert wrong_labels(sample(gt_sem_seg=label_map), 3, ignore_index=100) == [255]
    assert wrong_labels(sample(), 3) == []


def test_a_label_outside_the_classes_is_named_with_its_file():
    hook, run = DataCheckHook(), runner(3, ('a', 'b', 'c'))
    hook.before_train(run)
    good, bad = (sample(gt_label=torch.tensor([label])) for label in (2, 5))
    hook.before_train_iter(run, 0, dict(data_samples=[good, good]))
    for samples in ([good, bad], [[bad, bad]]):
        with pytest.raises(DataError, match=r'1\.png has the label 5 outside the 3 classes'):
            hook.before_train_iter(run, 0, dict(data_samples=samples))
