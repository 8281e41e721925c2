"""The public doors of the scan and of what stands around it: all else is behind them."""
from .around_scan import (
                          FUSED_OPS,
                          add_layer_norm,
                          channel_affinity,
                          check_fused_ops,
                          depthwise_conv,
                          depthwise_conv_linear,
                          gated_layer_norm,
                          layer_norm,
                          modulate_layer_norm,
                          norm_dtype_of,
                          with_padding,
                          without_padding,
)
from .directional_scan import block_diagonal, directional_scan, grouped_linear
from .directions import DIRECTIONS, from_sequences, to_sequences
from .feed_forward import feed_forward
from .inference import (
                          MixerEnd,
                          conv_relu,
                          convolves_with_relu,
                          image_squares,
                          joins_linear_sum,
                          joins_mixer_end,
                          layer_norm_pair,
                          linear_sum,
                          mixer_end,
)
from .operator import infers_on_cpu
from .packed_conv import PackedConvs, packs
from .precision import linear_dtype
from .projected_scan import projected_scan, scans_projected
from .selective_scan import (
                          BackendUnavailableError,
                          available_backends,
                          check_backend,
                          resolve_backend,
                          selective_scan,
)
from .training_block import BlockWeights, training_block, trains_whole

__all__ = [
    'DIRECTIONS', 'FUSED_OPS', 'BackendUnavailableError', 'BlockWeights', 'MixerEnd',
    'PackedConvs', 'add_layer_norm', 'available_backends', 'block_diagonal', 'channel_affinity',
    'check_backend', 'check_fused_ops', 'conv_relu', 'convolves_with_relu', 'depthwise_conv',
    'depthwise_conv_linear', 'directional_scan', 'feed_forward', 'from_sequences',
    'gated_layer_norm', 'grouped_linear', 'image_squares', 'infers_on_cpu', 'joins_linear_sum',
    'joins_mixer_end', 'layer_norm', 'layer_norm_pair', 'linear_dtype', 'linear_sum',
    'mixer_end', 'modulate_layer_norm', 'norm_dtype_of', 'packs', 'projected_scan',
    'resolve_backend', 'scans_projected', 'selective_scan', 'to_sequences', 'training_block',
    'trains_whole', 'with_padding', 'without_padding'
]
