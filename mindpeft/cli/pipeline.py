"""A recipe's whole run: data, model, adapter, training, final metrics, and the files of the run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindpeft.cli.answering import Answering, AnsweringCallback
from mindpeft.cli.datasets import Dataset, Splits, load_splits, row_length, to_features
from mindpeft.cli.model_loading import head_of_task, load_model, padding_id
from mindpeft.cli.run_folder import LABELS_FILE, METRICS_FILE, RECIPE_FILE
from mindpeft.console import logger
from mindpeft.data.batching import BucketBatcher
from mindpeft.data.conversations import ConversationDataset
from mindpeft.data.encoding import Features
from mindpeft.data.masking import TokenMasker
from mindpeft.data.tokenization import AutoTokenizer, Tokenizer
from mindpeft.device import setup_device
from mindpeft.errors import InputError
from mindpeft.files import write_json
from mindpeft.peft_model import PeftModel, get_peft_model
from mindpeft.recipe import Recipe
from mindpeft.train import Trainer, TrainerCallback, TrainingArguments
from mindpeft.train.batches import make_batches
from mindpeft.train.checkpoints import find_checkpoint, list_checkpoints
from mindpeft.tuners.eva import initialize_lora_eva_weights

if TYPE_CHECKING:
    from mindpeft.config import PeftConfig
    from mindpeft.models.pretrained import PreTrainedModel

Metrics = dict[str, dict[str, Any]]


class RunFilesCallback(TrainerCallback):
    """Writes the resolved recipe and the label map when training begins: a checkpoint needs them too."""

    def __init__(self, recipe: Recipe, splits: Splits):
        self.recipe, self.label_map = recipe, splits.label_map

    def on_train_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        self.recipe.save(folder / RECIPE_FILE)
        if self.label_map is not None:
            self.label_map.save(folder / LABELS_FILE)


def run_recipe(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Metrics:
    """Train, measure and save what a recipe describes.

    Args:
        recipe: what to do.
        overwrite: write into an output folder that is not empty.
        resume: go on from the last checkpoint in it.

    Returns:
        the metrics of ``train``, ``eval`` and ``test`` as far as there are such parts; ``metrics.json`` holds
        them too.

    Raises:
        InputError: something about recipe, data, model or output folder is wrong; nothing was written then,
            unless training had begun.
    """
    stages = recipe.stage_recipes()
    _check_output_dir(recipe, stages, overwrite, resume)
    splits = [load_splits(stage.data, recipe.seed) for stage in stages]
    previous: Path | None = None
    for number, stage in enumerate(stages, 1):
        last = number == len(stages)
        if resume and not last and (Path(stage.output_dir) / METRICS_FILE).is_file():
            logger.info("stage %d of %d is done", number, len(stages))
        else:
            if not last:
                logger.info("stage %d of %d", number, len(stages))
            args = _arguments(stage, overwrite or len(stages) > 1, resume)
            metrics = _run_stage(recipe, stage, args, splits[number - 1], previous)
        previous = Path(stage.output_dir)
    return metrics


def _run_stage(
    recipe: Recipe, stage: Recipe, args: TrainingArguments, splits: Splits, previous: Path | None
) -> Metrics:
    """Train, measure and save one stage, going on from the folder of the one before it."""
    setup_device(recipe.device, recipe.device_id, seed=recipe.seed)
    folder = recipe.model.folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _build_model(stage, splits, folder, previous)
    padding_id(model, tokenizer)
    max_length = row_length(stage.data, stage.data.task, model.config, tokenizer)

    def batches(dataset: Dataset | None, training: bool = False) -> Features | BucketBatcher | None:
        if dataset is None:
            return None
        features = to_features(dataset, tokenizer, max_length, stage.data)
        return (
            _masked(features, stage, args, tokenizer, training) if dataset.task == "masked_lm" else features
        )

    parts = {"eval": batches(splits.eval), "test": batches(splits.test)}
    train = batches(splits.train, training=True)
    _begin_with_data(model, stage, train, args, tokenizer)
    looked_at = splits.eval if splits.eval is not None else splits.test
    callbacks: list[TrainerCallback] = [RunFilesCallback(recipe, splits)]
    if stage.generation is not None and isinstance(looked_at, ConversationDataset):
        answering = Answering(looked_at.examples, stage.generation, stage.data, tokenizer)
        callbacks.append(AnsweringCallback(answering))
    trainer = Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=parts["eval"] if parts["eval"] is not None else parts["test"],
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    with _removed_if_empty(Path(args.output_dir)):
        metrics = {"train": trainer.train().metrics}
    for name, part in parts.items():
        if part is not None:
            metrics[name] = trainer.evaluate(part, metric_key_prefix=name)
    write_json(Path(args.output_dir) / METRICS_FILE, metrics)
    return metrics


def _arguments(stage: Recipe, overwrite: bool, resume: bool) -> TrainingArguments:
    changes: dict[str, Any] = {}
    if overwrite:
        changes["overwrite_output_dir"] = True
    if resume and list_checkpoints(Path(stage.output_dir)):
        changes["resume_from_checkpoint"] = True
    return stage.training_arguments(**changes)


def _check_output_dir(recipe: Recipe, stages: list[Recipe], overwrite: bool, resume: bool) -> None:
    """Refuse before the slow work begins, as the trainer would after it."""
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output folder {folder} is a file")
    if resume:
        begun = [stage for stage in stages if list_checkpoints(Path(stage.output_dir))]
        ended = any((Path(stage.output_dir) / METRICS_FILE).is_file() for stage in stages[:-1])
        if not begun and not ended:
            find_checkpoint(folder, True)  # says that there is nothing to resume
        return
    if overwrite:
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"the output folder {folder} is not empty: choose another, or use --overwrite to replace the run "
            f"in it or --resume to go on with it"
        )


def _build_model(recipe: Recipe, splits: Splits, folder: Path, previous: Path | None = None) -> PeftModel:
    task = recipe.data.task
    model = load_model(
        folder, head_of_task(task), label_map=splits.label_map, task=task, dtype=recipe.model.dtype
    )
    configs = recipe.peft_configs()
    _save_fresh_cells(model, configs)
    if previous is None:
        return get_peft_model(model, configs)
    peft_model = PeftModel.from_pretrained(model, previous, is_trainable=True)
    peft_model.extend_adapter("default", configs)
    return peft_model


def _begin_with_data(
    model: PeftModel,
    stage: Recipe,
    features: Features | BucketBatcher,
    args: TrainingArguments,
    tokenizer: Tokenizer,
) -> None:
    """Run EVA over the training data, if the stage's adapter begins so; a resumed run needs its ranks too."""
    kinds = [getattr(config, "init_lora_weights", None) for config in stage.peft_configs()]
    if "eva" not in kinds:
        return
    logger.info("EVA: looking at what the adapted cells are given")
    data = make_batches(
        features,
        args.per_device_train_batch_size,
        pad_token_id=tokenizer.pad_token_id or 0,
        max_buckets=args.max_buckets,
        max_length=args.max_length,
        shuffle=True,
        seed=args.seed,
    )
    data.set_epoch(0)
    initialize_lora_eva_weights(model, data)


