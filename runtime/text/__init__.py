"""From text to ids and back: tokenizer, chat templates, sampling, generation."""
