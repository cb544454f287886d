"""``mindpeft chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mindpeft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from mindpeft.cli.speaking import Speaker

_HELP = """\
/reset           forget what was said
/system TEXT     begin anew with this system message
/adapter NAME    answer with another adapter, or with "base", the model without one
/adapters        list them
/help            this list
/exit            leave (also Ctrl-D)"""
_LEAST_PROMPT = 256  # a conversation grows; each longer bucket compiles anew


def chat(
    run: Annotated[Path, typer.Argument(help="A run, an adapter, or a checkpoint of a decoder.")],
    base: Annotated[Path | None, typer.Option(help="The base model, if it was moved.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of one more; repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    template: Annotated[str | None, typer.Option(help="A named chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens at this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from that probability.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, float16, bfloat16, int8, auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, Ascend, GPU or CPU.")] = "auto",
) -> None:
    """Talk with a model; /help lists the commands inside.

    \b
    Examples:
      mindpeft chat my-run
      mindpeft chat my-run --adapter other=other-run --temperature 0.7
    """
    from mindpeft.cli.speaking import open_speaker
    from mindpeft.device import setup_device
    from mindpeft.generate.text import sessions_of

    setup_device(device, seed=seed or 0)
    speaker = open_speaker(
        run,
        base=base,
        adapters=adapter or (),
        template=template,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    sessions_of(speaker.run.model).least = _LEAST_PROMPT
    talk(Talk(speaker, system))


class Talk:
    """A conversation and the adapter that answers.

    Args:
        speaker: who answers.
        system: a message before all others.
    """

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self.speaker = speaker
        self.system = system
        self.disabled = False
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, words: str) -> None:
        """Say something and print the answer as it comes."""
        from contextlib import nullcontext

        self.messages.append({"role": "user", "content": words})
        model = self.speaker.run.model
        with model.disable_adapter() if self.disabled else nullcontext():
            tokens = self.speaker.tokens(self.messages)
            (text,) = self.speaker.write([tokens], streamer=self.speaker.streamer())
        print()
        self.messages.append({"role": "assistant", "content": text})

    def command(self, name: str, rest: str) -> str:
        """Do what a command says, and return what to print."""
        if name == "/reset":
            self.reset()
            return "forgotten"
        if name == "/system":
            self.system = rest or None
            self.reset()
            return "begun anew"
        if name == "/adapters":
            return ", ".join(self.adapters())
        if name == "/adapter":
            return self.switch(rest)
        if name == "/help":
            return _HELP
        known = ("/reset", "/system", "/adapter", "/adapters", "/help", "/exit")
        raise InputError(f"no command {name!r}{did_you_mean(name, known)}; /help lists them")

    def adapters(self) -> list[str]:
        """The names that ``/adapter`` takes."""
        return [*getattr(self.speaker.run.model, "peft_config", {}), "base"]

    def switch(self, name: str) -> str:
        """Answer with another adapter from now on."""
        names = self.adapters()
        if name not in names:
            raise InputError(f"no adapter {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}")
        self.disabled = name == "base" and hasattr(self.speaker.run.model, "disable_adapter")
        if name != "base":
            self.speaker.run.model.set_adapter(name)
        return f"{name} answers"


def talk(conversation: Talk) -> None:
    """Read lines until the end."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                print(conversation.command(name, rest.strip()))
            elif line:
                conversation.answer(line)
        except InputError as error:
            print(error)
        except KeyboardInterrupt:
            print()
            conversation.messages.pop()
