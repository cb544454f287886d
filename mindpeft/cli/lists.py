"""``mindpeft models`` and ``mindpeft methods``: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mindpeft.console import out
from mindpeft.errors import InputError

if TYPE_CHECKING:
    from mindpeft.config import PeftConfig
    from mindpeft.tuners.plan import BaseModel, Plan


def models() -> None:
    """List the supported model types and their task heads.

    \b
    Examples:
      mindpeft models
      mindpeft models | cut -d' ' -f1
    """
    from mindpeft.models.auto import MODEL_FILES, architecture

    rows = [(name, ", ".join(architecture(name, "mindpeft models").HEADS)) for name in sorted(MODEL_FILES)]
    out.print(_table(("model_type", "heads"), rows))


def methods(
    base: Annotated[
        Path | None, typer.Option(help="A checkpoint folder: what each method trains of that model.")
    ] = None,
    task: Annotated[str, typer.Option(help="A recipe's data.task, which decides the head.")] = (
        "single_label_classification"
    ),
) -> None:
    """List the fine-tuning methods that a recipe can name.

    With --base: the numbers that each trains with its default settings (head included), its share of the
    model, whether it merges into the base's weights, and whether Hugging Face PEFT opens its files.

    \b
    Examples:
      mindpeft methods
      mindpeft methods --base bert-base
      mindpeft train recipe.yaml peft.method=lora peft.r=16
    """
    from mindpeft.config import supported_methods
    from mindpeft.recipe_peft import method_name

    found = sorted((method_name(method.value), config) for method, config in supported_methods().items())
    if base is None:
        out.print(_table(("method", "its config"), [(name, _first_line(config)) for name, config in found]))
        return
    model = _bare_model(base, task)
    header = ("method", "trainable", "share, %", "merges", "opens in PEFT")
    out.print(_table(header, [(name, *_facts(config, model, task)) for name, config in found]))


def _first_line(config_class: type) -> str:
    return f"{config_class.__name__}: {(config_class.__doc__ or '').strip().partition(chr(10))[0]}"


def _bare_model(folder: Path, task: str) -> BaseModel:
    """The model of a folder's ``config.json``, its weights not read."""
    from mindpeft import models as architectures
    from mindpeft.cli.model_loading import head_of_task
    from mindpeft.data.text_dataset import TASKS
    from mindpeft.models.auto import AutoConfig
    from mindpeft.recipe_values import check_choice
    from mindpeft.tuners.plan import BaseModel

    check_choice("--task", task, TASKS)
    return BaseModel(
        getattr(architectures, head_of_task(task)).from_config(AutoConfig.from_pretrained(folder))
    )


def _facts(config_class: type[PeftConfig], model: BaseModel, task: str) -> tuple[str, ...]:
    """The columns of a method's row."""
    from mindpeft.recipe import TASK_TYPES

    opens = "yes" if config_class.IN_PEFT else "no"
    try:
        plan = model.plan(config_class(task_type=TASK_TYPES.get(task, "SEQ_CLS"), **config_class.EXAMPLE))
    except InputError:
        return ("-", "-", "-", opens)  # nothing in this model by default: it wants target_modules
    trainable = plan.trainable + model.count(plan.replaced)
    total = model.size + plan.trainable + model.count(plan.copies)
    return (f"{trainable:,}", f"{100 * trainable / total:.2f}", "yes" if _merges(plan) else "no", opens)


def _merges(plan: Plan) -> bool:
    from mindpeft.tuners.base import TunerLayer

    try:
        for path, kind in plan.classes.items():
            if issubclass(kind, TunerLayer):
                kind.check_merge(plan.sites[path])
    except InputError:
        return False
    return True


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=out.is_terminal or len(header) > 2)
    for number, name in enumerate(header):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
