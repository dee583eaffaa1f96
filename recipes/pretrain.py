"""Pre-trains a backbone on images without labels: `bissl-hf pretrain`, for `accelerate launch`."""

from bissl_hf.cli.pretrain import main

if __name__ == "__main__":
    main()
