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
from kquant_torch.audit import audit
from kquant_torch.export import export_torchscript
from kquant_torch.run import load_artifact
from kquant_torch.verify import verify

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
    "audit",
    "calibrate",
    "export_torchscript",
    "load_artifact",
    "plan",
    "verify",
    "wrap",
]
