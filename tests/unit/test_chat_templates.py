"""Chat templates as the Hub has them: the answers are found in what they write, and those that fail are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.chat_folders import CHATML, MARKED, chat_folder, chat_tokenizer
from helpers.chats import chat, planned, spec_of, write_lines
from shardyard_trainer.inputs.chat_template import ChatTemplate, TemplateFault, template_of

# How well-known families write, shortened to what matters here.
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OWN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
MARK = "{% generation %}{{ message['content'] }}"
PART = "{{ message['content'][:1] }}{% generation %}{{ message['content'][1:] }}"
TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
# Qwen 3: the thoughts of earlier answers are not written again.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek R1: the prompt begins a thought that the data may not have.
BEGUN = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
# Qwen 3: only the last answer has an empty thought; calls follow the content at once.
CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.name + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE_CALLS = CALLING.replace("'<tool_call>' + call.name + '</tool_call>'", "call.name")
NO_CLOSER = CALLING.replace("<|im_end|>\n", "")
NO_END = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
NO_PROMPT = CHATML[: CHATML.index("{% if add")]
DATED = "{{ strftime_now('%d %B %Y') + '\n' }}" + CHATML
TOOLS = "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}" + CHATML

CASES: dict[str, tuple[str, list[str]]] = {
    "ChatML": (CHATML, ["one<|im_end|>", " two <|im_end|>"]),
    "Llama 2": (LLAMA_2, [" one <|im_end|>", " two <|im_end|>"]),
    "a system prompt of its own": (OWN_SYSTEM, ["one<|im_end|>", " two <|im_end|>"]),
    "trimmed": (TRIMMED, ["one<|im_end|>", "two<|im_end|>"]),
    "no end": (NO_END, ["one\n\n", " two \n\n"]),
    "no prompt": (NO_PROMPT, ["<|im_start|>assistant\none<|im_end|>", "<|im_start|>assistant\n two <|im_end|>"]),
    "marked": (MARKED, ["one", "<|im_end|>", " two ", "<|im_end|>"]),
    "dated": (DATED, ["one<|im_end|>", " two <|im_end|>"]),
}


def answers_of(source: str, row: dict[str, Any], *tokens: str) -> tuple[list[str], bool, bool]:
    """The answers that are found; `tokens` are added to the tokenizer."""
    tokenizer = chat_tokenizer(None)
    tokenizer.add_tokens(list(tokens))
    template = ChatTemplate(source, tokenizer)
    messages = row["messages"]
    found = template.find_answers(messages, [message["role"] == "assistant" for message in messages])
    return [found.text[first:last] for first, last in found.answers], found.prompts_differ, found.marks_differ


@pytest.mark.parametrize("name", CASES)
def test_answers_are_what_a_prompt_leaves_to_be_said(name: str) -> None:
    source, wanted = CASES[name]
    assert answers_of(source, chat("first?", "one", "second?", " two ")) == (wanted, False, False)


def test_the_thoughts_of_an_earlier_answer_may_be_left_out_by_the_template() -> None:
    row = chat("a?", "<think>hm</think>\n\nnow x", "b?", "<think>so</think>\n\ny")
    answers, prompts_differ, _ = answers_of(THINKING, row)
    assert answers == ["now x<|im_end|>", "<think>so</think>\n\ny<|im_end|>"] and not prompts_differ


def calling(said: str, name: str) -> dict[str, Any]:
    called = {"role": "assistant", "content": said, "tool_calls": [{"name": name}]}
    (asked, answered) = chat("a?", "It is 7.")["messages"]
    return {"messages": [asked, called, {"role": "tool", "content": "7"}, answered]}


CALLS: dict[str, tuple[str, str, str, str]] = {
    "nothing said": (CALLING, "", "f", "<tool_call>f</tool_call><|im_end|>"),
    "something said": (CALLING, "Let me look.", "f", "Let me look.<tool_call>f</tool_call><|im_end|>"),
    "the end of a call is that of the other answer": (BARE_CALLS, "Look: ", "fx", "Look: fx<|im_end|>"),
    "that of the second other answer": (BARE_CALLS, "Look: x", "fy", "Look: xfy<|im_end|>"),
    "no token closes it": (NO_CLOSER, "Let me look.", "f", "Let me look.<tool_call>f</tool_call>"),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_earlier_answer_is_learnt_with_its_calls_and_the_token_that_closes_it(name: str) -> None:
    source, said, call, wanted = CALLS[name]
    answers, _, _ = answers_of(source, calling(said, call), "<tool_call>", "</tool_call>")
    assert answers[0] == wanted
    assert answers[1].removesuffix("<|im_end|>") == "<think>\n\n</think>\n\nIt is 7."


@pytest.mark.parametrize("closer", ["<|im_end|>", ""])
def test_the_token_that_begins_the_next_message_does_not_close_an_answer(closer: str) -> None:
    source = CALLING.replace("<|im_end|>\n", closer)
    answers, _, _ = answers_of(source, chat("a?", "b", "c?", "d"), "<tool_call>", "</tool_call>")
    assert answers[0] == "b" + closer


def test_a_template_that_writes_the_answer_of_a_tool_by_its_call_is_refused() -> None:
    named = CALLING.replace(
        "m['role'] + '\n' }}",
        "m['role'] + (' ' + messages[loop.index0 - 1].tool_calls[0].name if m['role'] == 'tool' and "
        "messages[loop.index0 - 1].tool_calls else '') + '\n' }}",
        1,
    )
    with pytest.raises(TemplateFault, match="what follows the tool_calls of message 2 differently without them"):
        answers_of(named, calling("Let me look.", "f"))


def test_an_answer_that_begins_otherwise_than_its_prompt_ends_is_found_and_said() -> None:
    answers, prompts_differ, _ = answers_of(BEGUN, chat("a?", "b"))
    assert answers == ["b<|im_end|>"] and prompts_differ


def test_marks_around_other_text_are_used_and_said() -> None:
    all_marked = "{% generation %}" + CHATML + "{% endgeneration %}"
    assert answers_of(all_marked, chat("a?", "b"))[1:] == (False, False)
    some = MARKED.replace(MARK, PART)
    assert answers_of(some, chat("a?", "bcd")) == (["cd", "<|im_end|>"], False, True)


def test_a_template_that_writes_what_came_before_in_another_way_is_refused() -> None:
    counting = "{{ messages | length }}" + CHATML
    with pytest.raises(TemplateFault, match="writes the messages before message 2 differently"):
        answers_of(counting, chat("a?", "b"))


def test_tools_are_written_where_the_template_reads_them() -> None:
    template = ChatTemplate(TOOLS, chat_tokenizer(None))
    messages = chat("a?", "b")["messages"]
    assert template.render(messages, [{"name": "f"}], prompt=False).startswith('[{"name": "f"}]\n')
    with pytest.raises(TemplateFault, match="does not read `tools`"):
        ChatTemplate(CHATML, chat_tokenizer(None)).render(messages, [{"name": "f"}], prompt=False)


def test_what_an_assistant_calls_is_not_left_out_by_a_template_that_does_not_read_it() -> None:
    called = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    with pytest.raises(TemplateFault, match="does not read `tool_calls`"):
        ChatTemplate(CHATML, chat_tokenizer(None)).render(called, prompt=False)
    reads = CHATML.replace(
        "message['content']", "(message.tool_calls | tojson if message.tool_calls else message.content)"
    )
    assert '[{"name": "f"}]' in ChatTemplate(reads, chat_tokenizer(None)).render(called, prompt=False)


def test_a_template_renders_as_plain_transformers_does_and_always_on_the_same_day(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(None)
    row = chat("a?", "b", system="Be short.")["messages"]
    for source, _ in CASES.values():
        for prompt in (False, True):
            if source is DATED:
                assert ChatTemplate(source, tokenizer).render(row, prompt=prompt).startswith("26 July 2024\n")
                continue
            plain = tokenizer.apply_chat_template(
                row, chat_template=source, add_generation_prompt=prompt, tokenize=False
            )
            assert ChatTemplate(source, tokenizer).render(row, prompt=prompt) == plain


FAULTS = {
    "unclosed": ("a\n{% for m in messages %}\n{{ m }}", "line 3: "),
    "an unknown tag": ("\n\n{% fail %}", "line 3: Encountered unknown tag 'fail'"),
    "an unknown filter": ("{{ messages | nothing }}", "No filter named 'nothing'"),
    "its own complaint": ("\n{{ raise_exception('only tools') }}", "line 2: only tools"),
    "nothing there": ("\n\n\n{{ messages[7]['content'] }}", "line 4: "),
    "Python": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "deeper Python": ("{{ cycler.__init__.__globals__.os.listdir('.') }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "line 1: "),
    "a range": ("{% for a in range(10**12) %}{% endfor %}", "Range too big"),
    "endless text": ("{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", "more than 16 times"),
    "endless macros": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "no messages": ("{{ bos_token }}Hello", "does not contain their contents"),
    "half a character": ("{{ '\\ud83d' }}" + CHATML, "its text has half of a surrogate pair"),
    "a change": ("{{ messages.append(1) }}", "unsafe"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_template_that_fails_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    source, message = FAULTS[name]
    path = write_lines(tmp_path / "a.jsonl", [chat("a?", "b")] * 4)
    (violation,) = planned(tmp_path, spec_of(path, {"chatTemplate": source})).violations
    assert violation.field == "spec.fine_tuning.instruction.chat_template" and violation.reason == "SPEC_INVALID"
    assert message in violation.message and "or give another in chat_template" in violation.message


def test_the_template_of_a_model_is_refused_as_the_models_and_one_that_is_given_takes_its_place(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "model", "{% broken")
    path = write_lines(tmp_path / "a.jsonl", [chat("a?", "b")] * 4)
    spec = spec_of(path, model={"uri": str(folder)})
    spec.ClearField("tokenizer")
    (violation,) = planned(tmp_path, spec).violations
    assert violation.field == "spec.model.uri" and violation.reason == "MODEL_INVALID"
    spec.fine_tuning.instruction.chat_template = CHATML
    assert not planned(tmp_path, spec).violations


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    # Gemma's raises for a system message.
    gemma = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    rows = [chat("a?", "b"), chat("a?", "b", system="Be short."), *[chat("a?", "b")] * 6]
    path = write_lines(tmp_path / "a.jsonl", rows)
    (violation,) = planned(tmp_path, spec_of(path, {"chatTemplate": gemma + CHATML})).violations
    assert violation.metadata["line"] == "2" and "line 1: System role not supported" in violation.message
    lenient = {"uri": str(path), "maxBadRowsShare": 0.2}
    found = planned(tmp_path, spec_of(path, {"chatTemplate": gemma + CHATML}, trainData=lenient))
    assert not found.violations
    (left_out,) = [each for each in found.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    assert left_out.message.count("System role") == 1


def test_several_named_templates_are_used_by_their_names_and_none_is_the_default_if_none_is_called_so() -> None:
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS}
    assert template_of(tokenizer, "") == CHATML and template_of(tokenizer, MARKED) == MARKED
    tokenizer.chat_template = {"rag": CHATML, "tool_use": TOOLS}
    with pytest.raises(TemplateFault, match="rag, tool_use, none called default"):
        template_of(tokenizer, "")
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    assert template_of(tokenizer, "") == ""


def test_warnings_say_what_a_template_does_otherwise(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("a?", "bcd")] * 4)
    some = MARKED.replace(MARK, PART)
    for template, reason in ((BEGUN, "CHAT_PROMPT_DIFFERS"), (some, "CHAT_MARKS_DIFFER")):
        found = planned(tmp_path, spec_of(path, {"chatTemplate": template}))
        (warning,) = [each for each in found.plan.warnings if each.reason == reason]
        assert "in 4 of 4 conversations" in warning.message


# DeepSeek R1 joins arguments to its text, and writes calls only beside no content at all.
JOINING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{% for call in m['tool_calls'] %}"
    "{{ call['function']['name'] + ' ' + call['function']['arguments'] }}{% endfor %}{% else %}{{ m['content'] }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written as they are, arguments that are an object would be Python.
WRITING = CALLING.replace("call.name", "call.function.name + ' ' ~ call.function.arguments")
AS_JSON = CALLING.replace("call.name", "call.function.name + ' ' + call.function.arguments | tojson")


@pytest.mark.parametrize("source", [JOINING, WRITING, AS_JSON], ids=["joining", "writing", "as JSON"])
def test_arguments_are_written_once_as_json_however_the_template_takes_them(source: str) -> None:
    row = calling("", "f")
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"city": "Zürich"}}}]
    answers, _, _ = answers_of(source, row, "<tool_call>", "</tool_call>")
    assert 'f {"city": "Zürich"}' in answers[0]


@pytest.mark.parametrize("call", [{}, {"function": "f"}, {"function": None, "name": 7}, {"function": {"name": [1]}}])
def test_a_call_of_any_form_is_the_templates_to_take(call: dict[str, Any]) -> None:
    row = calling("Look.", "f")
    row["messages"][1]["tool_calls"] = [call]
    reads = CHATML.replace("message['content']", "message.content ~ (message.tool_calls or '')")
    answers, _, _ = answers_of(reads, row)
    assert answers[0].startswith("Look.[{")


def test_calls_that_a_template_leaves_out_are_refused_with_the_message() -> None:
    row = calling("Let me look.", "f")
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    with pytest.raises(TemplateFault, match="does not write the tool_calls of message 2; leave the row out, or take"):
        answers_of(JOINING, row)


@pytest.mark.parametrize("read", ["m.thinking", "m['reasoning']", "m.get('reasoning_content')"])
def test_thoughts_have_the_name_that_the_template_reads(read: str, tmp_path: Path) -> None:
    writes = THINKING.replace("{{ m['content'] }}", "{{ (" + read + " or '') + m['content'] }}")
    rows = [chat("a?", "b", "c?", "d") for _ in range(4)]
    rows[0]["messages"][3]["thinking"] = rows[1]["messages"][1]["reasoning"] = "Hm. "
    found = planned(tmp_path, spec_of(write_lines(tmp_path / "a.jsonl", rows), {"chatTemplate": writes}))
    # The template leaves out the thought of an earlier answer.
    (told,) = [each.message for each in found.plan.warnings if each.reason == "ANSWERS_NOT_WHOLE"]
    assert "in 1 of 4 conversations the chat template does not write the thoughts of each answer" in told
    template = ChatTemplate(writes, chat_tokenizer(None))
    messages = [chat("a?")["messages"][0], {"role": "assistant", "content": "b", "reasoning_content": "Hm. "}]
    found_answers = template.find_answers(messages, [False, True])
    assert "Hm. b" in found_answers.text and not found_answers.lacks_thoughts


def test_what_a_template_leaves_out_of_answers_is_said(tmp_path: Path) -> None:
    rows = [chat("a?", "<think>hm</think>x", "b?", "y"), *[chat("a?", "b")] * 3]
    rows[1]["messages"][1]["thinking"] = "Hm."
    found = planned(tmp_path, spec_of(write_lines(tmp_path / "a.jsonl", rows), {"chatTemplate": THINKING}))
    told = [each.message for each in found.plan.warnings if each.reason == "ANSWERS_NOT_WHOLE"]
    assert [each.split(" conversations")[0] for each in told] == ["in 3 of 4", "in 1 of 4"]
    assert "does not write the thoughts" in told[0] and "does not write the whole text" in told[1]


def test_a_thought_that_the_prompt_begins_is_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("a?", "<think>\nhm</think>x"), chat("a?", "<think>hm</think>x")] * 2)
    found = planned(tmp_path, spec_of(path, {"chatTemplate": BEGUN}))
    assert not [each for each in found.plan.warnings if each.reason == "ANSWERS_NOT_WHOLE"]


# Mistral Nemo writes the system message with the last question only.
LATE = (
    "{% set said = messages[1:] if messages[0].role == 'system' else messages %}{% for m in said %}"
    "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if loop.last and m.role == 'user' and tools %}{{ tools | tojson }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
NO_BOTH = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + NO_SYSTEM
SYSTEM, OFFERED = {"system": "Be short."}, {"tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("source", "row", "step"),
    [
        (LATE, SYSTEM, "it does if the last answer alone is learnt: set last_turn_only"),
        (NO_SYSTEM, SYSTEM, "it does without its system message: put that at the beginning of the first question"),
        (NO_SYSTEM.replace("system'", "system' or tools"), OFFERED, "it does without the tools: leave them out"),
        (NO_BOTH, {**SYSTEM, **OFFERED}, "it does without system message and tools: put both at the beginning"),
        ("{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + CHATML, {}, "leave the row out, or"),
    ],
)
def test_a_conversation_that_the_template_does_not_take_says_what_helps(
    source: str, row: dict[str, Any], step: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{**chat("a?", "b", "c?", "d"), **row}] * 4)
    (violation,) = planned(tmp_path, spec_of(path, {"chatTemplate": source})).violations
    assert step in violation.message and "chat_template that" in violation.message


@pytest.mark.parametrize("row", [SYSTEM, OFFERED, {**SYSTEM, **OFFERED}], ids=["system", "tools", "both"])
@pytest.mark.parametrize("said", [("a?", "b"), ("a?", "b", "c?", "d")], ids=["one", "two"])
def test_what_a_template_writes_in_prompts_alone_is_before_the_last_answer(
    said: tuple[str, ...], row: dict[str, Any]
) -> None:
    template = ChatTemplate(LATE, chat_tokenizer(None))
    messages = chat(*said, system=row.get("system", ""))["messages"]
    learnt = [False] * (len(messages) - 1) + [True]
    found = template.find_answers(messages, learnt, row.get("tools", ()))
    prompt = template.render(messages[:-1], row.get("tools", ()), prompt=True)
    assert ("Be short." in prompt) == ("system" in row) and ('{"name": "f"}' in prompt) == ("tools" in row)
    assert found.text == prompt + said[-1] + "<|im_end|>\n"
    assert [found.text[first:last] for first, last in found.answers] == [said[-1] + "<|im_end|>"]
