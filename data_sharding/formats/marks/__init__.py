"""Marks of interruptions and of bad time spans: a table of all marks, and functions that find marks in files."""
