"""Chat templates: untrusted Jinja, rendered in transformers' sandbox, and the places of answers in the text.

The sandbox reaches no file and no attribute that begins with an underscore. What a template costs is bounded by the
limits of the process (docs/compute.md), and by the length of what it may write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import product, starmap
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes

# Private, but the only access to the sandbox with the functions that the Hub's templates use; the version is pinned.
from transformers.utils.chat_template_utils import _compile_jinja_template

from shardyard_trainer.data.chat_turns import ASSISTANT, FIRST_ROLES, THOUGHTS, TOOL, USER, Message
from shardyard_trainer.data.errors import shorten
from shardyard_trainer.data.readable import unreadable
from shardyard_trainer.reading import reading

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""For tokenizers without a template: like Zephyr's, which needs no special token but the end of a text."""

MOST_TEMPLATE_BYTES = 1024 * 1024
_SHORTEST_LIMIT = 2**20
_LONGEST_RATIO = 16
_DAY = datetime(2024, 7, 26)
"""The date given to templates (Llama 3's own default): the same text must have the same tokens tomorrow."""


_PLAIN_NAME = re.compile(r"[\w.-]+")
"""Names of functions that templates write as they are."""

_FUNCTION, _ARGUMENTS = "a_function", {"a_key": "a_value"}
"""A call to try templates with."""


class _CallForm(NamedTuple):
    """How a template takes calls: the arguments as JSON in text, not as an object; and content that says nothing."""

    as_text: bool = False
    no_content: str | None = ""


class TemplateFault(Exception):
    """A template is invalid, or does not accept a conversation; the message names its line."""


class Rendered(NamedTuple):
    """A conversation as text.

    `answers` are where the answers to learn begin and end. `prompts_differ`: one of them does not begin where
    its prompt ends. `marks_differ`: the template marks other text than the answers that its prompts ask for.
    `lacks_thoughts`, `lacks_texts`: it does not write all thoughts, or all contents, of those answers.
    """

    text: str
    answers: list[tuple[int, int]]
    prompts_differ: bool = False
    marks_differ: bool = False
    lacks_thoughts: bool = False
    lacks_texts: bool = False


