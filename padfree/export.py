"""Networks as files that run without padfree: ONNX and `torch.export` programs.

padfree.export.to_onnx(padfree.convert(model).eval(), "model.onnx")
"""

from padfree.deploy.onnx import to_onnx
from padfree.deploy.program import to_exported_program

__all__ = ["to_exported_program", "to_onnx"]
