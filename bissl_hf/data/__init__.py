"""Data sets by name, decoded images, on-device views and the order in which examples are read."""
