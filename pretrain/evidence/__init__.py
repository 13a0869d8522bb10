"""Evidence that a score comes from the response to the picture: statistics, controls and written rules."""
