"""Two tokenizers are one only if every id is the same token to both."""

import logging

import pytest

from megatron_opd.vocabulary import same_tokenizer, vocab_size
from tests.tokenizers import train_tokenizer


def test_tokenizers_are_compared_id_by_id(tmp_path, caplog):
    one = train_tokenizer(tmp_path / "a")
    same = train_tokenizer(tmp_path / "b")
    same_tokenizer(one, same)
    assert vocab_size(one) == 259

    spoken = train_tokenizer(tmp_path / "c", ["abab abab"] * 9, vocab_size=262)
    with pytest.raises(ValueError, match=r"3 token ids differ .*259: None vs 'ab'"):
        same_tokenizer(one, spoken)
    with caplog.at_level(logging.WARNING):
        same_tokenizer(one, spoken, allow=True)
    assert "3 token ids differ" in caplog.text

    # as R1-Distill-Qwen does: special tokens that changed places at an equal vocabulary size
    saved = (tmp_path / "a" / "tokenizer.json").read_text()
    swapped = saved.replace("<|im_start|>", "<swap>").replace("<|im_end|>", "<|im_start|>")
    (tmp_path / "a" / "tokenizer.json").write_text(swapped.replace("<swap>", "<|im_end|>"))
    renamed = type(one)(tokenizer_file=str(tmp_path / "a" / "tokenizer.json"))
    assert vocab_size(renamed) == vocab_size(one)
    with pytest.raises(ValueError) as raised:
        same_tokenizer(one, renamed)
    assert "2 token ids differ" in str(raised.value) and "\n" not in str(raised.value)
    assert "1: '<|im_start|>' vs '<|im_end|>'" in str(raised.value)
    assert "teacher.allow_tokenizer_mismatch" in str(raised.value)
