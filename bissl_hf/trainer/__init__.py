"""The trainers, their arguments, optimizers and callbacks."""
