"""`python -m padfree.cli`."""

import sys

from padfree.cli.convert import main

sys.exit(main())
