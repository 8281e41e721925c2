"""The public doors of the scan: everything else in this package is behind them."""
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
    'DIRECTIONS', 'BackendUnavailableError', 'available_backends', 'check_backend',
    'directional_scan', 'from_sequences', 'grouped_linear', 'resolve_backend', 'selective_scan',
    'to_sequences'
]
