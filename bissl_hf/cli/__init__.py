"""The commands, one module each, and what they share: arguments, data, models, tasks, folders and tables."""
