"""Alembic: numbered revisions, one change each; the same ones run on SQLite and PostgreSQL."""
