"""Copies of what is elsewhere: objects of an S3 store, and private models of the Hub."""
