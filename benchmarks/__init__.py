"""Side-by-side measurements; not part of the installed package."""
