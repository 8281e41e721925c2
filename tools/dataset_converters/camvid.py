"""Write CamVid in SegNet's eleven classes for mmseg, and its road users for mmdet.

    python tools/dataset_converters/camvid.py DOWNLOADED --out-dir data/camvid

takes either of the published layouts::

    701_StillsRaw_full/*.png, LabeledApproved_full/*_L.png    Cambridge: 32 classes as colours
    {train,val,test}/*.png, {train,val,test}annot/*.png       SegNet: 11 classes as indices, 11 void

and writes what configs/camvid read::

    OUT_DIR/images/{train,val,test}/*.jpg
    OUT_DIR/labels/{train,val,test}/*.png      0 to 10 in the order of CLASSES, 255 unlabelled
    OUT_DIR/instances/{train,val,test}.json    COCO; an instance is a connected region of a car,
                                               pedestrian or bicyclist: those that touch count once

Sources: the colours are those of CamVid's label_colors.txt (Brostow et al., 2009); the groups of
classes and the split of the frames are those that SegNet (Badrinarayanan et al., 2017) published.
"""
import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import numpy as np
from pycocotools import mask as rle

VOID = 255
# SegNet's class -> RGB colours of Cambridge's classes in it
CLASSES = {
    'sky': [(128, 128, 128)],
    # bridge, building, wall, tunnel, archway
    'building': [(0, 128, 64), (128, 0, 0), (64, 192, 0), (64, 0, 64), (192, 0, 128)],
    # column or pole, traffic cone
    'pole': [(192, 192, 128), (0, 0, 64)],
    # road, lane markings to drive along and others
    'road': [(128, 64, 128), (128, 0, 192), (192, 0, 64)],
    # sidewalk, parking block, road shoulder
    'pavement': [(0, 0, 192), (64, 192, 128), (128, 128, 192)],
    # tree, other vegetation
    'tree': [(128, 128, 0), (192, 192, 0)],
    # sign, other text, traffic light
    'sign': [(192, 128, 128), (128, 128, 64), (0, 64, 64)],
    'fence': [(64, 64, 128)],
    # car, SUV or pick-up, truck or bus, train, other moving
    'car': [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],
    # pedestrian, child, cart or pram, animal
    'pedestrian': [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],
    # bicyclist, motorcycle or scooter
    'bicyclist': [(0, 128, 192), (192, 0, 192)],
}
VOID_COLOUR = (0, 0, 0)
THINGS = ('car', 'pedestrian', 'bicyclist')
MIN_AREA = 64  # pixels of an instance
SPLITS = ('train', 'val', 'test')


class Frame(NamedTuple):
    """One frame of the source: its split and files."""
    split: str
    image: Path
    labels: Path


def split_of(name: str) -> str:
    """SegNet's split of a Cambridge frame, by its sequence and number.

    Raises:
        ValueError: The name is none of CamVid's.
    """
    sequence, _, number = name.partition('_')
    digits = number.lstrip('f')
    if sequence not in ('0001TP', '0006R0', '0016E5', 'Seq05VD') or not digits.isdigit():
        raise ValueError(f'{name} is no frame of CamVid: names are such as 0016E5_07959')
    if sequence == 'Seq05VD' or sequence == '0001TP' and int(digits) > 8520:
        return 'test'
    return 'val' if sequence == '0016E5' and 7959 <= int(digits) <= 8159 else 'train'


def find_frames(source: Path) -> tuple[list[Frame], bool]:
    """The frames of a download, sorted, and whether their labels are colours.

    Raises:
        ValueError: Neither layout is there, or an image has no labels.
    """
    stills, coloured = source / '701_StillsRaw_full', source / 'LabeledApproved_full'
    if stills.is_dir() and coloured.is_dir():
        frames = [Frame(split_of(path.stem), path, coloured / f'{path.stem}_L.png')
                  for path in sorted(stills.glob('*.png'))]
    elif (source / 'trainannot').is_dir():
        frames = [Frame(split, path, source / f'{split}annot' / path.name)
                  for split in SPLITS for path in sorted((source / split).glob('*.png'))]
    else:
        raise ValueError(f'{source} holds no CamVid: neither 701_StillsRaw_full and '
                         'LabeledApproved_full (Cambridge) nor train and trainannot (SegNet)')
    missing = [frame.labels for frame in frames if not frame.labels.is_file()]
    if missing or not frames:
        raise ValueError(f'labels not found: {missing[0]} and {len(missing) - 1} more' if missing
                         else f'no *.png in the image folders of {source}')
    return frames, stills.is_dir() and coloured.is_dir()


def read(path: Path, flag: int) -> np.ndarray:
    """A picture as OpenCV reads it.

    Raises:
        ValueError: The file is no picture.
    """
    image = cv2.imread(str(path), flag)
    if image is None:
        raise ValueError(f'{path} cannot be read as a picture: fetch it again')
    return image


