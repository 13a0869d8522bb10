"""Frozen networks that judge images: their structure, their weights from files, and where the files are found."""
