"""How fast, how large, and what quantizing cost."""
