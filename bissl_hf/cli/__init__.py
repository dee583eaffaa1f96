"""What recipes share: arguments, data, models, the stage of pre-training, folders and tables."""
