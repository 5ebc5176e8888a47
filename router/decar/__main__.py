"""`python -m decar` is `decar`."""

from decar.server.cli import main

if __name__ == "__main__":
    main()
