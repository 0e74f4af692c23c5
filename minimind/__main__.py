"""`python -m minimind` runs the `minimind` command without PATH."""

from minimind.cli import main

if __name__ == "__main__":
    main()
