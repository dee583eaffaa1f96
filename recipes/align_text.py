"""Aligns a language model with a classification of texts: `bissl-hf align_text`, for `accelerate launch`."""

from bissl_hf.cli.align_text import main

if __name__ == "__main__":
    main()
