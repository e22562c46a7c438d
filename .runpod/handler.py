"""Starts the worker; RunPod Hub looks for a file of this name."""
import sys

from diffusion_workers.handler import main

if __name__ == "__main__":
    sys.exit(main())
