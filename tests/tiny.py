"""Words of the tiny tokenizers that several tests make."""

WORDS = ("name", "the", "capital", "of", "a", "country", "drug", ".", "3", "##s")
