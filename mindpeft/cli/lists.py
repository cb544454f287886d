"""``mindpeft models`` and ``mindpeft methods``: what there is."""

from __future__ import annotations

from rich.table import Table

from mindpeft.console import out


def models() -> None:
    """List the supported model types and their task heads.

    \b
    Examples:
      mindpeft models
      mindpeft models | cut -d' ' -f1
    """
    from mindpeft.models.auto import MODEL_FILES, architecture

    rows = [(name, ", ".join(architecture(name, "mindpeft models").HEADS)) for name in sorted(MODEL_FILES)]
    out.print(_table("model_type", "heads", rows))


def methods() -> None:
    """List the fine-tuning methods that a recipe can name.

    \b
    Examples:
      mindpeft methods
      mindpeft train recipe.yaml peft.method=lora peft.r=16
    """
    from mindpeft.config import supported_methods
    from mindpeft.recipe import method_name

    found = sorted(supported_methods().items())
    rows = [(method_name(method.value), _first_line(config)) for method, config in found]
    out.print(_table("method", "its config", rows))


def _first_line(config_class: type) -> str:
    return f"{config_class.__name__}: {(config_class.__doc__ or '').strip().partition(chr(10))[0]}"


def _table(first: str, second: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=out.is_terminal)
    table.add_column(first, no_wrap=True)
    table.add_column(second, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
