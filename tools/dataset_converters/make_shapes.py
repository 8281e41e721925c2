"""Draw a small labelled set of shapes for all three tasks.

Circles, squares, stars and triangles of random size, colour and pose lie over one another on
textured backgrounds. The same numbers and seed give the same files, byte for byte::

    OUT_DIR/shapes.json                                       how the set was made
    OUT_DIR/classification/{train,val}/<class>/000000.png     ImageFolder, one dominant shape
    OUT_DIR/detection/{train,val}/000000.png                  COCO instances
    OUT_DIR/detection/annotations/instances_{train,val}.json
    OUT_DIR/segmentation/images/{train,val}/000000.png        the same scenes
    OUT_DIR/segmentation/annotations/{train,val}/000000.png   0 background, 1.. the classes
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

CLASSES = ('circle', 'square', 'star', 'triangle')
MARKER = 'shapes.json'
SUPERSAMPLE = 4


class Shape(NamedTuple):
    """One drawn shape: its class, its soft edge mask and where it would be seen uncovered."""
    label: int
    alpha: np.ndarray  # (size, size) coverage in [0, 1]
    mask: np.ndarray  # (size, size) bool


def outline(label: int, angle: float) -> np.ndarray:
    """Corner points (K, 2) of a class at a unit outer radius, turned by ``angle`` radians."""
    name = CLASSES[label]
    corners = {'circle': 48, 'square': 4, 'star': 10, 'triangle': 3}[name]
    theta = angle + np.arange(corners) * (2 * np.pi / corners)
    radius = np.ones(corners)
    if name == 'star':
        radius[1::2] = 0.45
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)


def rasterise(label: int, centre: np.ndarray, radius: float, angle: float, size: int) -> Shape:
    """Draw one shape at ``centre`` (x, y), all lengths in pixels."""
    points = (centre + radius * outline(label, angle)) * SUPERSAMPLE
    canvas = Image.new('L', (size * SUPERSAMPLE, size * SUPERSAMPLE))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points.tolist()], fill=255)
    alpha = cv2.resize(np.asarray(canvas), (size, size), interpolation=cv2.INTER_AREA)
    alpha = alpha.astype(np.float32) / 255
    return Shape(label, alpha, alpha >= 0.5)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A textured RGB background (size, size, 3), float in [0, 255]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    image = rng.uniform(30, 130, 3) + along[..., None] * rng.uniform(-40, 40, 3)
    waves = np.sin(2 * np.pi * rng.uniform(3, 12) * along + rng.uniform(0, 2 * np.pi))
    image += waves[..., None] * rng.uniform(-12, 12, 3)
    for cells, strength in ((5, 22), (17, 12)):
        noise = rng.normal(0, 0.5, (cells, cells, 3)) + rng.normal(0, 0.8, (cells, cells, 1))
        noise = (strength * noise).astype(np.float32)
        image += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 6, (size, size, 3)), 0, 255)


def bright_colour(rng: np.random.Generator) -> np.ndarray:
    """An RGB colour (3,) in [0, 255] with one strong channel, lighter than the backgrounds."""
    colour = rng.uniform(20, 255, 3)
    colour[rng.integers(3)] = rng.uniform(215, 255)
    return colour * max(1., 150 / colour.mean())


def paint(image: np.ndarray, shape: Shape, rng: np.random.Generator) -> None:
    """Paint a shape over ``image`` in a bright colour that stands out from what it covers."""
    size = len(image)
    covered = image[shape.mask].mean(axis=0)
    colour = bright_colour(rng)
    while np.abs(colour - covered).sum() < 120:
        colour = bright_colour(rng)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    shade = 60 * (x * np.cos(angle) + y * np.sin(angle))[..., None]  # (size, size, 1)
    shade += rng.normal(0, 5, (size, size, 1)) - shade[shape.mask].mean()
    fill = np.clip(colour + shade, 0, 255)
    alpha = shape.alpha[..., None]
    image += alpha * (fill - image)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[Shape]]:
    """Two to five shapes, later ones above earlier ones; each keeps 60 % of its area in sight."""
    image = background(rng, size)
    shapes, places = [], []
    wanted = int(rng.integers(2, 6))
    for _ in range(40):
        radius = size * rng.uniform(0.11, 0.23)
        if places and rng.random() < 0.5:  # lean on another shape
            other, other_radius = places[rng.integers(len(places))]
            angle = rng.uniform(0, 2 * np.pi)
            reach = (radius + other_radius) * rng.uniform(0.6, 1.0)
            centre = other + reach * np.array([np.cos(angle), np.sin(angle)])
        else:
            centre = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)
        if centre.min() < 0.8 * radius or centre.max() > size - 0.8 * radius:
            continue
        shape = rasterise(int(rng.integers(len(CLASSES))), centre, radius,
                          rng.uniform(0, 2 * np.pi), size)
        visible = visible_masks([*shapes, shape])
        if all(v.sum() >= 0.6 * s.mask.sum() for v, s in zip(visible, [*shapes, shape])):
            paint(image, shape, rng)
            shapes.append(shape)
            places.append((centre, radius))
        if len(shapes) == wanted:
            break
    return image, shapes


def draw_dominant(rng: np.random.Generator, size: int, label: int) -> np.ndarray:
    """One large shape of class ``label``, over up to two small ones of any class."""
    image = background(rng, size)
    for _ in range(rng.integers(3)):
        radius = size * rng.uniform(0.06, 0.1)
        paint(image, rasterise(int(rng.integers(len(CLASSES))),
                               rng.uniform(radius, size - radius, 2), radius,
                               rng.uniform(0, 2 * np.pi), size), rng)
    radius = size * rng.uniform(0.22, 0.4)
    centre = rng.uniform(0.9 * radius, size - 0.9 * radius, 2)
    paint(image, rasterise(label, centre, radius, rng.uniform(0, 2 * np.pi), size), rng)
    return image


def visible_masks(shapes: list[Shape]) -> list[np.ndarray]:
    """The part of each shape that no later one covers."""
    covered = np.zeros_like(shapes[0].mask)
    visible = []
    for shape in reversed(shapes):
        visible.append(shape.mask & ~covered)
        covered |= shape.mask
    return visible[::-1]


def to_rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of a mask: columns first, zeros first."""
    flat = mask.flatten(order='F')
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return dict(size=list(mask.shape), counts=[0, *counts] if flat[0] else counts)


