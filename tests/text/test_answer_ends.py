"""Templates that can be learnt from, and those that would teach a model never to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.answer_ends import answer_end, chosen_template, missing_tokens
from llm_from_scratch.text.chat import encode_chat, render
from llm_from_scratch.text.chat_template import TEMPLATES
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

CONTROLS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "phi3": ["<|user|>", "<|end|>", "<|assistant|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
TALK = [
    {"role": "user", "content": "Sort.\n\nb a", "instruction": "Sort.", "input": "b a"},
    {"role": "assistant", "content": "a b"},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "a b!"},
]


def tokenizer(*special: str, eos: bool = True) -> Tokenizer:
    special = (*special, *(["<|endoftext|>"] if eos else []))
    return train_tokenizer(["question answer Sort. Again."] * 9, vocab_size=300, special=special)


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_train_the_token_that_ends_an_answer(name: str) -> None:
    made = tokenizer(*CONTROLS.get(name, ()))
    end = answer_end(TEMPLATES[name], made)
    wanted = {"chatml": "<|im_end|>", "phi3": "<|end|>", "llama3": "<|eot_id|>"}
    assert made.token_text(end) == wanted.get(name, made.config["eos_token"])
    tokens = encode_chat(made, TALK, template=name)
    learnt = [i for i, on in zip(*tokens, strict=True) if on]
    if name != "plain":  # there a turn in the middle ends with a new line
        assert learnt.count(end) == 2
    assert learnt[-1] == end
    assert made.decode(learnt, skip_special=True).replace("\n", "").strip().endswith("a b!")
    assert missing_tokens(TEMPLATES[name], made) == []
    assert missing_tokens(TEMPLATES[name], tokenizer()) == CONTROLS.get(name, [])


def test_named_templates_look_as_their_users_expect() -> None:
    alpaca = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\na b"
    )
    assert render(TALK[:2], "alpaca") == alpaca
    assert render(TALK[:1], "alpaca", add_generation_prompt=True) == alpaca[:-3]
    assert "Below" not in render([{"role": "system", "content": "S"}, *TALK], "alpaca")
    assert render(TALK[2:], "japanese", eos="</s>") == "ユーザ：Again.\nアシスタント：a b!</s>"
    assert render(TALK[2:], "phi3") == "<|user|>\nAgain.<|end|>\n<|assistant|>\na b!<|end|>\n"
    assert render(TALK[2:], "llama3", bos="<s>") == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nAgain.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na b!<|eot_id|>"
    )


def test_an_end_that_is_not_learnt_is_refused() -> None:
    chatml = TEMPLATES["chatml"]
    outside = chatml.replace(
        "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    made = tokenizer(*CONTROLS["chatml"])
    with pytest.raises(UserError, match="writes <\\|im_end\\|> behind an answer but leaves it out"):
        answer_end(outside, made)
    assert made.token_text(answer_end(outside, made, everything=True)) == "<|im_end|>"
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    for everything in (False, True):
        with pytest.raises(UserError, match="writes no control token behind an answer"):
            answer_end(bare, made, everything=everything)
    with pytest.raises(UserError, match="of which this vocabulary has none"):
        answer_end(TEMPLATES["alpaca"], tokenizer("<|x|>", eos=False))


def test_a_template_is_a_name_a_file_or_jinja(tmp_path: Path) -> None:
    made = tokenizer()
    assert chosen_template(None, made) == TEMPLATES["plain"]
    made.chat_template = TEMPLATES["japanese"]
    assert chosen_template(None, made) == TEMPLATES["japanese"]
    assert chosen_template("alpaca", made) == TEMPLATES["alpaca"]
    (tmp_path / "t.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert chosen_template(str(tmp_path / "t.jinja"), made) == "{{ messages }}"
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        chosen_template("alpacca", made)
    with pytest.raises(UserError, match="not valid Jinja"):
        chosen_template("{% for %}", made)
