"""Model cards: the README.md that tells what lies beside it, how it was made and how good it is."""
