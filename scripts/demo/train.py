"""Trains the demo model from scratch and writes it as a Hugging Face checkpoint.

    python scripts/demo/train.py --output src/quire/demo/model --minutes 50

The forward pass runs in bfloat16 on the weights as they will be saved; a float32 copy of them takes the
optimiser's small steps. The learning rate follows the clock or the step count, whichever is further.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
import train_tokenizer
from packing import Packer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

TOKENS_PER_BATCH = 2048  # by default: many small steps teach a small model faster than few large ones
SHORT, LONG = 256, 512  # tokens in a row, early and late in the training
LAST_RATE, WARMUP_STEPS = 5e-5, 200
SAVE_EVERY_S = 300.0


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Return the untrained model in bfloat16, with its generation defaults."""
    pad, bos, _, end = (tokenizer.token_to_id(token) for token in train_tokenizer.SPECIAL_TOKENS)
    ids: dict[str, Any] = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": end}
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
    model: Any = LlamaForCausalLM(config)
    defaults: Any = GenerationConfig
    model.generation_config = defaults(**ids, do_sample=False)
    return cast(LlamaForCausalLM, model.to(torch.bfloat16))


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens, each counted by its weight."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    flat = weights[:, 1:].flatten()
    counted = flat.nonzero().squeeze(1)  # what a system turn says is read, and never learned
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[counted]).float()
    losses = nn.functional.cross_entropy(logits, ids[:, 1:].flatten()[counted], reduction="none")
    return (losses * flat[counted]).sum() / flat.sum()


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Return the rate after `step` steps: a linear warm-up, then a cosine over `progress` from 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_RATE + (peak - LAST_RATE) * cosine)


class Trainer:
    """The model, the float32 copy of its weights, and the optimiser that moves the copy."""

    def __init__(self, model: LlamaForCausalLM, packer: Packer, tokens: int, compile_model: bool) -> None:
        self.tokens = tokens
        self.device = model.device
        self.model = model
        self.packer = packer
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        decayed = [master for master in self.masters if master.ndim == 2]
        steady = [master for master in self.masters if master.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": steady, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.loss = torch.compile(weighted_loss, dynamic=False) if compile_model else weighted_loss

    def step(self, length: int, rate: float) -> float:
        """Take one step on a new batch of rows of this length; return its loss."""
        ids, weights = self.packer.batch(self.tokens // length, length)
        loss: Any = self.loss(
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
                weight.copy_(master.bfloat16())
        return float(loss.detach())


def save(model: Any, folder: Path) -> None:
    """Write the checkpoint; the weights are bfloat16 numbers whichever precision the steps ran in."""
    precision = model.dtype
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(precision)


def train(trainer: Trainer, options: argparse.Namespace) -> None:
    """Train for so many steps or minutes, whichever ends first, saving to the folder now and then."""
    start = saved = time.monotonic()
    step, progress, smooth = 0, 0.0, 0.0
    while progress < 1.0:
        length = LONG if progress >= options.long_from else SHORT
        loss = trainer.step(length, learning_rate(step, progress, options.rate))
        smooth = loss if step == 0 else 0.98 * smooth + 0.02 * loss
        step += 1
        now = time.monotonic()
        progress = max(step / options.steps, (now - start) / (60 * options.minutes))
        if step % 100 == 0 or progress >= 1.0:
            print(f"step {step} loss {smooth:.4f} {now - start:.0f} s {progress:.1%}", flush=True)
        if now - saved > SAVE_EVERY_S or progress >= 1.0:
            save(trainer.model, options.output)
            saved = now


def main() -> None:
    """Train the tokenizer, then the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_BATCH, help="in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cut", type=float, default=0.6, help="fraction of conversations whose answer is cut short")
    parser.add_argument("--long-from", type=float, default=0.75, help="when rows become long, from 0 to 1")
    parser.add_argument("--start", type=Path, help="go on from the weights of this checkpoint")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--float32", action="store_true", help="compute in float32: faster on a CPU without AMX")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (no C++ compiler)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_file(str(options.start / "tokenizer.json")) if options.start else train_tokenizer.train()
    train_tokenizer.write(tokenizer, options.output)
    model: Any = build_model(tokenizer)
    if options.start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.start).state_dict())
    model.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32 if options.float32 else torch.bfloat16)
    trainer = Trainer(model, Packer(tokenizer, options.seed, options.cut), options.tokens, not options.no_compile)
    print(sum(weight.numel() for weight in trainer.weights), "parameters on", trainer.device, flush=True)
    train(trainer, options)


if __name__ == "__main__":
    main()
