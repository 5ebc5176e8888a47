"""`python -m decar.training` is `decar-train`."""

from decar.training.cli import main

if __name__ == "__main__":
    main()