def labels_of_colours(image: np.ndarray, path: Path) -> np.ndarray:
    """RGB colours (H, W, 3) -> classes (H, W); a stray colour becomes 255.

    Raises:
        ValueError: Over 1 % of the pixels have colours that CamVid does not use.
    """
    codes = image.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    labels = np.full(codes.shape, VOID, np.uint8)
    known = codes == _code(VOID_COLOUR)
    for label, colours in enumerate(CLASSES.values()):
        member = np.isin(codes, [_code(colour) for colour in colours])
        labels[member] = label
        known |= member
    if known.mean() < 0.99:
        y, x = np.argwhere(~known)[0]
        raise ValueError(f'{path}: {1 - known.mean():.0%} of the pixels have colours that are '
                         f"none of CamVid's 32, such as {tuple(image[y, x].tolist())} (RGB)")
    return labels


def _code(colour: tuple[int, int, int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def labels_of_indices(image: np.ndarray, path: Path) -> np.ndarray:
    """SegNet's indices (H, W) -> classes (H, W), void 255.

    Raises:
        ValueError: A value is above 11.
    """
    if image.max() > len(CLASSES):
        raise ValueError(f'{path} holds the label {image.max()}: SegNet has 0 to 10, and 11 for '
                         'void')
    return np.where(image == len(CLASSES), VOID, image).astype(np.uint8)


def instances(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(category from 1, mask (H, W)) of each connected region of a thing."""
    for category, name in enumerate(THINGS, 1):
        count, regions = cv2.connectedComponents((labels == list(CLASSES).index(name)).view('u1'))
        for region in range(1, count):
            mask = regions == region
            if mask.sum() >= MIN_AREA:
                yield category, mask


def annotation(mask: np.ndarray, **ids: int) -> dict:
    """The COCO record of a mask, compressed."""
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    record = dict(ids, iscrowd=0, area=int(rle.area(code)), bbox=rle.toBbox(code).tolist())
    return dict(record, segmentation=dict(code, counts=code['counts'].decode()))


def convert_frame(frame: Frame, coloured: bool, size: tuple[int, int], root: Path) -> np.ndarray:
    """Write image and labels of a frame at `size` (width, height); returns the labels."""
    image = read(frame.image, cv2.IMREAD_COLOR)
    if coloured:
        labels = labels_of_colours(read(frame.labels, cv2.IMREAD_COLOR)[..., ::-1], frame.labels)
    else:
        labels = labels_of_indices(read(frame.labels, cv2.IMREAD_GRAYSCALE), frame.labels)
    if image.shape[:2] != labels.shape:
        raise ValueError(f'{frame.labels} is {labels.shape[1]}x{labels.shape[0]}, its image '
                         f'{image.shape[1]}x{image.shape[0]}')
    if labels.shape != size[::-1]:
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    for kind, picture, suffix in (('images', image, 'jpg'), ('labels', labels, 'png')):
        path = root / kind / frame.split / f'{frame.image.stem}.{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture)
    return labels


def convert(source: str | Path, out_dir: str | Path,
            size: tuple[int, int] = (480, 360)) -> dict[str, int]:
    """Write the whole set to `out_dir`, or nothing.

    Args:
        source: Folder of the download.
        out_dir: New or empty folder.
        size: Width and height of what is written; SegNet's frames have the default already.

    Returns:
        Frames of each split.

    Raises:
        ValueError: The download is incomplete or damaged; names the file.
        FileExistsError: `out_dir` is taken.
    """
    source, out_dir = Path(source), Path(out_dir).resolve()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f'{out_dir} is there already: give another --out-dir, or remove it')
    if min(size) < 32:
        raise ValueError(f'--size {size[0]} {size[1]} is too small: give 32 pixels at least')
    frames, coloured = find_frames(source)
    sets = {split: dict(images=[], annotations=[]) for split in SPLITS}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.camvid-', dir=out_dir.parent) as temp:
        new = Path(temp, 'new')
        for frame in frames:
            labels = convert_frame(frame, coloured, size, new)
            part = sets[frame.split]
            image_id = len(part['images']) + 1
            part['images'].append(dict(id=image_id, file_name=f'{frame.image.stem}.jpg',
                                       width=size[0], height=size[1]))
            part['annotations'] += [
                annotation(mask, id=len(part['annotations']) + i, image_id=image_id,
                           category_id=category)
                for i, (category, mask) in enumerate(instances(labels), 1)
            ]
        (new / 'instances').mkdir()
        categories = [dict(id=i, name=name) for i, name in enumerate(THINGS, 1)]
        for split, part in sets.items():
            if part['images']:
                path = new / f'instances/{split}.json'
                path.write_text(json.dumps(dict(part, categories=categories)))
        os.rename(new, out_dir)
    return {split: len(part['images']) for split, part in sets.items()}


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='folder of the download')
    parser.add_argument('--out-dir', default='data/camvid')
    parser.add_argument('--size', type=int, nargs=2, default=(480, 360),
                        metavar=('WIDTH', 'HEIGHT'), help='of what is written (default 480 360)')
    return parser.parse_args(argv)


def main(argv: Optional[list[str]] = None) -> int:
    args = parse_args(argv)
    try:
        counts = convert(args.source, args.out_dir, tuple(args.size))
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'{", ".join(f"{n} {split}" for split, n in counts.items())} frames in {args.out_dir}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
