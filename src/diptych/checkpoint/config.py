"""The choices that the command line offers for checkpoints; no torch."""

from typing import Literal

Resize = Literal["open_clip", "transformers"]
"""How a grid of positions is resized: bicubic with antialiasing (OpenCLIP), or without (transformers'
`interpolate_pos_encoding`). They differ in both directions: PyTorch's two bicubic kernels are not the same."""

WeightsDtype = Literal["float32", "float16", "bfloat16"]
"""Type of the weights in a file."""

LayoutName = Literal["diptych", "open_clip", "transformers", "openai", "onnx"]
"""What can be written: our own folder, OpenCLIP's, transformers', OpenAI's state dict, an ONNX file a tower."""
