"""Triton kernels. Nothing but `operator` is for others, and only where Triton can be imported."""
