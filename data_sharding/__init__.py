"""Recordings to a dataset of WebDataset shards, and reading it back."""
