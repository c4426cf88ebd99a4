"""What a model is: its description, its tensors, its forward pass."""
