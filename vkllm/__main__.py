"""`python -m vkllm`: the command line."""

from vkllm.cli import main

main()
