"""`python -m nexusquant`."""

from nexusquant.cli import app

app(prog_name="nexusquant")
