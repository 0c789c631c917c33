"""The storage codec: keys and values to entropy-coded bytes and back."""
