"""`python -m jaxsoftmax`: trains digit classifiers and writes a page about their probabilities."""

import sys

from jaxsoftmax._demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
