"""Ways to run a model: NumPy, the native kernels, onnxruntime."""
