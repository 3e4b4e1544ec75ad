"""Several processes and their devices."""
