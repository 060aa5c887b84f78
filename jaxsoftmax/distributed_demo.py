"""`python -m jaxsoftmax.distributed_demo`: one model, trained by several processes together."""

import sys

from jaxsoftmax._distributed.cli import main

if __name__ == "__main__":
    sys.exit(main())
