"""What tests of the data train with: a trainer of so many steps and nothing beside."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def train(module, data, folder, steps, resume=None, every=None, **settings):
    """Fits the module; `every` so many steps a checkpoint is kept in the folder."""
    callbacks = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)] if every else []
    trainer = Trainer(
        **{"max_steps": steps, "limit_val_batches": 0, **settings},
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(every),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer
