"""What a dataset holds and shares: duplicates, leakage between splits, verification, the report."""
