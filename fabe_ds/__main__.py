"""`python -m fabe_ds`, and the commands: the command line, which takes a moment to be read."""

import sys

INTERRUPTED = 130  # as in errors.py, which is not read yet


def main() -> None:
    """Entry point of the commands."""
    try:
        from fabe_ds.cli.main import main as command
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    command()


if __name__ == "__main__":
    main()
