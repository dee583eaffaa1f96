"""Classifies images into a CSV file: `bissl-hf predict`, for `accelerate launch`."""

from bissl_hf.cli.predict import main

if __name__ == "__main__":
    main()
