"""Running adapters outside of transformers: inference engines that serve them."""
