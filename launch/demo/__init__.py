"""The demo simulates recordings, runs every stage on these recordings, and writes a report."""
