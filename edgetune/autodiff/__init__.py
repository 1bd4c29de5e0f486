"""From an inference graph to a training graph: reverse-mode differentiation in ONNX."""
