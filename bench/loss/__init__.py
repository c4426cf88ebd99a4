"""What quantization cost: a model next to its reference."""
