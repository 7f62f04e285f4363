"""A small sentencepiece tokenizer with the special tokens of umT5, for tests and demos."""

import io
from collections.abc import Iterable

import sentencepiece


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The serialized model of a BPE tokenizer, for `SentencePieceProcessor(model_proto=...)`.

    Bytes back up every character the texts lack, so any language encodes. They take 256 pieces, so with the
    letters of the texts 300 is about the smallest `vocab_size`.
    A corpus too small for `vocab_size` pieces gives fewer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
