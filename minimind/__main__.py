"""`python -m minimind`: the `minimind` command, where it is not on the PATH."""

from minimind.cli import main

if __name__ == "__main__":
    main()
