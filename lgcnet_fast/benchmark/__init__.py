"""How fast networks are: ours, any PyTorch module and any ONNX file, in one harness."""
