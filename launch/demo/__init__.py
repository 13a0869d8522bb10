"""The demo: it simulates recordings, runs every stage on them, and writes a report."""
