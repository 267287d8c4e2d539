"""Forms for inference: folded norms, ONNX files, exported programs."""
