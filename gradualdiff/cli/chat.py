"""``gradualdiff chat``: talk to a run's model, round by round, beside its base."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    finite,
    print_json,
    say,
)
from shared.errors import GradualDiffError
from shared.printing import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradualdiff.conversation import Conversation

HELP = """\
/round N  the adapter of round N answers from now on (0: the one that was drawn)
/clear    forget what was said
/quit     end; so does Ctrl-D"""


def chat(
    run: RunArgument,
    round_number: Annotated[
        int | None, typer.Option("--round", help="Whose adapter answers (default: the last).")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Let the base model answer too, side by side.")
    ] = False,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Say this and end; may be given several times, in turn."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(callback=finite, help="0 takes the most probable word each time.")
    ] = 0.5,
    top_p: Annotated[
        float, typer.Option(callback=finite, help="Draw from the likeliest words only, up to this.")
    ] = 0.9,
    repetition_penalty: Annotated[
        float, typer.Option(callback=finite, help="Above 1: what was said becomes less likely.")
    ] = 1.1,
    most_tokens: Annotated[int, typer.Option(help="Of one reply.")] = 120,
    seed: Annotated[int, typer.Option(help="The same seed gives the same replies.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="The base model's folder or hub id, if it is elsewhere here.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Talk to the model that a run made. Type /help inside.

    Nothing of it is kept or sent anywhere. It needs the base model on this machine.
    Example: gradualdiff chat demo-0001 --base --prompt "How was your week?"
    """
    try:
        from participant.model import Sampling
    except ImportError as error:
        from gradualdiff.adapter import missing_package

        raise missing_package("a conversation", error) from None
    from gradualdiff.conversation import Conversation
    from gradualdiff.store import open_store

    sampling = Sampling(temperature, top_p, repetition_penalty, most_tokens, seed)
    conversation = Conversation(
        open_store(store).run(run), sampling, number=round_number, beside_base=base, model=model
    )
    if prompts:
        _answer(conversation, prompts, as_json=as_json)
        return
    say("/help says what else may be typed")
    _with_person(conversation)


def _answer(conversation: Conversation, prompts: Sequence[str], *, as_json: bool) -> None:
    told = []
    for prompt in prompts:
        if as_json:
            told.append({"prompt": prompt, "replies": conversation.say(prompt)})
        else:
            say(f"> {printable(prompt)}")
            _speak(conversation, prompt)
    if as_json:
        print_json(told)


def _with_person(conversation: Conversation) -> None:
    """Until the end of standard input, or /quit."""
    while True:
        try:
            words = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if words == "/quit":
            return
        try:
            if words.startswith("/"):
                _command(conversation, words)
            elif words:
                _speak(conversation, words)
        except KeyboardInterrupt:
            say("\n(stopped; this reply is forgotten)")
        except GradualDiffError as error:  # a round that is not there ends no conversation
            say(str(error), stderr=True)


def _command(conversation: Conversation, words: str) -> None:
    name, _, rest = words.partition(" ")
    if name == "/clear":
        conversation.forget()
    elif name == "/round" and rest.strip().isdecimal():
        conversation.turn_to(int(rest))
        say(f"{conversation.sides[-1].name} answers")
    else:
        say(HELP)


def _speak(conversation: Conversation, words: str) -> None:
    """Print each reply as it comes, under the name of who says it."""
    speaking = ""

    def hear(side: str, text: str) -> None:
        nonlocal speaking
        if side != speaking:
            sys.stdout.write(("\n" if speaking else "") + f"{side}: ")
            speaking = side
        sys.stdout.write(printable(text, lines=True))
        sys.stdout.flush()

    conversation.say(words, hear)
    sys.stdout.write("\n")
