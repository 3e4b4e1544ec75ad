"""Support that knows nothing of the project."""
