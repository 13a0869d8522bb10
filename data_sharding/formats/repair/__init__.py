"""Repairs of damaged headers. The damaged part is removed, so that the rest of the recording can be read."""
