import sys

from swinops.cli import main

sys.exit(main())
