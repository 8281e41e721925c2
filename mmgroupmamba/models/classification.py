"""What belongs to ImageNet classification only: class block, two-headed head, distillation.

The one module that needs mmpretrain; classification configs import it through ``custom_imports``.
"""
import logging
from typing import NoReturn, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmpretrain.models import ImageClassifier, LinearClsHead, TimmClassifier
from mmpretrain.structures import DataSample
from torch import Tensor

from mmgroupmamba.checkpoint import load_model
from mmgroupmamba.registry import MODELS

from .layers import ModulatedGroupMamba, init_weights


class MLP(nn.Module):
    """Plain feed-forward of the class block: (..., C) in and out."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


@MODELS.register_module()
class ClassBlockNeck(BaseModule):
    """Class token, class block and last norm (the official ``forward_cls``).

    The class token is the mean of stage 4's tokens before any norm: build the backbone with
    ``final_norm=False``. The block treats it as a map of one pixel.

    Args:
        embed_dim: C of stage 4.
        mlp_ratio: Of the block's feed-forward.
        scan_backend: See :func:`mmgroupmamba.ops.selective_scan`.
        init_cfg: As in mmengine.
    """

    def __init__(self,
                 embed_dim: int,
                 mlp_ratio: float = 4.,
                 scan_backend: str = 'auto',
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.mixer = ModulatedGroupMamba(embed_dim, scan_backend)
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ffn = MLP(embed_dim, int(embed_dim * mlp_ratio))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Maps of the stages, the last (B, C, H, W) -> ((B, C), )."""
        token = feats[-1].mean((2, 3))[:, None, None]  # (B, 1, 1, C)
        token = token + self.norm1(self.mixer(token))
        token = token + self.ffn(self.norm2(token))
        return (self.norm(token).flatten(1), )


@MODELS.register_module()
class DistilledLinearHead(LinearClsHead):
    """Two linear classifiers on the class token, averaged at test.

    ``fc`` learns the labels and ``dist_fc`` the teacher (:class:`DistilledImageClassifier`).
    Without a teacher their average is trained as one classifier.

    Args:
        num_classes: Classes.
        in_channels: C of the class token.
        init_cfg: As in mmengine.
        **kwargs: ``loss``, ``topk`` and ``cal_acc`` of mmpretrain's ``ClsHead``.
    """

    def __init__(self,
                 num_classes: int,
                 in_channels: int,
                 init_cfg: Optional[dict] = None,
                 **kwargs) -> None:
        super().__init__(num_classes, in_channels, init_cfg=init_cfg, **kwargs)
        self.dist_fc = nn.Linear(in_channels, num_classes)
        self.apply(init_weights)

    def logits(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Scores of ``fc`` and of ``dist_fc``, each (B, num_classes).

        Raises:
            ValueError: The two were folded into one.
        """
        if self.dist_fc is None:
            raise ValueError('the two heads were folded into one for inference by fuse: build the '
                             'model anew to train it')
        token = self.pre_logits(feats)
        return self.fc(token), self.dist_fc(token)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Average of the two, (B, num_classes)."""
        if self.dist_fc is None:  # folded into fc by mmgroupmamba.models.fuse
            return self.fc(self.pre_logits(feats))
        score, dist_score = self.logits(feats)
        return (score + dist_score) / 2


class _Teacher:
    """A frozen model outside the student's module tree, built when it is first asked for.

    There it is in no state dict and no optimiser, and DDP does not wrap it; copies of the student,
    such as EMA makes, share it; testing a student needs none.
    """

    def __init__(self, config: dict) -> None:
        self.config = config
        self._model: Optional[nn.Module] = None

    def __deepcopy__(self, memo: dict) -> '_Teacher':
        return self

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            model = MODELS.build(self.config)
            init_cfg = getattr(model, 'init_cfg', None)
            if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
                load_model(  # strictly, unlike mmengine
                    model, init_cfg['checkpoint'], ' (model.teacher.init_cfg.checkpoint=FILE)')
            elif not isinstance(model, TimmClassifier):
                # a timm model brings its weights along; its own init_weights would draw new ones
                model.init_weights()
            if not (init_cfg or self.config.get('pretrained')):
                print_log('the teacher starts from random weights: name its own by '
                          'model.teacher.init_cfg, or model.teacher.pretrained=True for timm',
                          logger='current', level=logging.WARNING)
            model.requires_grad_(False)
            model.eval()
            self._model = model
        return self._model

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        if next(self.model.parameters()).device != inputs.device:
            self.model.to(inputs.device)
        return self.model(inputs)

    @property
    def num_classes(self) -> Optional[int]:
        """Classes of the teacher's head, None where it does not tell."""
        for part in (getattr(self.model, 'head', None), getattr(self.model, 'model', None)):
            if getattr(part, 'num_classes', None):
                return part.num_classes
        return None

    @property
    def _timm_cfg(self) -> dict:
        return getattr(getattr(self.model, 'model', None), 'default_cfg', {})

    @property
    def size(self) -> Optional[tuple[int, int]]:
        """(H, W) that the teacher declares, None where it does not."""
        size = self._timm_cfg.get('input_size')
        return tuple(size[-2:]) if size else None

    @property
    def mean_std(self) -> Optional[Tensor]:
        """Normalisation the teacher declares on the 0 to 255 scale, (2, 3)."""
        preprocessor = getattr(self.model, 'data_preprocessor', None)
        if getattr(preprocessor, '_enable_normalize', False):
            return torch.stack([preprocessor.mean.flatten(), preprocessor.std.flatten()])
        if 'mean' in self._timm_cfg and 'std' in self._timm_cfg:
            return 255 * torch.tensor([self._timm_cfg['mean'], self._timm_cfg['std']])
        return None


@MODELS.register_module()
class DistilledImageClassifier(ImageClassifier):
    r"""ImageClassifier that also learns from a frozen teacher (equation 10).

    .. math::
        L = (1 - \alpha)\, L_{cls}(Z_{fc}, y) + \alpha\, CE(Z_{dist}, \arg\max Z_{teacher})

    The teacher sees the very images the student sees, mixed as they are. With ``'soft'`` the
    second term is :math:`\tau^2\,KL` between the softened scores, averaged over batch and classes
    (the official ``DistillationLoss``).

    Args:
        teacher: Config of any classifier the registry builds, called as ``teacher(inputs)``. Its
            weights come with it (``pretrained=True`` or an ``init_cfg``). It is built when
            training starts.
        alpha: Weight of the teacher's term, in [0, 1].
        distillation: 'hard' or 'soft'.
        tau: Temperature of 'soft', positive.
        **kwargs: Those of mmpretrain's ``ImageClassifier``; the head must be a
            :class:`DistilledLinearHead`.

    Raises:
        ValueError: An argument is out of range; the teacher has other classes, another input
            size or another normalisation than the student.
    """

    def __init__(self,
                 teacher: dict,
                 alpha: float = 0.5,
                 distillation: str = 'hard',
                 tau: float = 1.,
                 **kwargs) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f'alpha must be in [0, 1], got {alpha}')
        if distillation not in ('hard', 'soft'):
            raise ValueError(f"distillation must be 'hard' or 'soft', got {distillation!r}")
        if tau <= 0:
            raise ValueError(f'tau must be positive, got {tau}')
        super().__init__(**kwargs)
        if not isinstance(self.head, DistilledLinearHead):
            raise ValueError('distillation needs a head with two classifiers: set '
                             "model.head.type to 'mmgroupmamba.DistilledLinearHead', got "
                             f'{type(self.head).__name__}')
        self.alpha = alpha
        self.distillation = distillation
        self.tau = tau
        self.teacher = _Teacher(teacher)

    def init_weights(self) -> None:
        """Initialise the student, build the teacher and check that it takes the same images.

        Raises:
            ValueError: The teacher's classes or its normalisation are others.
            CheckpointError: The teacher's ``init_cfg`` names a file that does not fit it.
        """
        super().init_weights()
        if self.teacher.num_classes not in (None, self.head.num_classes):
            self._refuse_classes(self.teacher.num_classes)
        self._check_normalisation()

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Both terms of the equation, weighted.

        Args:
            inputs: Preprocessed, perhaps mixed images (B, 3, H, W).
            data_samples: With ``gt_score`` (mixed) or ``gt_label``.

        Returns:
            ``loss_cls`` and ``loss_distill``, whose sum is trained.
        """
        if self.teacher.size not in (None, tuple(inputs.shape[-2:])):
            raise ValueError(f'the teacher takes images of {self.teacher.size} (H, W), the student '
                             f'gets {tuple(inputs.shape[-2:])}: give both the same input size')
        score, dist_score = self.head.logits(self.extract_feat(inputs))
        teacher_score = self.teacher(inputs)
        if teacher_score.shape != score.shape:
            self._refuse_classes(teacher_score.shape[1])
        loss_cls = self.head._get_loss(score, data_samples)
        loss_distill = self._distillation_loss(dist_score, teacher_score)
        return dict(
            loss_cls=(1 - self.alpha) * loss_cls.pop('loss'),
            loss_distill=self.alpha * loss_distill,
            **loss_cls)

    def _distillation_loss(self, score: Tensor, teacher_score: Tensor) -> Tensor:
        if self.distillation == 'hard':
            return F.cross_entropy(score, teacher_score.argmax(1))
        divergence = F.kl_div(
            F.log_softmax(score / self.tau, 1),
            F.log_softmax(teacher_score / self.tau, 1),
            reduction='sum',
            log_target=True)
        return divergence * self.tau**2 / score.numel()

    def _refuse_classes(self, classes: int) -> NoReturn:
        raise ValueError(f'the teacher has {classes} classes, the student {self.head.num_classes}: '
                         'take a teacher of the same classes')

    def _check_normalisation(self) -> None:
        own = self.data_preprocessor
        theirs = self.teacher.mean_std
        if theirs is None or not own._enable_normalize:
            return
        ours = torch.stack([own.mean.flatten(), own.std.flatten()])
        if ours.shape != theirs.shape or not torch.allclose(ours.cpu(), theirs.cpu(), atol=0.1):
            raise ValueError('the teacher wants images normalised with mean and std '
                             f'{theirs.tolist()}, the student has {ours.tolist()}: '
                             'give both the same data_preprocessor')
