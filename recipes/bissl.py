"""Aligns a pre-trained backbone with a downstream task by BiSSL: `bissl-hf align`, for `accelerate launch`."""

from bissl_hf.cli.align import main

if __name__ == "__main__":
    main()
