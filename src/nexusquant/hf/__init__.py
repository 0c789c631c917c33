"""The only layer that knows Hugging Face transformers."""
