"""The tokenizer of tiny random BERTs."""

import pytest

from tests.tiny import WORDS


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    return folder


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    from transformers import BertTokenizerFast

    return BertTokenizerFast.from_pretrained(vocabulary)