class ChatTemplate:
    """A template with the special tokens of its tokenizer; `closers` are tokens that may end an answer."""

    def __init__(self, source: str, tokenizer: Any) -> None:
        reading("the chat template")
        self.source = source
        roles = {
            role: str(token) for role, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)
        }
        self._roles = {"bos_token": "", "eos_token": "", **roles}
        self._closers = tuple(name for token in tokenizer.added_tokens_decoder.values() if (name := str(token)).strip())
        try:
            if len(source.encode()) > MOST_TEMPLATE_BYTES:
                raise TemplateFault(f"it has over {MOST_TEMPLATE_BYTES:,} bytes")
            self._compiled: Any = _compile_jinja_template(source)
            environment = self._compiled.environment
            environment.globals["strftime_now"] = _DAY.strftime
            tree = environment.parse(source)
            self._names = jinja2.meta.find_undeclared_variables(tree)
            keys = _keys_read(tree)
            self._thoughts = next((name for name in THOUGHTS if name in keys), THOUGHTS[0])
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFault(f"line {error.lineno}: {shorten(str(error.message))}") from None
        except TemplateFault:
            raise
        except Exception as error:  # edge: untrusted code, which can make Python's compiler fail in many ways.
            raise TemplateFault(f"it cannot be compiled: {_said(error)}") from None
        self._try_out()

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads the offered tools."""
        return "tools" in self._names

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, prompt: bool) -> str:
        """Renders a conversation; `prompt`: ready for an answer. Raises TemplateFault."""
        return self._render(messages, tools, prompt=prompt)[0]

    def find_answers(self, messages: Sequence[Message], learnt: Sequence[bool], tools: Sequence[Any] = ()) -> Rendered:
        """Renders a conversation, and finds the places of the messages to learn. Raises TemplateFault.

        An answer begins where the prompt for it ends, and ends after the token that closes it. Templates may
        mark answers (`{% generation %}`); then those places count, and always the closing token.
        """
        try:
            return self._find(messages, learnt, tools)
        except TemplateFault:
            is_last_alone = bool(learnt) and learnt[-1] and sum(learnt) == 1
            if is_last_alone and (found := self._after_prompt(messages, tools)) is not None:
                return found
            raise

    def _after_prompt(self, messages: Sequence[Message], tools: Sequence[Any]) -> Rendered | None:
        """The last answer after its prompt, of a template that writes system message and tools in prompts alone.

        The answer is as it is without these; None if the template does not write it then either.
        """
        begin = 1 if messages[0]["role"] in FIRST_ROLES else 0
        if not begin and not tools:
            return None
        try:
            prompt = self._render(messages[:-1], tools, prompt=True)[0]
            found = self._find(messages[begin:], [*[False] * (len(messages) - begin - 1), True], ())
        except TemplateFault:
            return None
        if not found.answers or found.prompts_differ:
            return None
        start = found.answers[0][0]
        moved = [(first - start + len(prompt), last - start + len(prompt)) for first, last in found.answers]
        return found._replace(text=prompt + found.text[start:], answers=moved)

    def _find(self, messages: Sequence[Message], learnt: Sequence[bool], tools: Sequence[Any]) -> Rendered:
        """`find_answers` in the text of the whole conversation. Raises TemplateFault."""
        text, marks = self._render(messages, tools, prompt=False)
        answers, prompts_differ, marks_differ = [], False, False
        lacks_thoughts = lacks_texts = False
        for place, is_learnt in enumerate(learnt):
            if not is_learnt:
                continue
            begin, differs = self._begin(text, messages[:place], tools)
            end = self._end(text, begin, messages, place, tools)
            prompts_differ |= differs
            self._check_calls(text[begin:end], messages[place], place)
            thoughts, said = (messages[place].get(key, "").strip() for key in (THOUGHTS[0], "content"))
            # A prompt may already begin what the answer says, such as a thought.
            lacks_thoughts |= thoughts not in text[max(0, begin - len(thoughts)) : end]
            lacks_texts |= said not in text[max(0, begin - len(said)) : end]
            own = [(max(first, begin), min(last, end)) for first, last in marks if first < end and last > begin]
            if marks:
                marks_differ |= not self._agree(text, own, (begin, end))
            answers += [*own, (end - len(self._closer(text[begin:end])), end)] if own else [(begin, end)]
        found = [(first, last) for first, last in answers if last > first]
        return Rendered(text, found, prompts_differ, marks_differ, lacks_thoughts, lacks_texts)

    def _check_calls(self, answer: str, message: Message, place: int) -> None:
        """Raises TemplateFault if the calls of an answer are not written."""
        for call in message.get("tool_calls") or []:
            function = call.get("function")
            name = (function if isinstance(function, Mapping) else call).get("name")
            if isinstance(name, str) and _PLAIN_NAME.fullmatch(name) and name not in answer:
                what = f"it does not write the tool_calls of message {place + 1}"
                raise TemplateFault(f"{what}; leave the row out, or take a template that does")

    def _closer(self, answer: str) -> str:
        """The token that ends an answer; empty if there is none."""
        return max((token for token in self._closers if answer.endswith(token)), key=len, default="")

    def _begin(self, text: str, before: Sequence[Message], tools: Sequence[Any]) -> tuple[int, bool]:
        """Where an answer begins, and whether its prompt differs from the text there."""
        prompt = self._render(before, tools, prompt=True)[0]
        if text.startswith(prompt):
            return len(prompt), False
        if not text.startswith(self._render(before, tools, prompt=False)[0]):
            raise TemplateFault(
                f"it writes the messages before message {len(before) + 1} differently once the answer is there, so the "
                "answer cannot be located in the text"
            )
        return _common_prefix(text, prompt), True

    def _end(self, text: str, begin: int, messages: Sequence[Message], place: int, tools: Sequence[Any]) -> int:
        """Where an answer ends: with the text up to it, or at the end that another answer in its place would have."""
        end = len(text)
        if place + 1 < len(messages):
            upto = self._render(messages[: place + 1], tools, prompt=False)[0]
            end = len(upto) if text.startswith(upto) else self._end_by_other(text, begin, messages, place, tools)
            found, alone = text[begin:end].strip(), upto[begin:].strip()
            # What follows may be written in another way without its calls; then a part of it must not be learnt.
            agrees = found in alone or (alone and found.endswith(alone))
            if messages[place].get("tool_calls") and not agrees:
                raise TemplateFault(
                    f"it writes what follows the tool_calls of message {place + 1} differently without them, so the "
                    "end of the answer cannot be located in the text"
                )
        answer = text[begin:end]
        closed = answer.rstrip()
        return begin + len(closed) if self._closer(closed) else end

    def _end_by_other(
        self, text: str, begin: int, messages: Sequence[Message], place: int, tools: Sequence[Any]
    ) -> int:
        """The end of an answer, including the token that closes it if one follows at once.

        What follows an answer is what also follows another one in its place, which has other content and calls no tool.
        """
        kept = {key: value for key, value in messages[place].items() if key != "tool_calls"}
        # Two, as the answer may end with one of them itself.
        before, after = messages[:place], messages[place + 1 :]
        others = [{**kept, "content": said} for said in "xy"]
        changed = [self._render([*before, other, *after], tools, prompt=False)[0] for other in others]
        end = len(text) - min(_common_prefix(text[::-1], each[::-1]) for each in changed)
        # A token that begins the next message does not close this one.
        alone = self._render([*before, others[0]], tools, prompt=False)[0][begin:]
        closers = [token for token in self._closers if text.startswith(token, end) and token in alone]
        return end + len(max(closers, key=len, default=""))

    def _agree(self, text: str, marks: Sequence[tuple[int, int]], answer: tuple[int, int]) -> bool:
        """Whether marks cover an answer, apart from blanks and the token that closes it."""
        marked = "".join(text[first:last] for first, last in marks).strip()
        found = text[slice(*answer)].strip()
        return marked in (found, found.removesuffix(self._closer(found)).strip())

    def _try_out(self) -> None:
        asked, answered = "a question", "an answer"
        messages = [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": answered}]
        if answered not in self.render(messages, prompt=False) or asked not in self.render(messages[:1], prompt=True):
            raise TemplateFault("its text of a user's and an assistant's message does not contain their contents")

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any], *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the parts of it that the template marks as answers."""
        if tools and not self.takes_tools:
            raise TemplateFault("it does not read `tools`; leave them out, or take a template that does")
        if "tool_calls" not in self.source and any(message.get("tool_calls") for message in messages):
            raise TemplateFault("it does not read `tool_calls`; leave the row out, or take a template that does")
        return self._write([self._given(message) for message in messages], tools, prompt=prompt)

    def _given(self, message: Message) -> Message:
        """A copy of a message, with thoughts by the template's name for them, and arguments as it takes them."""
        # Copies: a template that could change them would change what the next rendering reads.
        given = dict(message)
        if THOUGHTS[0] in given:
            given[self._thoughts] = given.pop(THOUGHTS[0])
        if calls := given.get("tool_calls"):
            given["tool_calls"] = [_as_text(call) for call in calls] if self._call_form.as_text else calls
            given["content"] = given["content"] or self._call_form.no_content
        return given

    @cached_property
    def _call_form(self) -> _CallForm:
        """How the template takes calls: it may join arguments to its text as they are, or want no content beside."""
        call = {"id": "abcdefghi", "type": "function", "function": {"name": _FUNCTION, "arguments": _ARGUMENTS}}
        result = {"role": TOOL, "content": "7", "name": _FUNCTION, "tool_call_id": call["id"]}
        for form in starmap(_CallForm, product((False, True), ("", None))):
            answer = {"role": ASSISTANT, "content": form.no_content, "tool_calls": [call]}
            if form.as_text:
                answer["tool_calls"] = [_as_text(call)]
            try:
                text, _ = self._write([{"role": USER, "content": "?"}, answer, result], (), prompt=True)
            except TemplateFault:
                continue
            if _FUNCTION in text and str(_ARGUMENTS) not in text:
                return form
        return _CallForm()

    def _write(
        self, messages: Sequence[Message], tools: Sequence[Any], *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        said = sum(len(message["content"] or "") + len(message.get(self._thoughts, "")) for message in messages)
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        left = _SHORTEST_LIMIT + _LONGEST_RATIO * said
        given = {"messages": messages, "tools": list(tools) or None, "documents": None}
        try:
            with self._compiled.environment.activate_tracker(blocks, marks):
                for block in self._compiled.generate(**given, add_generation_prompt=prompt, **self._roles):
                    blocks.append(block)
                    left -= len(block)
                    if left < 0:
                        raise TemplateFault("it writes more than 16 times the characters of the messages")
        except TemplateFault:
            raise
        except MemoryError:
            raise TemplateFault("it asks for more memory than this process may have") from None
        except Exception as error:  # edge: untrusted code may raise anything; the template is at fault.
            raise TemplateFault(_line_of(error) + _said(error)) from None
        text = "".join(blocks)
        if fault := unreadable(text):
            raise TemplateFault(f"its text has {fault}")
        return text, marks


def _keys_read(tree: nodes.Template) -> set[str]:
    """The keys that a template reads of anything: `x.key`, `x['key']` and `x.get('key')`."""
    found = {node.attr for node in tree.find_all(nodes.Getattr)}
    given = [node.arg for node in tree.find_all(nodes.Getitem)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr == "get":
            given += call.args[:1]
    return found | {node.value for node in given if isinstance(node, nodes.Const) and isinstance(node.value, str)}


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are JSON in text."""
    written = dict(call)
    if isinstance(function := call.get("function"), Mapping):
        written["function"] = _as_text(function)
    if isinstance(arguments := call.get("arguments"), Mapping):
        written["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return written


def template_of(tokenizer: Any, given: str, *, with_tools: bool = False) -> str:
    """The template to use: the given one, the tokenizer's, else the default; empty if that lacks an end token.

    Raises TemplateFault for a tokenizer with several, none of which is the default.
    """
    if given:
        return given
    own = tokenizer.chat_template
    if not own:
        return DEFAULT_TEMPLATE if tokenizer.eos_token else ""
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if with_tools else None))
    except ValueError:
        raise TemplateFault(f"the tokenizer has several: {', '.join(map(shorten, own))}, none called default") from None


def _common_prefix(first: str, second: str) -> int:
    """The length of the common beginning of two texts, found by bisection, not one character at a time."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _said(error: Exception) -> str:
    text = shorten(str(error).strip()) or "no reason is given"
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _line_of(error: Exception) -> str:
    """`line 3: ` of the template, which Jinja writes into the traceback."""
    lines = []
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f"line {lines[-1]}: " if lines else ""
