"""Draw one task's grid of inputs, ground truth and predictions for the shapes demo::

    shapes_pictures.py CONFIG PREDICTIONS.pkl PICTURE.png TITLE [KEY=VALUE of the config ...]
"""
import sys

import cv2
import matplotlib.pyplot as plt
import mmengine
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.visualization import Visualizer

COLUMNS = 6
SIDE = 384  # of a tile, in pixels
SCORE_THRESHOLD = 0.5
COLOURS = [(255, 99, 88), (77, 160, 255), (255, 209, 71), (88, 214, 141)]
RIGHT, WRONG = (46, 160, 67), (218, 54, 51)


class Tile:
    """One image enlarged to SIDE x SIDE, for labels and outlines of legible size.

    Args:
        image: (H, W, 3) RGB.
        side: Of the image that boxes refer to, in pixels.
    """

    def __init__(self, image: np.ndarray, side: int) -> None:
        self.scale = SIDE / side
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        self.visualizer = Visualizer(image=image)

    def text(self, text: str, x: float, y: float, colour: tuple, size: int = 13) -> None:
        self.visualizer.draw_texts(
            text, np.array([x, y]), colors='white', font_sizes=size, vertical_alignments='bottom',
            bboxes=dict(facecolor=[c / 255 for c in colour], edgecolor='none', pad=1.5))

    def mask(self, mask: np.ndarray, colour: tuple) -> None:
        """Fill and outline a (H, W) bool mask."""
        mask = cv2.resize(mask.astype(np.float32), (SIDE, SIDE)) >= 0.5
        contours, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        self.visualizer.draw_binary_masks(mask, colors=colour, alphas=0.7)
        polygons = [c.reshape(-1, 2) for c in contours if len(c) > 2]
        if polygons:
            self.visualizer.draw_polygons(polygons, edge_colors='white', line_widths=1.5)

    def box(self, box: np.ndarray, colour: tuple, text: str) -> None:
        """Draw a (4,) box x1, y1, x2, y2 in image pixels with its label above it."""
        box = np.asarray(box, np.float32) * self.scale
        self.visualizer.draw_bboxes(box.clip(2, SIDE - 3), edge_colors=colour, line_widths=2.5)
        self.text(text, box[0].clip(6, SIDE - 110), max(box[1] - 4, 26), colour)

    def done(self) -> np.ndarray:
        return self.visualizer.get_image()


def draw_classification(tile: Tile, sample: dict, classes: tuple, truth: bool, right: int) -> None:
    if truth:
        tile.text(classes[right], 14, 50, (60, 60, 70), 22)
        return
    label = int(sample['pred_label'])
    score = float(sample['pred_score'][label])
    tile.text(f'{classes[label]} {score:.0%}', 14, 50, RIGHT if label == right else WRONG, 22)


def draw_detection(tile: Tile, instances: dict, classes: tuple) -> None:
    scores = instances.get('scores')
    for i, label in enumerate(instances['labels'].tolist()):
        if scores is not None and scores[i] < SCORE_THRESHOLD:
            continue
        tile.mask(instances['masks'][i], COLOURS[label])
    for i, label in enumerate(instances['labels'].tolist()):
        if scores is not None and scores[i] < SCORE_THRESHOLD:
            continue
        score = '' if scores is None else f' {float(scores[i]):.2f}'
        tile.box(instances['bboxes'][i], COLOURS[label], classes[label] + score)


def draw_segmentation(tile: Tile, labels: np.ndarray, classes: tuple) -> None:
    for label in range(1, len(classes)):
        if (labels == label).any():
            tile.mask(labels == label, COLOURS[label - 1])


def tiles_of(scope: str, item: dict, prediction: dict, classes: tuple) -> list[np.ndarray]:
    """Input, truth and prediction of one image as RGB tiles (SIDE, SIDE, 3)."""
    image = np.ascontiguousarray(item['inputs'].flip(0).permute(1, 2, 0).numpy())
    sample = item['data_samples']
    under = image
    if scope != 'mmpretrain':  # the class colours show true over grey
        under = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    tiles = [Tile(picture, sample.ori_shape[0]) for picture in (image, under, under)]
    if scope == 'mmpretrain':
        right = int(sample.gt_label)
        draw_classification(tiles[1], prediction, classes, True, right)
        draw_classification(tiles[2], prediction, classes, False, right)
    elif scope == 'mmdet':
        from pycocotools import mask as coco_mask
        truth = sample.gt_instances
        draw_detection(tiles[1], dict(labels=truth.labels, bboxes=truth.bboxes.tensor.numpy(),
                                      masks=truth.masks.to_ndarray()), classes)
        found = prediction['pred_instances']
        masks = [coco_mask.decode(rle).astype(bool) for rle in found['masks']]
        draw_detection(tiles[2], dict(labels=found['labels'], bboxes=found['bboxes'].numpy(),
                                      masks=masks, scores=found['scores']), classes)
    else:
        draw_segmentation(tiles[1], sample.gt_sem_seg.data.squeeze(0).numpy(), classes)
        draw_segmentation(tiles[2], prediction['pred_sem_seg'].numpy(), classes)
    return [tile.done() for tile in tiles]


def draw_grid(config: str, predictions: str, path: str, title: str, options: dict) -> None:
    """Write one task's grid: COLUMNS held-out images wide; input, truth, prediction high.

    Args:
        config: The task's config file.
        predictions: What ``tools/test.py --out`` wrote for it.
        path: The PNG file.
        title: Line above the grid.
        options: Overrides of the config, as given to tools/test.py.
    """
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    results = mmengine.load(predictions)
    classes = dataset.metainfo['classes']

    chosen = np.linspace(0, len(dataset) - 1, min(COLUMNS, len(dataset))).astype(int)
    columns = [tiles_of(cfg.default_scope, dataset[i], results[i], classes) for i in chosen]
    plt.close('all')  # the visualizers' own figures

    figure, axes = plt.subplots(3, len(columns), figsize=(2.3 * len(columns) + 0.5, 7.6),
                                squeeze=False)
    for row, name in enumerate(('input', 'ground truth', 'prediction')):
        for axis, tiles in zip(axes[row], columns):
            axis.imshow(tiles[row])
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[row][0].set_ylabel(name, fontsize=15, labelpad=8)
    figure.suptitle(title, fontsize=17, y=0.985)
    if cfg.default_scope == 'mmseg':
        handles = [plt.Rectangle((0, 0), 1, 1, color=np.array(c) / 255) for c in COLOURS]
        figure.legend(handles, classes[1:], loc='lower center', ncols=4, fontsize=13,
                      frameon=False)
    figure.subplots_adjust(left=0.035, right=0.995, top=0.93,
                           bottom=0.05 if cfg.default_scope == 'mmseg' else 0.01,
                           wspace=0.03, hspace=0.03)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    plt.switch_backend('Agg')
    draw_grid(*sys.argv[1:5], dict(pair.split('=', 1) for pair in sys.argv[5:]))
