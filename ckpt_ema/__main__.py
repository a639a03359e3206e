"""`python -m ckpt_ema`."""

from ckpt_ema.cli import main

if __name__ == "__main__":
    main()
