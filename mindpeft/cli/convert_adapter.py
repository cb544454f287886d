"""``mindpeft convert-adapter``: an adapter of another project becomes one of Hugging Face PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mindpeft.cli.output import check_output
from mindpeft.console import out


def convert_adapter(
    src: Annotated[Path, typer.Argument(help="An adapter's folder, or a .ckpt file.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[str, typer.Option(help="peft, or adapterhub (bottleneck adapters, fusions).")] = "peft",
    lora_alpha: Annotated[float | None, typer.Option(help="Of a .ckpt, which does not say it.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model's name or folder, to be noted.")] = None,
    prefix: Annotated[str, typer.Option(help='Put before cell names, such as "bert.".')] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it isn't empty.")] = False,
) -> None:
    """Convert an adapter to Hugging Face PEFT's format.

    SRC is a folder of PEFT (rewritten as safetensors with today's keys), of AdapterHub's adapters
    (bottleneck, fusion, LoRA, (IA)3, prefix, and unions of them), of mlx-lm, or a .ckpt of MindPet or
    mindformers. What has no equal is refused with the reason.

    \b
    Examples:
      mindpeft convert-adapter mlx-adapters peft-adapter
      mindpeft convert-adapter rank_0.ckpt peft-adapter --lora-alpha 16 --base llama-7b
      mindpeft convert-adapter my-adapter hub-adapter --to adapterhub
    """
    check_output(dst, [src], overwrite)
    from mindpeft.foreign.convert import convert_adapter as convert

    done = convert(src, dst, to=to, lora_alpha=lora_alpha, base_model=base, prefix=prefix)
    facts = f"{dst}: {done.method}, {done.tensors} tensors, {done.source_format} to {done.target_format}"
    out.print(facts, markup=False)
