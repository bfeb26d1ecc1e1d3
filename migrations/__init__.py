"""Alembic's migrations, run by `pagemill migrate` and `pagemill up`."""
