"""Stores decoded signals on disk, so that a later job does not decode the same recordings again."""
