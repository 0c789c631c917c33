"""Where compressed prefixes are kept: directories, Redis, and what fsspec opens."""
