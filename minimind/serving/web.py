"""The page of `minimind web`. Streamlit runs this file from top to bottom at every click.

MINIMIND_URL is the server's address, MINIMIND_API_KEY its key.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import openai
import streamlit as st

from minimind.serving.web_client import (
    LANGUAGES,
    SAMPLE_TOOLS,
    SUGGESTIONS,
    Call,
    ChatTurn,
    Settings,
    connect,
    fill,
    parse_tools,
    text,
)
from minimind.serving.web_tools import REFUSED, PageTools, may_go_on

URL = os.environ.get("MINIMIND_URL", "http://127.0.0.1:8998/v1")
AVATARS = {"user": ":material/person:", "assistant": ":material/neurology:", "tool": ":material/build:"}
REDRAW_SECONDS = 0.04  # faster is not visible, and every redraw sends the whole answer to the browser
LEAST_TOKENS = 10  # fewer tokens give no meaningful rate
STYLE = """<style>
[data-testid="stSidebarHeader"] { height: 1.8rem; margin: 0; }
[data-testid="stMainBlockContainer"] { padding-top: 2.5rem; max-width: 50rem; }
[data-testid="stBottomBlockContainer"] { padding: .5rem 1rem 2rem; max-width: 50rem; }
[data-testid="stSidebar"] [data-testid="stVerticalBlock"] { gap: .75rem; }
[data-testid="stChatMessage"] { padding: .6rem .9rem; border-radius: .9rem; }
.minimind { font-size: 1.5rem; font-weight: 700; letter-spacing: -.02em; }
.minimind span { color: #5b6ee1; }
.welcome { text-align: center; margin: 14vh 0 1.5rem; }
.welcome h1 { font-size: 2.6rem; padding: 0; letter-spacing: -.03em; }
.welcome p { opacity: .65; margin-top: .4rem; }
</style>"""
LOGO = "Mini<span>Mind</span>"


def t(name: str, *values: object) -> str:
    return text(name, st.session_state.language, *values)


def main() -> None:
    st.set_page_config(page_title="MiniMind", page_icon=":material/neurology:", initial_sidebar_state="expanded")
    st.html(STYLE)
    state = st.session_state
    if "turns" not in state:
        state.turns, state.memory = [], {}
        state.language = "zh" if (st.context.locale or "").startswith("zh") else "en"
    client = connect(URL, os.environ.get("MINIMIND_API_KEY"))
    settings = sidebar(client)
    question = st.chat_input(t("ask"), disabled=settings is None)
    if settings is None:
        return
    if not state.turns and not question:
        question = welcome()
    for number, turn in enumerate(state.turns):
        show(turn)
        if turn.calls and number == len(state.turns) - 1 and not question:
            answer_calls(turn)
    if question:
        state.turns.append(ChatTurn("user", question))
        show(state.turns[-1])
    if state.turns and state.turns[-1].role != "assistant":
        answer(client, settings)


def sidebar(client: openai.OpenAI) -> Settings | None:
    """Draw the side bar and return its settings; None, with an error on the page, if the server cannot be used."""
    with st.sidebar:
        st.html(f'<div class="minimind">{LOGO}</div>')
        st.segmented_control(
            t("language"),
            list(LANGUAGES),
            format_func=LANGUAGES.__getitem__,
            key="language",
            required=True,
            label_visibility="collapsed",
        )
        if st.button(t("new"), icon=":material/add_comment:", width="stretch"):
            st.session_state.turns, st.session_state.memory = [], {}
        models = available(client)
        if not models:
            return None
        model = st.selectbox(t("model"), models) or models[0]
        thinking = st.segmented_control(
            t("thinking"), ["auto", "on", "off"], format_func=t, default="auto", required=True, key="thinking",
            width="stretch",
        )  # fmt: skip
        settings = Settings(model, thinking={"on": True, "off": False}.get(thinking))
        with st.expander(t("sampling"), icon=":material/tune:", expanded=True):
            settings.temperature = st.slider(t("temperature"), 0.0, 2.0, 0.7, 0.05, help=t("temperature_help"))
            settings.top_p = st.slider(t("top_p"), 0.05, 1.0, 0.9, 0.05, help=t("top_p_help"))
            settings.repetition_penalty = st.slider(t("repetition"), 1.0, 2.0, 1.0, 0.05, help=t("repetition_help"))
            settings.max_tokens = st.slider(t("max_tokens"), 16, 2048, 512, 16)
            settings.seed = st.number_input(t("seed"), 0, 2**31, None, help=t("seed_help"))
        with st.expander(t("system"), icon=":material/assignment:"):
            settings.system = st.text_area(t("system"), label_visibility="collapsed", key="system")
        with st.expander(t("tools"), icon=":material/build:"):
            settings.tools = chosen_tools()
    return settings


def available(client: openai.OpenAI) -> list[str]:
    try:
        return [model.id for model in client.models.list()]
    except openai.APIConnectionError:
        st.error(t("unreachable", URL))
    except openai.OpenAIError as problem:
        st.error(t("refused", URL, problem))
    return []


@st.cache_resource
def page_tools() -> PageTools:
    return PageTools()


def chosen_tools() -> list[dict[str, Any]]:
    """Schemas of the tools that were chosen: those that run here, and those whose results the user types in."""
    here = page_tools()
    label = t("tools_asked" if here.asks else "tools_unasked")
    return here.schemas(st.multiselect(label, here.names, key="tools_here")) + written_tools()


def written_tools() -> list[dict[str, Any]]:
    offered = st.toggle(t("tools_on"), key="tools_on")
    written = st.text_area(
        t("tools_json"), json.dumps(SAMPLE_TOOLS, indent=1, ensure_ascii=False), height=220, disabled=not offered
    )
    if not offered:
        return []
    try:
        return parse_tools(written)
    except ValueError as problem:
        st.error(str(problem))
        return []


def welcome() -> str | None:
    """Draw the page before the first question; returns the suggestion that was clicked."""
    place = st.empty()
    with place.container():
        st.html(f'<div class="welcome"><h1 class="minimind">{LOGO}</h1><p>{t("tagline")}</p></div>')
        suggestions = SUGGESTIONS[st.session_state.language]
        for row in (suggestions[:2], suggestions[2:]):
            for column, suggestion in zip(st.columns(2), row, strict=True):
                if column.button(suggestion, width="stretch"):
                    place.empty()
                    return suggestion
    return None


def show(turn: ChatTurn) -> None:
    with st.chat_message(turn.role, avatar=AVATARS[turn.role]):
        View().draw(turn)


class View:
    """The place of one turn on the page; it is redrawn while the turn grows."""

    def __init__(self) -> None:
        self._thought, self._content, self._calls, self._below = (st.empty() for _ in range(4))

    def draw(self, turn: ChatTurn, running: bool = False) -> None:
        if turn.reasoning:
            self._draw_thought(turn, running and not turn.content and not turn.calls)
        if turn.role == "tool":
            self._content.code(turn.content, language="json")
        elif turn.content:
            self._content.markdown(turn.content + (" ▍" if running and not turn.calls else ""))
        elif running and not turn.reasoning and not turn.calls:
            self._content.markdown("▍")
        if turn.calls:
            with self._calls.container():
                for call in turn.calls:
                    draw_call(call)
        if turn.error:
            self._below.error(turn.error, icon=":material/error:")
        elif not running and (notes := figures(turn)):
            self._below.caption(notes)

    def _draw_thought(self, turn: ChatTurn, running: bool) -> None:
        label = t("thinking_now") if running else t("thought", turn.thought_for)
        with self._thought.container(), st.status(label, state="running" if running else "complete"):
            st.markdown(turn.reasoning)


def draw_call(call: Call) -> None:
    with st.container(border=True):
        st.markdown(f":material/build: {t('calls', f'**`{call.name}`**')}")
        st.code(call.arguments, language="json", wrap_lines=True)


def figures(turn: ChatTurn) -> str:
    if turn.role != "assistant":
        return ""
    notes = [t("figures", turn.tokens, 1e3 * turn.first_after)] if turn.tokens else []
    notes += [t("rate", turn.tokens_per_second)] if turn.tokens >= LEAST_TOKENS else []
    notes += [t("stopped")] if turn.stopped else []
    notes += [t("cut")] if turn.cut else []
    notes += [t("dropped", turn.dropped)] if turn.dropped else []
    return " · ".join(notes)


def answer_calls(turn: ChatTurn) -> None:
    """Get the results of a turn's calls: run those of the tools that run here, once the user allows it, and ask for the
    others."""
    state = st.session_state
    written = [call for call in turn.calls if call.name not in state.tools_here] if state.tools_on else []
    unasked = not page_tools().asks and may_go_on(state.turns)
    if not written and unasked:
        return add_results(turn, {})
    with st.form("results", border=False):
        values = {call.id: st.text_input(t("result_of", call.name), key=f"result-{call.id}") for call in written}
        if st.form_submit_button(t("send_result" if written else "run"), icon=":material/send:"):
            add_results(turn, values)
        if not written and st.form_submit_button(t("refuse"), icon=":material/block:"):
            add_results(turn, {call.id: REFUSED for call in turn.calls})


def add_results(turn: ChatTurn, known: Mapping[str, str]) -> None:
    """Add the results of a turn's calls, in their order. known: those that need not run, by the call's id."""
    state = st.session_state
    ran = page_tools().run([call for call in turn.calls if call.id not in known], state.tools_here, state.memory)
    results = {result.call_id: result for result in ran}
    for call in turn.calls:
        state.turns.append(results.get(call.id) or ChatTurn("tool", known[call.id], call_id=call.id))
    st.rerun()


def answer(client: openai.OpenAI, settings: Settings) -> None:
    """Stream the next answer. The stop button, like any click, ends this run of the script: the turn keeps the text so
    far, and closing the stream stops the server."""
    turns = st.session_state.turns
    turn = ChatTurn("assistant")
    turns.append(turn)
    with st.chat_message("assistant", avatar=AVATARS["assistant"]):
        view = View()
        view.draw(turn, running=True)
        st.button(t("stop"), icon=":material/stop_circle:", key="stop")
        drawn = 0.0
        with closing(fill(client, settings, turns[:-1], turn)) as pieces:
            for _ in pieces:
                if time.perf_counter() - drawn >= REDRAW_SECONDS:
                    view.draw(turn, running=True)
                    drawn = time.perf_counter()
    st.rerun()


main()
