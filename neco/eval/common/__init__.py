"""What several evaluations compute with."""
