"""Models from the Hugging Face hub: pulled into a folder of our own, listed, removed, and found by name.

    store      what has been pulled, and where it lies; needs no network
    remote     a repository on the hub: its files with their hashes, and which of them make the model that was asked for
    licence    which models must be accepted before they are used, and what people are shown first
    download   one file: resumed, checked against its hash, never seen half-written
    pull       all of it in order

Only safetensors, GGUF, JSON and chat templates are fetched: files that cannot run code.
"""