def _save_fresh_cells(model: PreTrainedModel, configs: list[PeftConfig]) -> None:
    """Have the cells trained and saved that are random, since nobody could use the adapter without them."""
    saved = {name for config in configs for name in getattr(config, "modules_to_save", None) or []}
    missing = [
        cell for cell in _fresh_cells(model) if cell.rpartition(".")[2] not in saved and cell not in saved
    ]
    keeper = next((config for config in configs if hasattr(config, "modules_to_save")), None)
    if missing and keeper is not None:
        logger.info("not in the checkpoint, so trained and saved whole: %s", ", ".join(missing))
        keeper.modules_to_save = [*(keeper.modules_to_save or []), *missing]


def _fresh_cells(model: PreTrainedModel) -> list[str]:
    """The cells of which the checkpoint held nothing."""
    fresh = set(model.load_report.newly_initialised)
    names = {id(parameter): name for name, parameter in model.parameters_and_names()}
    cells = dict(model.cells_and_names())
    owners = dict.fromkeys(name.rpartition(".")[0] for name in model.load_report.newly_initialised)
    return [
        path for path in owners if all(names[id(value)] in fresh for value in cells[path].get_parameters())
    ]


def _masked(
    features: Features, recipe: Recipe, args: TrainingArguments, tokenizer: Tokenizer, training: bool
) -> BucketBatcher:
    """Batches whose tokens to predict are chosen anew in each epoch."""
    batch_size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
    return BucketBatcher(
        features,
        batch_size,
        pad_token_id=tokenizer.pad_token_id or 0,
        max_buckets=args.max_buckets,
        max_length=args.max_length,
        shuffle=training,
        seed=args.seed,
        transform=TokenMasker(tokenizer, recipe.data.mask_probability),
    )


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """A run that fails before it wrote anything leaves no folder behind."""
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
