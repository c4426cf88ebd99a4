"""Pictures that code draws, questions about them, and a small model that was trained to answer these."""
