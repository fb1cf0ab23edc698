"""The report: every table and figure of the study, from whatever runs there are."""
