"""Draw what a trained classifier, detector or segmenter sees in pictures and videos.

The config's default_scope picks the task. Every input gives a line on the screen and a picture or
a video in the output folder.
"""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import BytesIO
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from PIL import Image
from rich.progress import track
from torch import nn

from mmgroupmamba.checkpoint import load_model
from mmgroupmamba.launch import (
    TRACEBACK,
    LaunchError,
    OptionAction,
    Parser,
    check_folder,
    explain,
    leaf_datasets,
    load_config,
    one_line,
    replace_sync_bn,
    run_tool,
)

IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
FPS = 25  # where a video does not tell


class Frame(NamedTuple):
    """An image (H, W, 3), BGR uint8, and the file it came from."""
    path: Path
    image: np.ndarray


class Prediction(NamedTuple):
    """What a model says of an image.

    Args:
        values: (classes, ) what the line on the screen tells: scores, instances or shares.
        record: The prediction for JSON.
        drawn: The picture (H, W, 3), RGB uint8.
        label_map: (H, W), of segmentation only.
    """
    values: np.ndarray
    record: dict
    drawn: np.ndarray
    label_map: Optional[np.ndarray] = None


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not within 0 and 1')
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not at least 1')
    return value


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, inputs='image, video, or folder of them')
    parser.add_argument('checkpoint', help='checkpoint file, of ours or official')
    parser.add_argument('--out-dir', default='work_dirs/image_demo', metavar='DIR',
                        help='folder for the drawn pictures and videos (default %(default)s)')
    parser.add_argument('--json', metavar='FILE.json', type=Path,
                        help='write the predictions; label maps become PNG files in --out-dir')
    parser.add_argument('--device', default=get_device(), help='cpu, cuda or cuda:N')
    parser.add_argument('--batch-size', type=positive, default=1,
                        help='images of equal size at a time (default 1)')
    parser.add_argument('--score-thr', type=fraction, default=0.3,
                        help='detection: draw and count what scores above (default 0.3)')
    parser.add_argument('--opacity', type=fraction, default=0.5,
                        help='detection and segmentation: of what is drawn (default 0.5)')
    parser.add_argument('--cfg-options', nargs='+', action=OptionAction, metavar='KEY=VALUE',
                        help='override config values')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args(argv)


def check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LaunchError(f'--device {name}: give cpu, cuda or cuda:N') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise LaunchError(f'--device {name}: torch sees {torch.cuda.device_count()} GPUs '
                          '(python -m mmgroupmamba.doctor tells more)')


def find_files(inputs: list[Path], out_dir: Path) -> list[Path]:
    """The images and videos of the inputs, folders opened, by name within them.

    Raises:
        LaunchError: A path is missing, a folder holds none, or a picture would be written beside
            the images that it is drawn from.
    """
    files = []
    for path in inputs:
        if not path.exists():
            raise LaunchError(f'input {path} does not exist')
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir()
                           if p.is_file() and p.suffix.lower() in IMAGES + VIDEOS)
        if not found:
            raise LaunchError(f'folder {path} holds no image and no video: looked for '
                              f'{" ".join(IMAGES + VIDEOS)}')
        files += found
    for path in files:
        if path.resolve().parent == out_dir.resolve():
            raise LaunchError(f'--out-dir {out_dir} holds the input {path.name}, which could be '
                              'overwritten: name another folder')
    return files


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


