"""Trains both tasks jointly on one backbone: `bissl-hf joint`, for `accelerate launch`."""

from bissl_hf.cli.joint import main

if __name__ == "__main__":
    main()
