"""A comparison of ways from the pretext task to the downstream task, run part by part: the plan, its parts, the
statistics and the report."""
