"""Hugging Face transformers: our attention in a small Llama, our optimizer in its Trainer."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastopt.integrations.transformers  # registers attn_implementation="fastopt"

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, attn_implementation="fastopt",
)  # fmt: skip
model = LlamaForCausalLM(config)

# Sequences that count upwards, each from a place of its own.
tokens = (torch.randint(64, (256, 1)) + torch.arange(24)) % 64
rows = [{"input_ids": row, "labels": row} for row in tokens]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=16, logging_steps=8,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    adamw = (fastopt.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.01})
    Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=adamw).train()

print(fastopt.explain(model, tokens[:1]))
