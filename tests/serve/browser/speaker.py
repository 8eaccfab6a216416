"""A tiny chat model that says sentences one can foresee, with everything else a model has.

Its embedding gives every token a direction of its own and its output layer knows which token
follows which, so it is a bigram table; attention and feed-forward layers are random and quiet. It
answers `ANSWER` to everything. In the place of "sleep" it finds "dream" second best, and who goes
on from there gets `OTHER`. Every token of both stands once, and two characters are made of bytes.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.chat_template import CHATML
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.folder import save_folder

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
ANSWER = "Stars shine while we sleep. 星は静かに光る🙂"
OTHER = "Stars shine while we dream of cats!"
FORK, BRANCH = " sleep", " dream"
WORDS = "user assistant system Stars shine while we sleep dream of cats star shines"
FIRST, SECOND = 24.0, 11.0  # logits: the second best is never drawn by chance, but is to be seen


@cache
def speaker_tokenizer() -> Tokenizer:
    text = f"{WORDS} {WORDS.replace(' ', '. ')} 星は静かに光る。猫は夢を見る。\n" * 20
    tokenizer = train_tokenizer([text], vocab_size=370, special=SPECIAL, language="ja")
    tokenizer.config |= {"eos_token": "<|im_end|>", "chat_template": CHATML}
    return tokenizer


def follows(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """What comes after which token: the likeliest, then the next best."""
    (start,) = tokenizer.encode("\n")  # with which the assistant's header ends
    after: dict[int, list[int]] = {}
    for sentence in (ANSWER, OTHER):
        ids = [start, *tokenizer.encode(sentence), *tokenizer.stop_ids]
        assert len(set(ids)) == len(ids), f"a token stands twice in {sentence!r}"
        for one, then in pairwise(ids):
            known = after.setdefault(one, [])
            if then not in known:
                known.append(then)
    return after


def make_speaker(tokenizer: Tokenizer) -> Decoder:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=384, n_layers=3, n_heads=4, n_kv_heads=2,
        head_dim=16, d_ff=40, max_seq_len=512, tie_embeddings=False,
    )  # fmt: skip
    assert config.vocab_size <= config.d_model
    model = Decoder(config)
    random = torch.Generator().manual_seed(1)
    size = config.d_model**-0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                loud = 1.5 if name.endswith(("q.weight", "k.weight")) else 0.05
                parameter.normal_(0.0, loud * size, generator=random)
        model.embedding.weight.copy_(torch.eye(config.vocab_size, config.d_model))
        head = model.head.weight
        head.normal_(0.0, 0.5 * size, generator=random)
        for token, then in follows(tokenizer).items():
            for logit, other in zip((FIRST, SECOND), then, strict=False):
                head[other, token] = logit * size
    return model.eval()


def save_speaker(folder: Path) -> Path:
    """The model as a folder that `scratchlm serve` opens."""
    tokenizer = speaker_tokenizer()
    save_folder(make_speaker(tokenizer), tokenizer, folder)
    return folder
