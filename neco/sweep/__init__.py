"""How many jobs run, and survive."""
