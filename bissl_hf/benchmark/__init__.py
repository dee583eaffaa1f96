"""How fast an alternation is, part by part, beside a plain baseline and beside its own arithmetic."""
