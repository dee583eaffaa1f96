"""Model cards: the README.md that says which files are beside it, how they were made and how good the model is."""
