"""What every part needs: errors and exit codes, configs, files, storage, progress."""
