"""Train a small GPT on a handful of sentences, and let it write.

    python examples/train_gpt.py
    python examples/train_gpt.py --steps 200 --prompt "The dog" --checkpoint my.safetensors

About half a minute on one core; `docs/en/teaching.md` explains every name in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.gpt import GPT, GPTTrainer, SimpleTokenizer, create_dataloaders, to_decoder
from llm_from_scratch.weights.folder import save_folder

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. "
    "A small model learns letters first, then words, then sentences. "
    "Attention lets every letter look back at all letters before it. "
    "The dog sleeps in the sun while the fox runs through the wood. "
    "What is learned by heart is not yet understood. "
    "The old tree by the river has seen many summers. "
    "Reading and writing are two sides of one coin. "
    "Every long journey begins with a single step. "
)


def train_small_gpt(
    steps: int = 500,
    device: str | None = None,
    seed: int = 0,
    prompt: str = "The quick",
    checkpoint: str | None = "gpt_checkpoint.pt",
    model_folder: str | None = None,
) -> tuple[GPT, SimpleTokenizer, dict[str, list[float]]]:
    """Train, print 100 characters that follow `prompt`, save; returns (model, tokenizer, losses).

    `checkpoint` is the file that training can go on from (safetensors, whatever its name), and
    `model_folder` a folder that the `scratchlm` commands and `transformers` read; None saves none.
    """
    torch.manual_seed(seed)
    text = SENTENCES * 100
    tokenizer = SimpleTokenizer(text)
    train_loader, val_loader = create_dataloaders(
        text, tokenizer, block_size=64, batch_size=8, train_split=0.9, seed=seed
    )
    model = GPT(tokenizer.vocab_size, n_embd=128, n_layer=4, n_head=4, block_size=64, dropout=0.1)
    trainer = GPTTrainer(
        model, train_loader, val_loader, learning_rate=1e-3, weight_decay=0.01,
        warmup_steps=min(100, steps // 10), max_steps=steps, grad_clip=1.0, device=device,
    )  # fmt: skip
    losses = trainer.train(log_interval=50, eval_interval=200)

    idx = torch.tensor([tokenizer.encode(prompt)], device=trainer.device)
    written = model.generate(idx, max_new_tokens=100, temperature=0.8, top_k=40)
    print(tokenizer.decode(written[0]))

    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
        print(f"Saved {checkpoint}")
    if model_folder is not None:
        save_folder(to_decoder(model), tokenizer.to_tokenizer(), Path(model_folder))
        print(f'Saved {model_folder}: scratchlm generate {model_folder} "{prompt}"')
    return model, tokenizer, losses


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a small GPT, and let it write.")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps (500)")
    parser.add_argument("--device", help="cuda, mps or cpu (the first that there is)")
    parser.add_argument("--seed", type=int, default=0, help="weights, data order and sampling (0)")
    parser.add_argument("--prompt", default="The quick", help='what to go on from ("The quick")')
    parser.add_argument("--checkpoint", default="gpt_checkpoint.pt", help="where to save")
    parser.add_argument("--model-folder", help="also save a folder that other commands read")
    given = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose when it is busy
    try:
        train_small_gpt(**vars(given))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
