"""CLIP's byte-pair encoding, trained on the words of the captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from freq_loss_plugin.toy_model.scenes import STYLES, random_scene

MAX_LENGTH = 77


def load_or_make_tokenizer(folder: Path, captions: Sequence[str] = (), max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """The tokenizer in ``folder``; trained first where there is none, on ``captions`` or those of scenes.

    Two runs of the trainer number the tokens differently, so all stages and resumed runs have to use the same files.
    """
    if not (folder / "merges.txt").is_file():
        _train(folder, captions or _captions())
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length, pad_token="<|endoftext|>"
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> Tensor:
    """Shape (B, 77)."""
    padded = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return padded.input_ids.to(device)


def _captions() -> list[str]:
    generator = np.random.default_rng(0)
    return [random_scene(generator).caption() for _ in range(2000)] + [f"{style} style" for style in STYLES]


def _train(folder: Path, captions: Sequence[str]) -> None:
    """Merge until every word of the captions is one token; other words are spelled out."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The characters are words, too, so that each has a token for the end of a word.
    words = {*characters, *(word for caption in captions for word in caption.split())}
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than there are merges
        end_of_word_suffix="</w>",
        initial_alphabet=characters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(words), trainer)
    vocabulary = tokenizer.get_vocab()
    # The end of the text has the highest number, as in CLIP: some text encoders find it by that.
    vocabulary |= {token: len(vocabulary) + place for place, token in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
