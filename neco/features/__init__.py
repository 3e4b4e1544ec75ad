"""Images to patch features, once."""
