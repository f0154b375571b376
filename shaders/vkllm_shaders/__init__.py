"""Kernels of vkllm, written in vkllm_codegen's language: one family a file, with float64 oracles. It knows nothing of devices."""
