"""What belongs to semantic segmentation only: test-time augmentation that averages logits.

Needs mmengine alone, not mmseg.
"""
from collections.abc import Sequence

import torch
from mmengine.model import BaseTTAModel
from mmengine.structures import BaseDataElement, PixelData

from mmgroupmamba.registry import MODELS


@MODELS.register_module()
class SegLogitsTTA(BaseTTAModel):
    """Averages the logits of an image's augmentations, at its own size and flipped back.

    mmseg's ``SegTTAModel`` averages probabilities instead, where one confident augmentation counts
    for less.
    """

    def merge_preds(self, data_samples_list: Sequence[Sequence[BaseDataElement]]
                    ) -> list[BaseDataElement]:
        """One prediction an image.

        Args:
            data_samples_list: For each image the predictions of its augmentations; their
                ``seg_logits`` are (classes, H, W) of the image as it is stored.

        Returns:
            The first augmentation's sample of each image, with the mean as ``seg_logits`` and the
            decision on it as ``pred_sem_seg`` (1, H, W).
        """
        return [self._merge(data_samples) for data_samples in data_samples_list]

    def _merge(self, data_samples: Sequence[BaseDataElement]) -> BaseDataElement:
        scores = (sample.seg_logits.data for sample in data_samples)
        if self.module.out_channels > 1:
            mean = sum(scores) / len(data_samples)
            decision = mean.argmax(0, keepdim=True)
        else:  # mmseg hands over probabilities, as (1, H, W)
            mean = sum(torch.logit(score, eps=1e-6) for score in scores) / len(data_samples)
            mean = mean.sigmoid()
            decision = (mean > self.module.decode_head.threshold).to(mean)
        merged = data_samples[0]
        merged.set_data(dict(
            seg_logits=PixelData(data=mean), pred_sem_seg=PixelData(data=decision)))
        return merged