class Reader:
    """Reads images as the config's test pipeline does: grey as three channels, alpha dropped, the
    EXIF orientation applied; 16-bit values scaled linearly to 8 bits.

    Args:
        pipeline: The test pipeline of a config.
    """

    def __init__(self, pipeline: list[dict]) -> None:
        load = [step for step in pipeline if step['type'].split('.')[-1] == 'LoadImageFromFile']
        if not load:
            raise LaunchError('the test pipeline of the config has no LoadImageFromFile')
        self.load = TRANSFORMS.build({**load[0], 'to_float32': False, 'ignore_empty': False})

    def __call__(self, path: Path) -> np.ndarray:
        """An image (H, W, 3), BGR uint8.

        Raises:
            LaunchError: The file is no image, damaged, or of values that have no range.
        """
        try:
            data = path.read_bytes()
            if data.startswith(b'\xff\xd8'):  # OpenCV fills up a JPEG that breaks off
                with Image.open(BytesIO(data)) as picture:
                    picture.load()
            else:
                buffer = np.frombuffer(data, np.uint8)
                deep = cv2.imdecode(buffer, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
                if deep is None:
                    raise LaunchError('is no image, or damaged')
                if deep.dtype == np.uint16:
                    print(f'{path}: 16-bit values up to {deep.max()}, scaled from 0..65535 to '
                          '0..255')
                    return cv2.imdecode(buffer, cv2.IMREAD_COLOR)
                if deep.dtype != np.uint8:
                    raise LaunchError(f'holds {deep.dtype} values, which have no range to scale: '
                                      'convert it to 8 or 16 bits')
            return self.load(dict(img_path=str(path)))['img']
        except (OSError, AssertionError, cv2.error) as error:
            raise LaunchError(f'is no image, or damaged ({one_line(error)})') from error


class Predictor:
    """An inferencer of one of the libraries, its weights loaded strictly.

    Args:
        cfg: Settled by :func:`mmgroupmamba.launch.load_config`.
        args: Of the command line.
    """

    def __init__(self, cfg: Config, args: argparse.Namespace) -> None:
        self.args = args
        with warnings.catch_warnings():  # of random weights: the real ones follow
            warnings.simplefilter('ignore')
            self.inferencer = self.build(cfg, args.device)
        checkpoint = load_model(self.inferencer.model, args.checkpoint)
        self.classes, palette = names_and_colours(
            self.inferencer.model, checkpoint, cfg.test_dataloader.dataset)
        self.set_meta(self.classes, palette)

    def build(self, cfg: Config, device: str) -> Any:
        """The inferencer, without weights."""
        raise NotImplementedError

    def set_meta(self, classes: list[str], palette: Optional[list]) -> None:
        """Hand names and colours to what draws."""
        raise NotImplementedError

    def predict(self, images: list[np.ndarray]) -> list[Prediction]:
        """Predictions on images of equal size, (H, W, 3) BGR uint8."""
        samples = self.inferencer.forward(self.collate(images))
        return [self.prediction(np.ascontiguousarray(image[..., ::-1]), sample)
                for image, sample in zip(images, samples)]

    def collate(self, images: list[np.ndarray]) -> dict:
        """The batch that the model takes."""
        (batch, ) = self.inferencer.preprocess(images, len(images))
        return batch

    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        """The prediction in a data sample, drawn on its RGB image."""
        raise NotImplementedError

    def describe(self, values: np.ndarray) -> str:
        """A line's worth of :attr:`Prediction.values`, or of their mean over a video."""
        raise NotImplementedError

    def ranked(self, values: np.ndarray, above: float) -> list[tuple[str, float]]:
        """Class names and values above a bound, the largest first."""
        return [(self.classes[i], values[i]) for i in np.argsort(-values, kind='stable')
                if values[i] > above]


class Classification(Predictor):

    def build(self, cfg: Config, device: str) -> Any:
        from mmpretrain import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer
        inferencer = ImageClassificationInferencer(cfg, pretrained=False, device=device)
        inferencer.visualizer = UniversalVisualizer()
        return inferencer

    def set_meta(self, classes: list[str], palette: Optional[list]) -> None:
        self.inferencer.classes = classes

    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        # its own visualize() draws only with a window or a folder
        drawn = self.inferencer.visualizer.visualize_cls(
            image, sample, classes=self.classes, draw_gt=False)
        (record, ) = self.inferencer.postprocess([sample], None)
        scores = record['pred_scores']
        return Prediction(scores, {**record, 'pred_scores': scores.tolist()}, drawn)

    def describe(self, values: np.ndarray) -> str:
        best = int(values.argmax())
        return f'{self.classes[best]} {values[best]:.2f}'


class Detection(Predictor):

    def build(self, cfg: Config, device: str) -> Any:
        from mmdet.apis import DetInferencer
        return DetInferencer(cfg, device=device, show_progress=False)

    def set_meta(self, classes: list[str], palette: Optional[list]) -> None:
        visualizer = self.inferencer.visualizer
        visualizer.dataset_meta = dict(classes=classes, palette=palette or 'random')
        visualizer.alpha = self.args.opacity

    def collate(self, images: list[np.ndarray]) -> dict:
        ((_, batch), ) = self.inferencer.preprocess(images, len(images))
        return batch

    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        sample = sample.cpu()
        (drawn, ) = self.inferencer.visualize(
            [image], [sample], return_vis=True, pred_score_thr=self.args.score_thr)
        (record, ) = self.inferencer.postprocess([sample])['predictions']
        found = sample.pred_instances
        labels = found.labels[found.scores > self.args.score_thr]
        return Prediction(np.bincount(labels, minlength=len(self.classes)), record, drawn)

    def describe(self, values: np.ndarray) -> str:
        counts = [f'{value:.3g} {name}' for name, value in self.ranked(values, 0)]
        return ', '.join(counts) or f'nothing above {self.args.score_thr}'


class Segmentation(Predictor):

    def build(self, cfg: Config, device: str) -> Any:
        from mmseg.apis import MMSegInferencer
        return MMSegInferencer(cfg, device=device, show_progress=False)

    def set_meta(self, classes: list[str], palette: Optional[list]) -> None:
        if palette is None:
            palette = np.random.RandomState(42).randint(0, 255, (len(classes), 3)).tolist()
        self.inferencer.model.dataset_meta = dict(classes=classes, palette=palette)

    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        sample = sample.cpu()
        (drawn, ) = self.inferencer.visualize(
            [image], [sample], return_vis=True, opacity=self.args.opacity)
        label_map = sample.pred_sem_seg.data[0].numpy()
        shares = np.bincount(label_map.ravel(), minlength=len(self.classes)) / label_map.size
        record = dict(shares={name: round(value, 6) for name, value in self.ranked(shares, 0)})
        return Prediction(shares, record, drawn, label_map)

    def describe(self, values: np.ndarray) -> str:
        return ', '.join(f'{name} {100 * v:.1f} %' for name, v in self.ranked(values, 5e-4))


PREDICTORS = {'mmpretrain': Classification, 'mmdet': Detection, 'mmseg': Segmentation}


def names_and_colours(model: nn.Module, checkpoint: dict,
                      dataset: dict) -> tuple[list[str], Optional[list]]:
    """Class names and colours: the checkpoint's, else those of the config's dataset.

    Returns:
        A name for each class of the head, 'class 7' where there is none, and as many colours or
        None.
    """
    meta = checkpoint.get('meta') or {}
    found = {k.lower(): v for k, v in {**meta, **(meta.get('dataset_meta') or {})}.items()}
    if not found.get('classes'):
        found = DATASETS.build({**dataset, 'lazy_init': True}).metainfo
    classes = list(found.get('classes') or [])
    heads = [m.num_classes for name, m in model.named_modules()
             if 'head' in name and isinstance(getattr(m, 'num_classes', None), int)]
    classes += [f'class {i}' for i in range(len(classes), max(heads, default=0))]
    palette = found.get('palette')
    usable = isinstance(palette, (list, tuple)) and len(palette) == len(classes)
    return classes, [tuple(colour) for colour in palette] if usable else None


def build_predictor(args: argparse.Namespace) -> tuple[Predictor, Reader]:
    """Read the config and load the model.

    Raises:
        LaunchError, CheckpointError: Config or checkpoint is unfit.
    """
    cfg = load_config(args)
    if not cfg.get('test_dataloader'):
        raise LaunchError(f'{args.config} has no test_dataloader, whose pipeline prepares images')
    init_default_scope(cfg.default_scope)
    _, dataset = next(leaf_datasets(cfg.test_dataloader.dataset, ''))
    dataset.pipeline = [s for s in dataset.pipeline if not s['type'].endswith('LoadAnnotations')]
    cfg.test_dataloader.dataset = dataset
    cfg.visualizer.vis_backends = None  # pictures go to --out-dir
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if torch.device(args.device).type == 'cpu':
        replace_sync_bn(cfg.model)
    reader = Reader(dataset.pipeline)
    return PREDICTORS[cfg.default_scope](cfg, args), reader


def batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Up to `size` frames in a row, of equal shape: none is padded to the size of another."""
    batch: list[Frame] = []
    for frame in frames:
        if batch and (len(batch) == size or frame.image.shape != batch[0].image.shape):
            yield batch
            batch = []
        batch.append(frame)
    if batch:
        yield batch


class Demo:
    """Runs a predictor over files and writes what it finds.

    What cannot be done is gathered in `refused`, path -> reason, and the rest is done.
    """

    def __init__(self, predictor: Predictor, reader: Reader, args: argparse.Namespace) -> None:
        self.predictor = predictor
        self.reader = reader
        self.args = args
        self.out_dir = Path(args.out_dir)
        self.refused: dict[Path, str] = {}
        self.records: list[dict] = []
        self.names: set[str] = set()

    def run(self, files: list[Path]) -> None:
        for video, group in groupby(files, is_video):
            if video:
                for path in group:
                    self.run_video(path)
            else:
                self.run_images(group)

    def run_images(self, paths: Iterable[Path]) -> None:
        for frame, prediction in self.predicted(self.read(paths)):
            name = self.name(frame.path)
            mmcv.imwrite(prediction.drawn[..., ::-1], str(self.out_dir / f'{name}.png'))
            self.record(prediction, name, input=str(frame.path))
            print(f'{frame.path}: {self.predictor.describe(prediction.values)}')

    def run_video(self, path: Path) -> None:
        reader = mmcv.VideoReader(str(path))
        frames = track((Frame(path, image) for image in reader), path.name,
                       max(reader.frame_cnt, 0) or None, transient=True,
                       disable=not sys.stdout.isatty())
        frames = takewhile(lambda _: path not in self.refused, frames)
        name = self.name(path)
        writer, values = None, []
        try:
            for i, (_, prediction) in enumerate(self.predicted(frames)):
                picture = even(prediction.drawn[..., ::-1])
                if writer is None:
                    writer = self.open_writer(name, reader.fps or FPS, picture)
                writer.write(picture)
                values.append(prediction.values)
                self.record(prediction, f'{name}_{i:06d}', input=str(path), frame=i)
        finally:
            if writer is not None:
                writer.release()
        if values:
            means = self.predictor.describe(np.mean(values, 0))
            print(f'{path}: {len(values)} frames, on average {means}')
        elif path not in self.refused:
            self.refused[path] = 'is no video, or one without frames'

    def open_writer(self, name: str, fps: float, picture: np.ndarray) -> cv2.VideoWriter:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        path = self.out_dir / f'{name}.mp4'
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps,
                                 picture.shape[1::-1])
        if not writer.isOpened():
            raise LaunchError(f'{path} cannot be written: no room there, or an OpenCV without the '
                              'mp4v codec')
        return writer

    def read(self, paths: Iterable[Path]) -> Iterator[Frame]:
        for path in paths:
            try:
                yield Frame(path, self.reader(path))
            except LaunchError as error:
                self.refused[path] = str(error)

    def predicted(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Prediction]]:
        for batch in batches(frames, self.args.batch_size):
            try:
                predictions = self.predictor.predict([frame.image for frame in batch])
            except Exception as error:
                reason = explain(error)
                if re.search("out of memory|can't allocate memory", str(error)):
                    reason = f'does not fit into the memory of {self.args.device}'
                if reason is None or os.environ.get(TRACEBACK):
                    raise
                self.refused.update({frame.path: reason for frame in batch})
            else:
                yield from zip(batch, predictions)

    def name(self, path: Path) -> str:
        """The stem of a file's results, not used before."""
        name, i = path.stem, 1
        while name in self.names:
            i += 1
            name = f'{path.stem}_{i}'
        self.names.add(name)
        return name

    def record(self, prediction: Prediction, name: str, **place: Any) -> None:
        """Keep a prediction for --json; label maps go to files."""
        if self.args.json is None:
            return
        record = {**place, **prediction.record}
        if prediction.label_map is not None:
            path = self.out_dir / f'{name}_labels.png'
            kind = np.uint8 if len(self.predictor.classes) <= 256 else np.uint16
            mmcv.imwrite(prediction.label_map.astype(kind), str(path))
            record['label_map'] = str(path)
        self.records.append(record)


def even(picture: np.ndarray) -> np.ndarray:
    """Repeat the last row or column of an odd side: video codecs take even ones only."""
    height, width = picture.shape[:2]
    return cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)


def run(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    check_device(args.device)
    check_folder(args.out_dir, '--out-dir')
    if args.json is not None:
        check_folder(str(args.json.parent), '--json')
    files = find_files(args.inputs, Path(args.out_dir))
    Image.MAX_IMAGE_PIXELS = None  # large pictures are welcome
    cv2.setLogLevel(0)  # what is damaged is told below
    warnings.filterwarnings('ignore', 'Warning: The .* is out of bounds')  # of boxes at the border
    os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')

    with redirect_stdout(sys.stderr):  # what the libraries say while they load
        predictor, reader = build_predictor(args)
    demo = Demo(predictor, reader, args)
    demo.run(files)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dict(
            config=args.config, checkpoint=args.checkpoint, classes=predictor.classes,
            predictions=demo.records)) + '\n')
    if len(files) > len(demo.refused):
        print(f'pictures: {args.out_dir}')
    if demo.refused:
        reasons = '; '.join(f'{path} {reason}' for path, reason in demo.refused.items())
        start = f'{len(demo.refused)} of {len(files)} inputs failed: ' if len(files) > 1 else ''
        raise LaunchError(start + reasons)


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(run, argv)


if __name__ == '__main__':
    sys.exit(main())
