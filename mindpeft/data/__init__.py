"""Reading, tokenising and batching of data."""
