"""The command line: entry, help, what is wrong with it."""
