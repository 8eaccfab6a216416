"""The commands of a talk in the terminal: what a line that begins with a slash does."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_from_scratch.cli.sampling_flags import check_form, read_bias, read_schema
from llm_from_scratch.core.errors import UserError, nearest, shown

if TYPE_CHECKING:
    from llm_from_scratch.generate.conversation import Conversation
    from llm_from_scratch.generate.settings import SamplingSettings

# name -> (what is written behind it, what it does)
COMMANDS = {
    "/help": ("", "this list"),
    "/regenerate": ("", "answer the last question anew"),
    "/edit": ("[N] [TEXT]", "ask TEXT in the place of question N, or of the last"),
    "/history": ("", "what was said, with the numbers of the questions"),
    "/system": ("[TEXT]", "what the model is told first (no TEXT: nothing); begins anew"),
    "/set": ("[NAME [VALUE]]", "how tokens are chosen; VALUE may be 'default' or 'none'"),
    "/models": ("[NAME]", "at an address: its models, or the one to ask from now on"),
    "/export": ("FILE", "put the conversation at the end of FILE, JSON Lines for fine-tuning"),
    "/load": ("FILE [N]", "go on with the last conversation of FILE, or the Nth; also /import"),
    "/reset": ("", "begin a new conversation; also /new"),
    "/quit": ("", "leave; also /exit or Ctrl-D"),
}
OTHER_NAMES = {"/new": "/reset", "/import": "/load", "/exit": "/quit"}
HELP_END = (
    "Ctrl-C stops an answer. A message that begins with a slash is written with two.\n"
    "Alt+Enter, or a backslash at the end of a line, begins a new line."
)
# Fields of the settings that have no place in a talk: there is one answer, and it is read.
NOT_HERE = ("n", "num_beams", "length_penalty", "logprobs", "prompt_logprobs")
WIDTH = 28

Answer = Callable[[str, Callable[[], Generator[str, None, None]]], None]


# A text must not move the cursor, set the window's title or fill the clipboard.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def printable(text: str) -> str:
    """A text as it may be shown in a terminal: control characters become visible signs."""
    return text.translate(_CONTROLS)


def note(text: str) -> None:
    """Something that is no part of the conversation."""
    print(printable(text), file=sys.stderr, flush=True)


def setting_names() -> list[str]:
    """The settings that /set knows."""
    from llm_from_scratch.generate.settings import SamplingSettings

    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    return [name for name in names if name not in NOT_HERE]


def read_setting(name: str, text: str) -> Any:
    """The value of a setting out of what was typed."""
    from llm_from_scratch.generate.settings import SamplingSettings

    if name in ("stop", "choice", "logit_bias"):
        words = shlex.shlex(text, posix=True)
        words.whitespace_split, words.escape, words.commenters = True, "", ""
        try:
            found = list(words)
        except ValueError as error:
            raise UserError(f"{name} has a quotation mark without its partner: {text}") from error
        if name == "logit_bias":
            return dict(read_bias(word) for word in found)
        return tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in found)
    if name == "json_schema":
        return read_schema(text)
    kinds = {field.name: str(field.type) for field in dataclasses.fields(SamplingSettings)}
    whole = kinds[name].startswith("int")
    try:
        return int(text) if whole else float(text) if kinds[name] == "float" else text
    except ValueError as error:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {shown(text)}; it must be {kind}.") from error


class Commands:
    """Carries out the commands of one talk.

    Attributes:
        draft: what stands in the next prompt before anything is typed.
    """

    def __init__(
        self,
        conversation: Conversation,
        answer: Answer,
        *,
        interactive: bool,
        check: Callable[[SamplingSettings], object] = lambda settings: None,
    ) -> None:
        """`answer` shows an answer to a message; `check` refuses settings that cannot be asked
        of the model."""
        self.conversation = conversation
        self.answer = answer
        self.interactive = interactive
        self.check = check
        self.first_settings = conversation.settings
        self.draft = ""

    def obey(self, line: str) -> bool:
        """Carry out a /command; False to leave. `UserError` where it cannot be done."""
        command, *rest = line.split(None, 1)
        name = OTHER_NAMES.get(command, command)
        if name == "/quit":
            return False
        if name not in COMMANDS:
            raise UserError(
                f"There is no command {shown(command)[1:-1]}; /help lists them."
                + nearest(command, [*COMMANDS, *OTHER_NAMES])
            )
        getattr(self, "_" + name[1:])(rest[0].strip() if rest else "")
        return True

    # ----------------------------------------------------------- the conversation

    def _help(self, rest: str) -> None:
        rows = [(f"{name} {usage}", text) for name, (usage, text) in COMMANDS.items()]
        note("\n".join(f"{left:<{WIDTH}}{text}" for left, text in rows) + f"\n{HELP_END}")

    def _regenerate(self, rest: str) -> None:
        if self.conversation.settings.temperature == 0 and self.interactive:
            note("(At temperature 0 the answer stays the same; /set temperature 0.8 varies it.)")
        self.answer(self.conversation.last_question, self.conversation.regenerate)

    def _edit(self, rest: str) -> None:
        first, *more = rest.split(None, 1) or [""]
        number = int(first) if first.isascii() and first.isdigit() and len(first) < 10 else None
        text = rest if number is None else (more[0] if more else "")
        if text:
            self.answer(text, lambda: self.conversation.edit(text, number))
            return
        if not self.interactive:
            raise UserError("/edit needs the new text of the question: /edit [N] TEXT.")
        questions = self.conversation.questions
        place = len(questions) if number is None else number
        if not 1 <= place <= len(questions):
            raise UserError(f"There is no question {place}; /history shows those that there are.")
        self.draft = f"/edit {place} {questions[place - 1]}"

    def _history(self, rest: str) -> None:
        conversation, number = self.conversation, 0
        if conversation.system:
            note("   system: " + conversation.system.replace("\n", "\n    "))
        if not conversation.messages:
            note("(Nothing has been said yet.)")
        for message in conversation.messages:
            mark = "  "
            if message["role"] == "user":
                number += 1
                mark = f"{number}>"
            text = (message["content"] or "").replace("\n", "\n    ")
            note(f"{mark:>3} {text}")

    def _system(self, rest: str) -> None:
        self.conversation.system = rest or None
        self.conversation.reset()
        note("(new conversation with this system message)" if rest else "(no system message)")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        note("(new conversation)")

    # ------------------------------------------------------------------- settings

    def _set(self, rest: str) -> None:
        known = setting_names()
        name, _, text = (part.strip() for part in rest.partition(" "))
        name = name.removeprefix("--").replace("-", "_")
        if rest and name not in known:
            raise UserError(
                f"There is no setting {shown(name)}; /set lists them." + nearest(name, known)
            )
        if text:
            self._change(name, text)
        for one in known if not rest else [name]:
            note(f"{one:<{WIDTH}}{self._told(one)}")

    def _change(self, name: str, text: str) -> None:
        from llm_from_scratch.generate.settings import SamplingSettings

        empty = getattr(SamplingSettings(), name)
        if text == "default":
            value = getattr(self.first_settings, name)
        elif text == "none" and not isinstance(empty, int | float):
            value = empty
        else:
            value = read_setting(name, text)
        settings = dataclasses.replace(self.conversation.settings, **{name: value})
        check_form(settings)
        self.check(settings)
        self.conversation.settings = settings

    def _told(self, name: str) -> str:
        value = getattr(self.conversation.settings, name)
        if isinstance(value, tuple):
            return " ".join(map(repr, value)) or "none"
        if name == "logit_bias":
            return " ".join(f"{token}={number:g}" for token, number in value.items()) or "none"
        return "none" if value is None else str(value)

    def _models(self, rest: str) -> None:
        chat: Any = self.conversation.chat
        if not hasattr(chat, "models"):
            raise UserError(f"{chat.name} is on this machine, and no other model is open.")
        names = chat.models()
        if rest and rest not in names:
            raise UserError(f"The server has no model {shown(rest)}.{nearest(rest, names)}")
        chat.name = rest or chat.name
        for name in names:
            note(f"{'*' if name == chat.name else ' '} {name}")

    # ---------------------------------------------------------------------- files

    def _export(self, rest: str) -> None:
        from llm_from_scratch.generate.transcripts import add_conversation

        if not rest:
            raise UserError("/export needs the name of a file, such as talk.jsonl.")
        path = Path(rest).expanduser()
        count = add_conversation(path, self.conversation.export())
        note(f"({path} has {'one conversation' if count == 1 else f'{count} conversations'} now)")

    def _load(self, rest: str) -> None:
        from llm_from_scratch.generate.transcripts import read_conversations

        if not rest:
            raise UserError("/load needs the name of a file, such as talk.jsonl.")
        path, number = Path(rest).expanduser(), 0
        head, _, tail = rest.rpartition(" ")
        if head and tail.isascii() and tail.isdigit() and len(tail) < 10 and not path.exists():
            path, number = Path(head.strip()).expanduser(), int(tail)
        found = read_conversations(path)
        number = number or len(found)
        if number > len(found):
            has = "one conversation" if len(found) == 1 else f"{len(found)} conversations"
            raise UserError(f"{path} has {has}; there is no number {number}.")
        self.conversation.load(found[number - 1])
        messages = self.conversation.messages
        note(
            f"(conversation {number} of {len(found)}: {len(messages)} messages; /history shows them"
            + ("; /regenerate answers the last)" if messages[-1]["role"] == "user" else ")")
        )
