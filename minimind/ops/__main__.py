"""`python -m minimind.ops` prints which native operators were built, and why others are missing."""

from minimind.ops.native import report

if __name__ == "__main__":
    print(report())
