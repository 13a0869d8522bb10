"""Marks of interruptions and bad time spans: a table of the kinds of marks, and functions that find marks in files."""
