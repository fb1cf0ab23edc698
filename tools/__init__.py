"""Command lines in front of the two halves, which do not import them, and what several of them share."""

import common  # noqa: F401 # before torch: sets how its threads wait
