"""A recipe's `train:` section in the words of the stock trainer."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from indexer_train import processes
from indexer_train.config import TrainConfig
from indexer_train.data.batches import DocumentBatchSampler


def training_arguments(config: TrainConfig, out: Path, steps: int) -> SentenceTransformerTrainingArguments:
    """steps: of one epoch. Checkpoints go to `out`/checkpoints, one at every evaluation; the best and the last stay."""
    every = config.eval_epochs * steps
    cuda = torch.cuda.is_available()
    on_host = config.batches == "host"
    workers = processes.workers(config.workers, cuda) if on_host else 0
    return SentenceTransformerTrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.windows_per_document,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        gradient_accumulation_steps=config.accumulation,
        max_grad_norm=config.clip,
        bf16=config.precision == "bfloat16",
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        batch_sampler=DocumentBatchSampler,
        router_mapping={"query": "query", "document": "document"},
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{config.choose}",
        greater_is_better=config.choose == "mass_recall",
        logging_steps=every,
        logging_nan_inf_filter=False,  # it would wait for the GPU in every step
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=cuda and on_host,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        accelerator_config={"non_blocking": cuda},
        report_to=list(config.report_to),
        remove_unused_columns=False,
        seed=config.seed,
    )
