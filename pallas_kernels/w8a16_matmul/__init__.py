"""Matrix product of activations with int8 weights: y = (x . wq) * scale + bias. Forward only, for serving."""

from .api import quantize_int8, w8a16_matmul
from .reference import dequantize

__all__ = ["dequantize", "quantize_int8", "w8a16_matmul"]
