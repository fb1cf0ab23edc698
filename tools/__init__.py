"""Thin command lines in front of the two halves, and the three leaf modules (errors, run_folder, launch) that both share."""
