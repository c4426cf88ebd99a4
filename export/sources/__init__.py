"""What is exported: checkpoints, and model files that are quantized already."""
