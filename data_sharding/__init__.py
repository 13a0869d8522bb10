"""Converts EEG recordings to a dataset of WebDataset shards, and reads the samples of such a dataset."""
