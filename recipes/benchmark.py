"""Measures how fast an alternation is: `bissl-hf benchmark`, for `accelerate launch`."""

from bissl_hf.cli.benchmark import main

if __name__ == "__main__":
    main()
