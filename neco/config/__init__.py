"""From a composed configuration to validated objects."""
