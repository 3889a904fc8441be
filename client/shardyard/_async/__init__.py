"""The async client, written by hand; `generate_sync.py` makes the sync twin of it."""
