"""`python -m cli` is `pagemill`."""

from cli.main import app

app()
