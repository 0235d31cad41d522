"""``python -m autopar``: the command line, for launchers that take a module (``torchrun -m autopar profile``)."""

from autopar.cli.main import entry

if __name__ == "__main__":
    entry()
