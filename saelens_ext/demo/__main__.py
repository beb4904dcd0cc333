"""``python -m saelens_ext.demo``: the tour."""

import sys

from saelens_ext.demo.tour import main

if __name__ == "__main__":
    sys.exit(main())
