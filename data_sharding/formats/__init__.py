"""File formats of EEG recordings, which all are read through one interface (`signal.Signal`)."""
