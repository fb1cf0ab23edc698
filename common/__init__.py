"""The ground floor: what both halves and the command lines stand on, each thing once."""
