"""Repairs of damaged headers: the broken part is left out, so that the rest of the recording can be read."""
