"""Thin command lines in front of the two halves; nothing imports them."""
