"""File formats of EEG recordings. All formats are read through one interface, `signal.Signal`."""
