"""Files with a model in them, read without trust and written whole or not at all."""