def to_annotation(mask: np.ndarray, label: int, image_id: int, ann_id: int) -> dict:
    """The COCO record of one visible mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return dict(id=ann_id, image_id=image_id, category_id=label + 1, iscrowd=0,
                area=int(mask.sum()), bbox=[int(v) for v in box], segmentation=to_rle(mask))


def save_png(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(path, compress_level=1)


def write_split(root: Path, split: str, number: int, size: int, seed: int) -> None:
    """Write ``number`` scenes and as many classification images of one split below ``root``."""
    images, annotations = [], []
    for index in range(number):
        key = [seed, ('train', 'val').index(split), index]  # independent of the split sizes
        label = index % len(CLASSES)
        save_png(draw_dominant(np.random.default_rng([*key, 0]), size, label),
                 root / 'classification' / split / CLASSES[label] / f'{index:06d}.png')

        image, shapes = draw_scene(np.random.default_rng([*key, 1]), size)
        name = f'{index:06d}.png'
        save_png(image, root / 'detection' / split / name)
        save_png(image, root / 'segmentation/images' / split / name)
        label_map = np.zeros((size, size), np.uint8)
        images.append(dict(id=index, file_name=name, width=size, height=size))
        for shape, mask in zip(shapes, visible_masks(shapes)):
            label_map[mask] = shape.label + 1
            annotations.append(to_annotation(mask, shape.label, index, len(annotations) + 1))
        save_png(label_map, root / 'segmentation/annotations' / split / name)

    path = root / 'detection/annotations' / f'instances_{split}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [dict(id=i, name=name, supercategory='shape')
                  for i, name in enumerate(CLASSES, 1)]
    path.write_text(json.dumps(dict(images=images, annotations=annotations,
                                    categories=categories)))


def make_shapes(out_dir: str | Path, num_train: int = 600, num_val: int = 150, size: int = 128,
                seed: int = 0, overwrite: bool = False) -> Path:
    """Write the set to ``out_dir``, whole or not at all, and return its path.

    Raises:
        ValueError: a number is out of range.
        FileExistsError: ``out_dir`` is taken and may not be replaced.
    """
    for name, value, low, high in (('num-train', num_train, len(CLASSES), 100_000),
                                   ('num-val', num_val, len(CLASSES), 100_000),
                                   ('size', size, 32, 2048), ('seed', seed, 0, 2**32 - 1)):
        if not low <= value <= high:
            raise ValueError(f'--{name} {value} is out of range: give a number from {low} to '
                             f'{high}')
    out_dir = Path(out_dir).resolve()
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f'{out_dir} is a file; give another --out-dir')
    if out_dir.is_dir() and any(out_dir.iterdir()):
        if not overwrite:
            raise FileExistsError(f'{out_dir} is not empty; give another --out-dir or --overwrite')
        if not (out_dir / MARKER).is_file():
            raise FileExistsError(f'{out_dir} holds files that this script did not write (no '
                                  f'{MARKER}) and is left alone; give another --out-dir')

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.shapes-', dir=out_dir.parent) as temp:
        new, old = Path(temp, 'new'), Path(temp, 'old')
        new.mkdir()
        write_split(new, 'train', num_train, size, seed)
        write_split(new, 'val', num_val, size, seed)
        made_by = dict(classes=CLASSES, num_train=num_train, num_val=num_val, size=size, seed=seed)
        (new / MARKER).write_text(json.dumps(made_by) + '\n')
        if out_dir.exists():
            os.rename(out_dir, old)
        os.rename(new, out_dir)
        shutil.rmtree(old, ignore_errors=True)
    return out_dir


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Draw a small set of shapes for classification, detection and segmentation.')
    parser.add_argument('--out-dir', default='data/shapes')
    parser.add_argument('--num-train', type=int, default=600, help='images of each task')
    parser.add_argument('--num-val', type=int, default=150, help='images of each task')
    parser.add_argument('--size', type=int, default=128, help='side of the images in pixels')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--overwrite', action='store_true',
                        help='replace a set that this script wrote before')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        out_dir = make_shapes(**vars(args))
    except (ValueError, OSError) as error:
        sys.exit(f'make_shapes: {error}')
    print(f'{args.num_train} + {args.num_val} images for each of the three tasks in {out_dir}')


if __name__ == '__main__':
    main()
