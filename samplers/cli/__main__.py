"""`python -m samplers.cli`, where the `steer` script is not installed."""

import sys

from samplers.cli import main

sys.exit(main())
