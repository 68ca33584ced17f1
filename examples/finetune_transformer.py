"""The Trainer of transformers with natural gradients: a small BERT that learns to count.

    pip install transformers accelerate
    python examples/finetune_transformer.py

The model has random weights, so that nothing is downloaded; one from the hub may take its place.
The optimizer runs on its defaults. The likelihood is recognised, padding is read off the attention
mask, and clipping and the schedule are the Trainer's.
"""

import os
import sys
import tempfile

import torch

import nngeo_lazy as ng

os.environ.setdefault("HF_HUB_OFFLINE", "1")
try:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
except ImportError:
    sys.exit("needs transformers and accelerate: pip install transformers accelerate")


def sentences(count, seed):
    """Sentences of 8 to 16 tokens; the label says how many of the first four are below 50."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(8, 17, (), generator=generator))
        ids = torch.randint(1, 100, (16,), generator=generator)
        mask = (torch.arange(16) < length).long()
        label = (ids[:4] < 50).sum()
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": label})
    return found


def main():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=100, intermediate_size=128, num_labels=5, **sizes)
    model = BertForSequenceClassification(config)
    optimizer = ng.optim.NaturalGradient(model, "ekfac", weight_decay=1e-4, seed=0)

    steps = 200
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                max_grad_norm=1.0,
                logging_steps=50,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=sentences(2000, 0),
            eval_dataset=sentences(500, 1),
            optimizers=(optimizer, scheduler),
            compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    for name in ("eval_loss", "eval_accuracy"):
        print(f"{name}: {before[name]:.3f} before, {after[name]:.3f} after {steps} steps")
    if not after["eval_loss"] < before["eval_loss"]:
        raise SystemExit("the loss does not fall")


if __name__ == "__main__":
    main()
