"""`python -m fabe_ds`: the command line."""

from fabe_ds.cli import main

if __name__ == "__main__":
    main()
