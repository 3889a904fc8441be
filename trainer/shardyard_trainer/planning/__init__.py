"""From a spec to what it would do, before anything runs."""
