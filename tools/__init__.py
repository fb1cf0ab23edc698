"""Thin command lines in front of the two halves; nothing imports them."""

import common  # noqa: F401 # before torch: how its threads wait is settled there
