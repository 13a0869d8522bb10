"""Keeps decoded signals on disk, so that a later job does not decode the files of the recordings again."""
