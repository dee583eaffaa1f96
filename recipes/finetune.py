"""Fine-tunes an image classifier: `bissl-hf finetune`, for `accelerate launch`."""

from bissl_hf.cli.finetune import main

if __name__ == "__main__":
    main()
