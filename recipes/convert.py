"""Converts released weights into a checkpoint, and back: `bissl-hf convert`, for `accelerate launch`."""

from bissl_hf.cli.convert import main

if __name__ == "__main__":
    main()
