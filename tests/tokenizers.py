"""A tokenizer trained in the test: real, tiny, and needs no network."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def train_tokenizer(
    folder, texts=(), *, vocab_size: int = 300, chat: bool = True
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`, save it to `folder`, and return it.

    Ids 0-2 are <|endoftext|> (padding), <|im_start|> and <|im_end|> (end of sequence); the 256
    bytes follow, then merges up to `vocab_size`, which without texts stays at 259.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=STOP,
        pad_token=END,
        additional_special_tokens=[START],
    )
    tokenizer.chat_template = CHATML if chat else None
    tokenizer.save_pretrained(Path(folder))
    return tokenizer
