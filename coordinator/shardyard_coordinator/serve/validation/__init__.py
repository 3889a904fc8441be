"""What a request must be like before anything is done for it. Pure: no store, no files."""
