"""`python -m vllm_shadowkv`, also installed as `vllm-shadowkv`."""

import sys

from vllm_shadowkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
