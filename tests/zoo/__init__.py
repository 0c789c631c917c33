"""Tiny random models of all the causal language models that transformers knows."""
