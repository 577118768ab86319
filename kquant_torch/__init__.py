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
from kquant_torch.controls import (
    freeze_batch_norm,
    freeze_observers,
    reestimate_batch_norm,
    unfreeze_batch_norm,
    unfreeze_observers,
)
from kquant_torch.export import export_torchscript
from kquant_torch.onnx_export import export_onnx
from kquant_torch.program_export import export_program
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
    "export_onnx",
    "export_program",
    "export_torchscript",
    "freeze_batch_norm",
    "freeze_observers",
    "load_artifact",
    "plan",
    "reestimate_batch_norm",
    "unfreeze_batch_norm",
    "unfreeze_observers",
    "verify",
    "wrap",
]
