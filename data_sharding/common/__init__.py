"""Code that all packages share: errors and exit codes, configs, files, storage, progress."""
