"""Repairs of damaged headers.

The damaged part of a header is removed or replaced, so that the rest of the recording can be read.
"""
