"""What is fetched from the Hugging Face Hub, and made a model of."""
