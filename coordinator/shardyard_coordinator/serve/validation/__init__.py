"""Rules that a request must meet before anything is done for it. Pure: no store, no files."""
