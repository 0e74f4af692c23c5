"""Run the `minimind` command as `python -m minimind`."""

from minimind.cli import main

if __name__ == "__main__":
    main()
