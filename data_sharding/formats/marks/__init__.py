"""Marks of interruptions and of bad spans: the table of all marks, and functions that find them in files."""
