"""vkllm: run large language models on any Vulkan device from Python."""

__version__ = "0.1.0"
