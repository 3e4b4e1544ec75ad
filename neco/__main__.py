"""`python -m neco`."""

from neco.cli import import_path  # noqa: F401  # first, so that what follows is not taken from the working folder

# isort: split
from neco.cli.main import start

if __name__ == "__main__":
    start()
