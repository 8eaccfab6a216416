"""`Tokenizer`: text to ids and back, for every vocabulary this project trains or reads.

It holds one specification (the content of a `tokenizer.json`). Encoding at scale is left to the
`tokenizers` package; `encoder.py` does the same in Python one can read. Going back, text is put
together from the exact bytes of its tokens, so a stream (`stream.py`) and a whole decode agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.text.backend import (
    check_rules,
    inert_spec,
    open_backend,
    open_packed,
    run_backend,
    sibling,
)
from llm_from_scratch.text.checks import REMEDY, Config, Spec, check_spec, stop_ids
from llm_from_scratch.text.files import SPEC, read_tokenizer, write_tokenizer
from llm_from_scratch.text.formats import added_token, guess_roles, read_tiktoken
from llm_from_scratch.text.front import Front, run_front
from llm_from_scratch.text.inputs import Encoded, encode_inputs
from llm_from_scratch.text.packed import PackedModel, known_ids
from llm_from_scratch.text.pretokenize import check_characters
from llm_from_scratch.text.token_bytes import TokenBytes

# Tokens at which an assistant's turn ends in the chat templates people use.
END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|endofturn|>",
    "<|assistant_end|>", "<|eom_id|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


def without_surrogates(text: str) -> str:
    """`text` as it can be written in UTF-8: lone surrogates (from JSON) become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """A vocabulary and its rules. Make one with `load`, `from_spec`, or by training.

    The vocabulary stays packed (`packed.py`), and the `tokenizers` package is given it when the
    first text is encoded: who only loads a model does not wait for it, nor hold it twice.

    Attributes:
        rules: the content of its `tokenizer.json` but for the vocabulary and the merges in "model".
        config: the content of its `tokenizer_config.json`.
        front: what is done to a text before that, where `tokenizer.json` cannot say it.
        source: the file that it came from, which errors name; or None.
    """

    def __init__(
        self, spec: Spec, config: Config | None = None, front: Front | None = None
    ) -> None:
        self.front = front
        self.source: Path | str | None = None
        self._take(spec)
        self.config: Config = dict(config or {})
        if not any(role in self.config for role in ("bos_token", "eos_token")):
            self.config = guess_roles(list(self.special_tokens)) | self.config
        self.extra_stop_ids: set[int] = set()

    def _take(self, spec: Spec) -> None:
        """Let `spec` be the specification, and drop what was derived from an earlier one."""
        check_spec(spec)
        model, added = PackedModel(spec["model"]), spec.get("added_tokens") or []
        rules: Spec = {**spec, "added_tokens": added, "model": model.rest}
        check_rules(rules, model)
        self._model, self.rules = model, rules
        self._known = known_ids(added, spec["model"]["vocab"])
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                self.__dict__.pop(name, None)
        self._bytes_of: dict[int, bytes] = {}

    # ---------------------------------------------------------------- making and keeping

    @classmethod
    def from_spec(
        cls, spec: Spec, config: Config | None = None, front: Front | None = None
    ) -> Tokenizer:
        """A tokenizer from the contents of `tokenizer.json` and `tokenizer_config.json`."""
        return cls(spec, config, front)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a folder or a file of it.

        That is `tokenizer.json`, a SentencePiece model, `vocab.txt`, or `vocab.json` with
        `merges.txt`: whichever comes first.
        """
        found, path = read_tokenizer(path), Path(path)
        folder = path if path.is_dir() else path.parent
        source = path / SPEC if (path / SPEC).is_file() else path
        try:
            tokenizer = cls.from_spec(found.spec, found.config, found.front)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        tokenizer.source = source
        generation = folder / "generation_config.json"
        if generation.is_file():
            values = read_json_object(generation, REMEDY)
            tokenizer.extra_stop_ids |= stop_ids(values, generation)
        return tokenizer

    @classmethod
    def from_tiktoken(
        cls,
        path: Path | str,
        *,
        pattern: str = "gpt2",
        special: Mapping[str, int] | None = None,
        config: Config | None = None,
    ) -> Tokenizer:
        """Read a tiktoken rank file; `pattern` is "gpt2", "cl100k" or an expression."""
        return cls.from_spec(read_tiktoken(path, pattern=pattern, special=special), config)

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`.

        A Japanese BERT's and a Marian tokenizer are written as the files of their classes.
        """
        tokens = self.tokens if self.front is not None else []
        write_tokenizer(folder, self.spec, self.config, self.front, tokens)

    def add_tokens(self, tokens: Sequence[str], *, special: bool = False) -> int:
        """Append tokens to the vocabulary; those that it has are only marked as added.

        From now on each is found in text before the merges are applied (a `special` one only
        where `encode` is told to look for it). Returns how many entries the vocabulary grew by:
        the embedding of a model has to grow by as many rows.
        """
        if any(not token for token in tokens):
            raise UserError("An added token is empty: give every token some text.")
        before = self.vocab_size
        added = {entry["content"]: entry for entry in self.rules["added_tokens"]}
        ids = {token: i for i, token in enumerate(self.tokens) if token is not None}
        top = before
        for token in dict.fromkeys(tokens):
            number = ids.get(token, top)
            top = max(top, number + 1)
            added[token] = added_token(token, number, special=special)
        entries = sorted(added.values(), key=lambda entry: entry["id"])
        self._take({**self.spec, "added_tokens": entries})
        return self.vocab_size - before

    # ---------------------------------------------------------------- what it has

    @property
    def spec(self) -> Spec:
        """The content of its `tokenizer.json`, unpacked anew: keep it where it is needed often."""
        return {**self.rules, "model": self._model.whole()}

    @cached_property
    def tokens(self) -> list[str | None]:
        """The vocabulary by id, in its own notation; None where an id has no token."""
        tokens: list[str | None] = [None] * self.vocab_size
        for token, i in self._model.tokens():
            tokens[i] = token
        for i, token in self._added.items():
            tokens[i] = token
        return tokens

    @cached_property
    def vocab_size(self) -> int:
        """The highest id plus one: special and added tokens are included."""
        return max([self._model.top, *self._added]) + 1

    def __len__(self) -> int:
        return self.vocab_size

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids, in the order of the ids."""
        return {t["content"]: t["id"] for t in self.rules["added_tokens"] if t["special"]}

    @cached_property
    def kind(self) -> str:
        """ "bpe", "char", "wordpiece", "unigram" or "wordlevel"."""
        merges = self._model.merges
        kind = self._model.rest.get("type") or ("WordPiece" if merges is None else "BPE")
        if kind == "BPE" and not merges and not self.rules.get("pre_tokenizer"):
            return "char"
        return str(kind).lower()

    def token_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own notation, special ones included."""
        token = without_surrogates(token)
        if token in self._known:
            return self._known[token]
        number = self._plain.token_to_id(token)
        return None if number is None else int(number)

    def _role(self, role: str) -> int | None:
        token = self.config.get(role)
        return None if token is None else self.token_id(str(token))

    @property
    def bos_id(self) -> int | None:
        """The token before a text; None when there is none."""
        return self._role("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token after a text; None when there is none."""
        return self._role("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The token that fills up a batch; None when there is none."""
        return self._role("pad_token")

    @property
    def unk_id(self) -> int | None:
        """The token for what the vocabulary cannot express; None when there is none."""
        model = self._model.rest
        if isinstance(model.get("unk_id"), int):  # Unigram
            return int(model["unk_id"])
        token = model.get("unk_token") or self.config.get("unk_token")
        return None if token is None else self.token_id(str(token))

    @property
    def cls_id(self) -> int | None:
        """The token before a text for an encoder, which comes to stand for it; or None."""
        return self._role("cls_token")

    @property
    def sep_id(self) -> int | None:
        """The token that an encoder sees after each text; None when there is none."""
        return self._role("sep_token")

    @property
    def mask_id(self) -> int | None:
        """The token for a word to be guessed; None when there is none."""
        return self._role("mask_token")

    @cached_property
    def target(self) -> Tokenizer:
        """For texts in the language that a translator writes; for all others the tokenizer itself.

        Its ids are the same model's, and `decode` may be that of either.
        """
        found = self.front.target() if self.front else None
        if found is None:
            return self
        target = Tokenizer(found[0], self.config, found[1])
        target.source = self.source
        return target

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into text; may be set."""
        return self.config.get("chat_template")

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.config["chat_template"] = template

    @property
    def stop_ids(self) -> set[int]:
        """Where generation ends: the end of text, and the end of a turn in the chat template."""
        template = self.chat_template or ""
        turns = {
            self.special_tokens[token]
            for token in END_OF_TURN
            if token in self.special_tokens and token in template
        }
        end = set() if self.eos_id is None else {self.eos_id}
        return end | turns | self.extra_stop_ids

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the specification: equal for tokenizers that give equal ids."""
        said = {**self.spec, "front": self.front.state} if self.front else self.spec
        text = json.dumps(said, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    # ---------------------------------------------------------------- text to ids

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return open_packed(self.rules, self._model, special=False, source=self.source)

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return sibling(self._plain, special=True)

    @cached_property
    def _inert(self) -> tokenizers.Tokenizer:
        unknown = None if self.unk_id is None else self.tokens[self.unk_id]
        return open_backend(inert_spec(self.spec, self.special_tokens, unknown), special=False)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`; nothing is put before or after them.

        With `special=False` the text is a user's: `<|endoftext|>` in it is eleven characters or
        so. With `special=True` it was made by a template, and special tokens become their ids.
        """
        text = without_surrogates(text)
        self._check_characters(text, special)
        if special:
            return self._run(self._with_special, [text], special=True)[0]
        return self._disarmed(self._run(self._plain, [text])[0], text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` (without special tokens) of many texts, on all cores."""
        texts = [without_surrogates(text) for text in texts]
        for text in texts:
            self._check_characters(text, special=False)
        found = self._run(self._plain, texts)
        return [self._disarmed(ids, text) for ids, text in zip(found, texts, strict=True)]

    def encode_inputs(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        special: bool = False,
    ) -> Encoded:
        """A batch for a model: each text with the special tokens that belong around it, padded.

        Args:
            texts: one a row.
            pairs: a second text for each row (a question and a passage, two sentences).
            max_length: rows that are longer, special tokens included, are cut; of a pair the
                longer text gives way first.
            special: as in `encode`: special tokens in the texts are found.

        Raises `UserError` where the counts differ or there is no token to pad with.
        """
        return encode_inputs(self, texts, pairs, max_length=max_length, special=special)

    def _run(
        self, backend: tokenizers.Tokenizer, texts: list[str], *, special: bool = False
    ) -> list[list[int]]:
        """The ids of texts; with a front, of what lies between the added tokens in them."""
        if self.front is None:
            return run_backend(backend, texts)
        added = {t["content"]: t["id"] for t in self.rules["added_tokens"]}
        if special:  # what lies between special tokens is plain text all the same
            return run_front(self.front, self._plain, texts, added)
        plain = [t["content"] for t in self.rules["added_tokens"] if not t["special"]]
        return run_front(self.front, backend, texts, {token: added[token] for token in plain})

    def _disarmed(self, ids: list[int], text: str) -> list[int]:
        """`ids`, or new ones if a special token came out of plain text."""
        if self._special_ids.isdisjoint(ids):
            return ids
        return self._run(self._inert, [text])[0]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i in self.special_tokens.values() if i != self.unk_id)

    @cached_property
    def _characters(self) -> frozenset[str] | None:
        """For a character vocabulary without an unknown token: the characters that it has."""
        if self.kind != "char" or self._model.rest.get("unk_token") is not None:
            return None
        return frozenset(token for token, _ in self._model.tokens())

    def _check_characters(self, text: str, special: bool) -> None:
        known = self._characters
        if known is None or known.issuperset(text):
            return
        added = [t["content"] for t in self.rules["added_tokens"] if special or not t["special"]]
        check_characters(text, known, added)

    # ---------------------------------------------------------------- ids to text

    @cached_property
    def bytes_rule(self) -> TokenBytes:
        """How this vocabulary writes bytes."""
        return TokenBytes(self.rules)

    @cached_property
    def _added(self) -> dict[int, str]:
        return {token["id"]: token["content"] for token in self.rules["added_tokens"]}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: half a character perhaps; b"" for an id without a token."""
        data = self._bytes_of.get(token_id)
        if data is None:
            data = self._bytes_of[token_id] = self._find_bytes(token_id)
        return data

    def _find_bytes(self, token_id: int, first: bool = False) -> bytes:
        if token_id in self._added:
            # Bytes as letters are for the vocabulary alone; `▁` is a space in an added token, too.
            added = self._added[token_id]
            plain = self.bytes_rule.letters
            return added.encode() if plain else self.bytes_rule(added, first=first)
        token = self._token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if token is None else self.bytes_rule(token, first=first)

    def _token(self, token_id: int) -> str | None:
        """`tokens[token_id]`; a few tokens are no reason to unpack them all."""
        if "tokens" in self.__dict__ or not self._model.unique:
            return self.tokens[token_id]
        found: str | None = self._plain.id_to_token(token_id)
        return found

    def first_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that begins a text: some vocabularies drop its space there."""
        return self._find_bytes(token_id, first=True)

    def token_text(self, token_id: int) -> str:
        """One token as something to print: bytes that are no text as `\\xe3`."""
        text = self.token_bytes(token_id).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        if skip_special:
            hidden = frozenset(self.special_tokens.values())
            ids = [i for i in ids if i not in hidden]
        if not self.bytes_rule.exact:
            known = [int(i) for i in ids if 0 <= i < self.vocab_size]
            return str(self._plain.decode(known, skip_special_tokens=False))
        pieces = [self.token_bytes(int(i)) for i in ids]
        if pieces and self.bytes_rule.first_space:
            pieces[0] = self.first_bytes(int(ids[0]))
        data = b"".join(pieces)
        if self.bytes_rule.strip:
            spaces = len(data) - len(data.lstrip(b" "))
            data = data[min(spaces, self.bytes_rule.strip) :]
        return data.decode("utf-8", "replace")
