"""Measures what the features of checkpoints are worth: `bissl-hf analyze`, for `accelerate launch`."""

from bissl_hf.cli.analyze import main

if __name__ == "__main__":
    main()
