"""The sync client, made from the async one by `generate_sync.py`."""
