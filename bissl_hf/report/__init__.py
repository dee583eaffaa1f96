"""A page on a run, `report.html`, from plain data."""
