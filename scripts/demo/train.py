"""Trains the demo model from scratch and writes it as a Hugging Face checkpoint.

    python scripts/demo/train.py --output src/quire/demo/model --minutes 50

The forward pass runs in bfloat16 on the weights as they will be saved; a float32 copy of them takes the
optimiser's small steps. The learning rate follows the clock or the step count, whichever is further.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import train_tokenizer
from packing import Packer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ROWS = 8  # in a batch: many small steps teach a small model faster than few large ones
SHORT, LONG = 256, 512  # tokens in a row, before and after LONG_FROM of the training
LONG_FROM = 0.75
PEAK_RATE, LAST_RATE, WARMUP_STEPS = 2e-3, 5e-5, 200
SAVE_EVERY_S = 300.0


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Return the untrained model in bfloat16, with its generation defaults."""
    special = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("pad", "bos", "im_end")}
    ids = {"pad_token_id": special["pad"], "bos_token_id": special["bos"], "eos_token_id": special["im_end"]}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
        **ids,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens, each counted by its weight."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def learning_rate(step: int, progress: float) -> float:
    """Return the rate after `step` steps: a linear warm-up, then a cosine over `progress` from 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_RATE + (PEAK_RATE - LAST_RATE) * cosine)


class Trainer:
    """The model, the float32 copy of its weights, and the optimiser that moves the copy."""

    def __init__(self, tokenizer: Tokenizer, seed: int, compile_model: bool) -> None:
        torch.manual_seed(seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = build_model(tokenizer).to(self.device)
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        decayed = [master for master in self.masters if master.ndim == 2]
        steady = [master for master in self.masters if master.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": steady, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
        self.loss = torch.compile(weighted_loss, dynamic=False) if compile_model else weighted_loss
        self.packer = Packer(tokenizer, seed)

    def step(self, length: int, rate: float) -> float:
        """Take one step on a new batch of rows of this length; return its loss."""
        ids, weights = self.packer.batch(ROWS, length)
        loss = self.loss(
            self.model, torch.from_numpy(ids).to(self.device), torch.from_numpy(weights).to(self.device)
        )
        loss.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)
        return float(loss.detach())


def train(trainer: Trainer, folder: Path, steps: int, minutes: float) -> None:
    """Train for so many steps or minutes, whichever ends first, saving to the folder now and then."""
    start = saved = time.monotonic()
    step, tokens, progress, smooth = 0, 0, 0.0, 0.0
    while progress < 1.0:
        length = LONG if progress >= LONG_FROM else SHORT
        loss = trainer.step(length, learning_rate(step, progress))
        smooth = loss if step == 0 else 0.98 * smooth + 0.02 * loss
        step += 1
        tokens += ROWS * length
        now = time.monotonic()
        progress = max(step / steps, (now - start) / (60 * minutes))
        if step % 100 == 0 or progress >= 1.0:
            print(f"step {step} loss {smooth:.4f} {tokens} tokens in {now - start:.0f} s {progress:.1%}", flush=True)
        if now - saved > SAVE_EVERY_S or progress >= 1.0:
            trainer.model.save_pretrained(folder)
            saved = now


def main() -> None:
    """Train the tokenizer, then the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (no C++ compiler)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer.train()
    train_tokenizer.write(tokenizer, options.output)
    trainer = Trainer(tokenizer, options.seed, not options.no_compile)
    print(sum(weight.numel() for weight in trainer.weights), "parameters on", trainer.device)
    train(trainer, options.output, options.steps, options.minutes)


if __name__ == "__main__":
    main()
