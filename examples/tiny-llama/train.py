"""Train the example model: a small Llama, and its tokenizer, on the data set `python-docs`.

    python examples/tiny-llama/train.py --out DIRECTORY

runs on a CPU, needs no network, and writes a directory that `AutoTokenizer` and
`AutoModelForCausalLM` load. In order:

1. train a byte-level BPE tokenizer on the train split;
2. train the model in float32 on windows of 512 tokens. Every epoch shuffles the documents and cuts
   the windows at a new offset, so that no two epochs see the same windows;
3. after each epoch measure the loss on the held-out split; whenever it is the lowest so far, save
   the weights, rounded to bfloat16. Stop when it has not fallen for `--patience` epochs;
4. load what was saved and print the held-out perplexity and bits per byte.

The directory is replaced file by file, so it holds a usable model from the first epoch on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from qtool.calibration import python_docs

CONTEXT = 512
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, layers: int, dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID)

    # Llama has no dropout on its residual branches; hooks add it for training and leave no trace in what is saved
    def drop(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):  # they add to the residual stream
            nn.init.normal_(projection.weight, std=config.initializer_range / math.sqrt(2 * layers))
    return model


def epoch_windows(documents: list[Tensor], generator: torch.Generator) -> Tensor:
    """Shuffled documents in windows of CONTEXT + 1 tokens, from a random offset, in random order."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    offset = int(torch.randint(CONTEXT, (1,), generator=generator))
    stream = torch.cat([documents[i] for i in order]).roll(-offset)
    windows = stream.unfold(0, CONTEXT + 1, CONTEXT)
    return windows[torch.randperm(len(windows), generator=generator)]


def loss_of(model: LlamaForCausalLM, tokens: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: Tensor, batch_size: int = 8) -> float:
    """Nats per predicted token, over windows that do not overlap; a window's first token is not predicted."""
    model.eval()
    total, count = 0.0, 0
    whole = len(stream) // CONTEXT * CONTEXT
    batches = list(stream[:whole].view(-1, CONTEXT).split(batch_size))
    if len(stream) - whole > 1:
        batches.append(stream[whole:].unsqueeze(0))
    for batch in batches:
        total += float(loss_of(model, batch, reduction="sum"))
        count += batch[:, 1:].numel()
    model.train()
    return total / count


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    with tempfile.TemporaryDirectory(dir=out, prefix=".saving-") as scratch:
        rounded.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        description = Path(scratch, "tokenizer_config.json")
        settings = json.loads(description.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.pop("backend", None)  # known to transformers 5 only; older ones load the class named here
        description.write_text(json.dumps(settings, indent=2) + "\n")
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12, help="length of the cosine schedule")
    parser.add_argument("--patience", type=int, default=3, help="epochs without a new lowest held-out loss")
    parser.add_argument("--batch-size", type=int, default=4, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)

    tokenizer = train_tokenizer(python_docs.texts("train"), args.vocab_size)
    documents = {split: [torch.tensor(tokenizer(text, verbose=False).input_ids) for text in python_docs.texts(split)]
                 for split in ("train", "test")}  # fmt: skip
    held_out = torch.cat(documents["test"])
    held_out_bytes = sum(len(text.encode()) for text in python_docs.texts("test"))
    tokens_per_epoch = sum(map(len, documents["train"]))
    model = build_model(len(tokenizer), args.layers, args.dropout)
    print(f"{model.num_parameters():,} parameters; {tokens_per_epoch:,} training tokens an epoch, "
          f"{len(held_out):,} held out", flush=True)  # fmt: skip

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    steps = args.epochs * (tokens_per_epoch // CONTEXT // args.batch_size)

    def rate(step: int) -> float:  # linear warm-up, then a cosine down to a twentieth
        if step < args.warmup:
            return (step + 1) / args.warmup
        return 0.525 + 0.475 * math.cos(math.pi * min(1.0, (step - args.warmup) / max(1, steps - args.warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    best, best_epoch, step, start = math.inf, 0, 0, time.monotonic()
    model.train()
    for epoch in range(1, args.epochs + 1):
        losses = []
        for batch in epoch_windows(documents["train"], generator).split(args.batch_size):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            step += 1
        loss_held_out = mean_loss(model, held_out)
        print(f"epoch {epoch:3}  step {step:6}  train {sum(losses) / len(losses):.4f}  held out {loss_held_out:.4f}"
              f"  {(time.monotonic() - start) / 60:.1f} min", flush=True)  # fmt: skip
        if loss_held_out < best:
            best, best_epoch = loss_held_out, epoch
            save(model, tokenizer, args.out)
        elif epoch - best_epoch >= args.patience:
            break

    final = mean_loss(AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32), held_out)
    bits_per_byte = final / math.log(2) * len(held_out) / held_out_bytes
    print(f"epoch {best_epoch}, weights in bfloat16: held-out loss {final:.4f}, perplexity {math.exp(final):.2f}, "
          f"{bits_per_byte:.4f} bits per byte")  # fmt: skip


if __name__ == "__main__":
    main()
