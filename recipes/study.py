"""Compares BiSSL with the conventional pipeline: `bissl-hf study`, for `accelerate launch`."""

from bissl_hf.cli.study import main

if __name__ == "__main__":
    main()
