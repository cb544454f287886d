"""``mindpeft generate``: prompts in, texts out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mindpeft.errors import InputError


def generate(
    run: Annotated[Path, typer.Argument(help="A run, an adapter, or a checkpoint of a decoder.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to answer.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A prompt a line.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base model, if it was moved.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before each prompt.")] = None,
    template: Annotated[str | None, typer.Option(help="A named chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on behind the prompt as it is.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; else take the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits; implies --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from that many; implies --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from that probability; implies --sample.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="The least share of the best; implies --sample.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Follow that many texts at once.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, float16, bfloat16, int8, auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, Ascend, GPU or CPU.")] = "auto",
) -> None:
    """Write text: one prompt's answer as it comes, several prompts' as JSON lines.

    \b
    Examples:
      mindpeft generate my-run "What is LoRA?"
      mindpeft generate my-run --file questions.txt --temperature 0.7 --top-p 0.9 > answers.jsonl
      mindpeft generate checkpoint --raw "Once upon a time"
    """
    if prompts and file is not None:
        raise InputError("give prompts or --file, not both")
    if not prompts and file is None and sys.stdin.isatty():
        raise InputError("nothing to answer: give prompts, --file FILE, or lines on standard input")
    from mindpeft.cli.speaking import open_speaker
    from mindpeft.device import setup_device

    asked = prompts or _lines(file)
    setup_device(device, seed=seed or 0)
    speaker = open_speaker(
        run,
        base=base,
        template=template,
        raw=raw,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        do_sample=sample or None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        stop_strings=stop,
        seed=seed,
    )
    before = [{"role": "system", "content": system}] if system else []
    tokens = [speaker.tokens([*before, {"role": "user", "content": prompt}]) for prompt in asked]
    if len(asked) == 1 and num_beams in (None, 1) and not stop:
        speaker.write(tokens, streamer=speaker.streamer())
        sys.stdout.write("\n")
        return
    for start in range(0, len(asked), batch_size):
        texts = speaker.write(tokens[start : start + batch_size])
        for prompt, text in zip(asked[start : start + batch_size], texts, strict=True):
            sys.stdout.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _lines(file: Path | None) -> list[str]:
    """Prompts of a file or of standard input, blank lines left out."""
    if file is not None and not file.is_file():
        raise InputError(f"no such file: {file}")
    data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file or 'standard input'}: not UTF-8") from error
    if not lines:
        raise InputError(f"{file or 'standard input'} holds no prompt")
    return lines
