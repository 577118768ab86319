"""kquant for PyTorch: models wrapped as ordinary modules that train quantized. Imports torch and `kquant.core` only."""

from kquant.core.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    ExportError,
    KQuantError,
    ModelError,
    RangeError,
    UnsupportedError,
)
from kquant_torch.api import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, calibrate, plan, wrap

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "ConfigError",
    "DoReFaQuantizer",
    "ExportError",
    "KQuantError",
    "ModelError",
    "NaiveQuantizer",
    "QAT_Quantizer",
    "RangeError",
    "UnsupportedError",
    "calibrate",
    "plan",
    "wrap",
]
