"""The parts of a tokenizer: typed metadata, words (splits), merges (bpe, spm), special tokens. `vkllm.tokenizer` joins them."""
