"""From what was observed to factors, one layer at a time."""
