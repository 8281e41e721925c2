"""The public doors of the scan and of what stands around it: all else is behind them."""
from .around_scan import (
                          FUSED_OPS,
                          add_layer_norm,
                          check_fused_ops,
                          depthwise_conv,
                          gated_layer_norm,
)
from .directional_scan import directional_scan, grouped_linear
from .directions import DIRECTIONS, from_sequences, to_sequences
from .selective_scan import (
                             BackendUnavailableError,
                             available_backends,
                             check_backend,
                             resolve_backend,
                             selective_scan,
)

__all__ = [
    'DIRECTIONS', 'FUSED_OPS', 'BackendUnavailableError', 'add_layer_norm', 'available_backends',
    'check_backend', 'check_fused_ops', 'depthwise_conv', 'directional_scan', 'from_sequences',
    'gated_layer_norm', 'grouped_linear', 'resolve_backend', 'selective_scan', 'to_sequences'
]
