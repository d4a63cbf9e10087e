"""`make chaos-update`: weight updates under load and faults, every token of every answer judged."""
