"""kquant for PyTorch: models wrapped as ordinary modules that train quantized. Imports torch and `kquant.core` only."""
